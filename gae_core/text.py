"""Sentences as tensors: any text file, and languages made from a code in the plane, whose likelihood is known.

A sentence is a row of token numbers, filled up with ``PAD``. Of the synthetic languages, made as by He et al.
(ICLR 2019), it can be computed what a perfect model would reach. Derived in the chapter *Codes of sentences*.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

PAD, END, UNKNOWN = range(3)
SIGNS = ("<pad>", "</s>", "<unk>")  # how they are spelled


@dataclass(frozen=True)
class Vocabulary:
    """The words of a language. Token t stands for ``words[t]``; the first three are the signs.

    ``PAD`` also stands before the first word, where a decoder begins. A word spelled like one of the signs is unknown.

    Attributes:
        words: the signs, then the words.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.words[:3] != SIGNS or len(set(self.words)) < max(4, len(self.words)):
            raise ValueError(f"words must be {SIGNS} and then at least one word, all different, got {self.words[:9]}")

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, sentences: Sequence[Sequence[str]], *, max_words: int | None = None) -> "Vocabulary":
        """The words of tokenised sentences, the most frequent first, ties in the order of the alphabet.

        Args:
            sentences: their words.
            max_words: how many words to keep at most, beside the signs.
        """
        counts = Counter(word for sentence in sentences for word in sentence if word not in SIGNS)
        return cls(SIGNS + tuple(sorted(counts, key=lambda word: (-counts[word], word))[:max_words]))

    def encode(self, sentences: Sequence[Sequence[str]], *, length: int | None = None) -> Tensor:
        """Tokens of sentences, each closed by ``END`` and filled up with ``PAD``; words that are not here: ``UNKNOWN``.

        Args:
            sentences: their words, none of them empty.
            length: tokens a row; by default the longest sentence's.

        Returns:
            int64, (n, length).

        Raises:
            ValueError: if there is no sentence, one has no words, or one is longer than ``length`` with its end.
        """
        longest = max(map(len, sentences), default=0) + 1
        length = longest if length is None else length
        if not min(map(len, sentences), default=0) or longest > length:
            raise ValueError(
                f"sentences must be at least one, each of 1 to {length - 1} words (its end takes a token), "
                f"got {len(sentences)} of {min(map(len, sentences), default=0)} to {longest - 1} words"
            )
        number = {word: token for token, word in enumerate(self.words) if token > UNKNOWN}
        rows = [[number.get(word, UNKNOWN) for word in sentence] + [END] for sentence in sentences]
        return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])

    def decode(self, tokens: Tensor) -> list[list[str]]:
        """Words of each row (n, length) up to its first ``END`` or ``PAD``."""
        rows = []
        for row in tokens.tolist():
            stop = next((i for i, token in enumerate(row) if token in (PAD, END)), len(row))
            rows.append([self.words[token] for token in row[:stop]])
        return rows


@dataclass(frozen=True)
class Sentences:
    """Sentences, split once and for all.

    Attributes:
        name: of the language or file.
        vocabulary: words of the training part.
        train: tokens, int64, (n, length).
        test: held-out sentences, (m, length).
        z_train: the codes that the training sentences were made from, (n, 2); None for a file, which has none.
        z_test: those of the held-out sentences.
        left_out: sentences of a file that were too long.
    """

    name: str
    vocabulary: Vocabulary
    train: Tensor
    test: Tensor
    z_train: Tensor | None = None
    z_test: Tensor | None = None
    left_out: int = 0


