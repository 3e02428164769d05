"""Sentences made from a code in the plane: of such a language it can be computed what a perfect model would reach.

It is made as by He et al. (ICLR 2019). Derived in the chapter *Codes of sentences*.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gae_core.seeds import stream
from gae_core.text import SIGNS, Sentences, Vocabulary


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
    language, generator = SyntheticLanguage(RECIPES[name]), stream(seed, "data")
    parts = []
    for n in (test, train):
        z = language.sample_codes(n, generator=generator)
        parts.append((language.sample(z, generator=generator), z))
    (x_test, z_test), (x_train, z_train) = parts
    return Sentences(name, language.vocabulary, x_train, x_test, z_train, z_test)
