"""Sentences of a text file as tensors: a sentence is a row of token numbers, filled up with ``PAD``."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gae_core.seeds import stream

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
    order = torch.randperm(len(kept), generator=stream(seed, "data")).tolist()
    n = min(max(1, round(test_share * len(kept))), len(kept) - 1)
    held, rest = [kept[i] for i in order[:n]], [kept[i] for i in order[n:]]
    vocabulary, length = Vocabulary.of(rest, max_words=max_words), max(map(len, kept)) + 1
    train, test = (vocabulary.encode(part, length=length) for part in (rest, held))
    return Sentences(Path(path).name, vocabulary, train, test, left_out=len(found) - len(kept))