def load_sentences(
    path: str | Path,
    *,
    max_words: int | None = None,
    max_length: int = 40,
    test_share: float = 0.1,
    tokenize: Callable[[str], list[str]] = str.split,
    seed: int = 0,
) -> Sentences:
    """Read a UTF-8 text file with one sentence a line.

    Lines without a word are passed over. The rest is split at random; the vocabulary is of the training part, and words
    of the test part that it lacks are unknown.

    Args:
        path: the file.
        max_words: words of the vocabulary at most, the most frequent; the others are unknown.
        max_length: words of a sentence at most; longer ones are left out, and counted.
        test_share: part that is held out, at least one sentence.
        tokenize: a line's words; ``list`` makes each character one, for languages that do not space their words.
        seed: of the split.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no UTF-8, fewer than two sentences are left, or an argument is out of range.
    """
    if not 0 < test_share < 1 or max_length < 1 or (max_words is not None and max_words < 1):
        raise ValueError(
            f"test_share must be between 0 and 1, max_length and max_words at least 1, "
            f"got {test_share}, {max_length}, {max_words}"
        )
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, byte {error.start} is not: convert it, e.g. with iconv") from error
    found = [words for line in lines if (words := tokenize(line.strip()))]
    kept = [words for words in found if len(words) <= max_length]
    if len(kept) < 2:
        raise ValueError(
            f"{path} must have at least 2 sentences of 1 to {max_length} words, one a line; "
            f"it has {len(kept)} among {len(lines)} lines, {len(found) - len(kept)} are longer"
        )
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist()
    n = min(max(1, round(test_share * len(kept))), len(kept) - 1)
    held, rest = [kept[i] for i in order[:n]], [kept[i] for i in order[n:]]
    vocabulary, length = Vocabulary.of(rest, max_words=max_words), max(map(len, kept)) + 1
    train, test = (vocabulary.encode(part, length=length) for part in (rest, held))
    return Sentences(Path(path).name, vocabulary, train, test, left_out=len(found) - len(kept))


# ---- languages that are known -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Of a synthetic language. The defaults are those of He et al. (ICLR 2019), from their published code.

    Attributes:
        words: of the vocabulary.
        length: words of every sentence.
        embedding: dimension of the embedding.
        hidden: of the LSTM.
        scale: the weights are uniform in [-scale, scale].
        code_scale: those from the code to the words' logits likewise.
        seed: of the weights.
    """

    words: int = 1000
    length: int = 10
    embedding: int = 100
    hidden: int = 100
    scale: float = 1.0
    code_scale: float = 5.0
    seed: int = 0


RECIPES = {"he2019": Recipe(), "learnable": Recipe(words=50, embedding=10, hidden=10)}
MODES = torch.tensor([[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]])


@dataclass(frozen=True)
class Optimum:
    """What a perfect model of a synthetic language reaches on given sentences, in nats, each of shape (n,).

    Attributes:
        given_code: -log p(x | z) at the code that the sentence was made from, exact.
        nll: estimate of -log p(x) from codes drawn from p(z); its expectation is not below -log p(x).
        nll_below: the same with the sentence's own code among the draws; its expectation is not above -log p(x).
    """

    given_code: Tensor
    nll: Tensor
    nll_below: Tensor

    @property
    def information(self) -> float:
        """Estimate of I(x; z), by which sentences are more likely when their codes are known."""
        return float((self.nll - self.given_code).mean())


class SyntheticLanguage(nn.Module):
    r"""Sentences that an LSTM with random weights speaks about a code z in the plane, the mixture of four normals.

    .. math:: z \sim \tfrac14 \sum_k N(m_k, I), \quad m_k = (\pm2, \pm2), \qquad
        c_0 = W z, \; h_0 = \tanh c_0, \qquad p(x_{t+1} | x_{\le t}, z) = \mathrm{softmax}(O_1 h_t + O_2 z)

    Implements ``def-bn_vae_text-language``. The LSTM reads [embedding of x_t; z]. The first word is uniform, and all
    sentences have the same length, so that no sign ends them.

    Args:
        recipe: sizes and scales.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.embed = nn.Embedding(recipe.words, recipe.embedding)
        self.lstm = nn.LSTM(recipe.embedding + 2, recipe.hidden, batch_first=True)
        self.initial = nn.Linear(2, recipe.hidden, bias=False)
        self.out = nn.Linear(recipe.hidden, recipe.words, bias=False)
        self.out_code = nn.Linear(2, recipe.words, bias=False)
        generator = torch.Generator().manual_seed(recipe.seed)
        for name, parameter in self.named_parameters():
            scale = recipe.code_scale if name.startswith("out_code") else recipe.scale
            nn.init.uniform_(parameter.requires_grad_(False), -scale, scale, generator=generator)

    @property
    def vocabulary(self) -> Vocabulary:
        """Words w0, w1, ..., of which none means anything."""
        return Vocabulary(SIGNS + tuple(f"w{i}" for i in range(self.recipe.words)))

    def _state(self, z: Tensor) -> tuple[Tensor, Tensor]:
        c = self.initial(z)[None]
        return c.tanh(), c

    def _logits(self, words: Tensor, z: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Of each next word, (n, t, words), after words (n, t), and the state behind them."""
        codes = z[:, None].expand(-1, words.shape[1], -1)
        h, state = self.lstm(torch.cat([self.embed(words), codes], 2), state)
        return self.out(h) + self.out_code(z)[:, None], state

    def sample_codes(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """Codes (n, 2) from the mixture."""
        mode = torch.randint(len(MODES), (n,), generator=generator)
        return MODES[mode] + torch.randn(n, 2, generator=generator)

    @torch.no_grad()
    def sample(self, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        """A sentence for each code (n, 2): tokens (n, length)."""
        words, state = [torch.randint(self.recipe.words, (len(z), 1), generator=generator)], self._state(z)
        while len(words) < self.recipe.length:
            logits, state = self._logits(words[-1], z, state)
            words.append(torch.multinomial(logits[:, 0].softmax(1), 1, generator=generator))
        return torch.cat(words, 1) + len(SIGNS)

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Logarithms of p(x | z) for each sentence (n, length) at its code (n, 2), shape (n,).

        Raises:
            ValueError: if ``x`` is no sentence of this language.
        """
        words = x - len(SIGNS)
        if x.shape[1:] != (self.recipe.length,) or words.min() < 0 or words.max() >= self.recipe.words:
            raise ValueError(
                f"x must have shape (n, {self.recipe.length}) and tokens {len(SIGNS)} to "
                f"{self.recipe.words + len(SIGNS) - 1}, got {tuple(x.shape)}, {int(x.min())} to {int(x.max())}"
            )
        logits, _ = self._logits(words[:, :-1], z, self._state(z))
        rest = F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten(), reduction="none").view(len(x), -1).sum(1)
        return -rest - math.log(self.recipe.words)

    def optimum(
        self, x: Tensor, z: Tensor, *, samples: int = 2000, chunk_size: int = 10_000, generator: Generator | None = None
    ) -> Optimum:
        r"""Bracket -log p(x) of sentences whose codes are known.

        .. math:: -\log \frac1S \sum_{s=1}^S p(x|z_s), \quad z_s \sim p(z)

        Implements ``eq-bn_vae_text-sandwich``: the code that made x is a draw from p(z | x), and with it in the place
        of one of the S the estimate errs to the other side.

        Args:
            x: sentences of this language, (n, length).
            z: their codes, (n, 2).
            samples: S.
            chunk_size: pairs (x, z) at a time.
            generator: source of the codes.
        """
        given = self.log_likelihood(x, z).double()
        above, below = [], []
        for row, own in zip(x, given, strict=True):
            draws = self.sample_codes(samples, generator=generator)
            parts = [self.log_likelihood(row.expand(len(part), -1), part) for part in draws.split(chunk_size)]
            found = torch.cat(parts).double()
            above.append(math.log(samples) - found.logsumexp(0))
            below.append(math.log(samples) - torch.logaddexp(found[1:].logsumexp(0), own))
        return Optimum(-given, torch.stack(above), torch.stack(below))


def synthetic(name: str, *, train: int = 16_000, test: int = 1000, seed: int = 0) -> Sentences:
    """Sentences of a synthetic language, with the codes that they were made from.

    Args:
        name: key of ``RECIPES``: "he2019" is the published recipe, "learnable" a small one.
        train: sentences of the training part.
        test: held-out sentences, the same whatever ``train`` is.
        seed: of the sentences; the language's own is in its recipe.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    language, generator = SyntheticLanguage(RECIPES[name]), torch.Generator().manual_seed(seed)
    parts = []
    for n in (test, train):
        z = language.sample_codes(n, generator=generator)
        parts.append((language.sample(z, generator=generator), z))
    (x_test, z_test), (x_train, z_train) = parts
    return Sentences(name, language.vocabulary, x_train, x_test, z_train, z_test)
