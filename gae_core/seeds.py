"""One seed, and from it a stream of randomness of its own for each use that a run has of it.

Generators that start in one state give the same numbers: noise that is drawn with the seed of the weights is a function
of the weights. Streams of different names share no draws.
"""

import contextlib
import numbers
from collections.abc import Iterator

import numpy as np
import torch
from torch import Generator

STREAMS = ("weights", "order", "noise", "evaluation", "samples", "density", "data", "other training")


def seed_of(seed: int, name: str, *index: int) -> int:
    """A 32-bit seed for what takes a number: scikit-learn's ``random_state``, for example.

    Args:
        seed: of the run.
        name: of the stream, one of ``STREAMS``: "weights" at the start of a training; "order" and "noise" in its
            course; "evaluation", of what is measured; "samples"; "density", of what is fitted to codes; "data", of
            those that are made or chosen; "other training", the seed of another training of the same run.
        *index: tells several streams of one name apart.

    Raises:
        ValueError: for an unknown name, or a number that is negative or not whole.
    """
    if name not in STREAMS:
        raise ValueError(f"name must be one of {', '.join(STREAMS)}, got {name!r}")
    if not all(isinstance(n, numbers.Integral) and n >= 0 for n in (seed, *index)):
        raise ValueError(f"seed and index must be whole numbers of at least 0, got {(seed, *index)}")
    return int(np.random.SeedSequence(int(seed), spawn_key=(STREAMS.index(name), *index)).generate_state(1)[0])


def stream(seed: int, name: str, *index: int, device: torch.device | str = "cpu") -> Generator:
    """The generator of :func:`seed_of`."""
    return Generator(device).manual_seed(seed_of(seed, name, *index))


@contextlib.contextmanager
def fresh(seed: int, *index: int) -> Iterator[None]:
    """Within it torch's own generator, by which weights are drawn, is the stream "weights"; it is set back after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "weights", *index))  # torch.manual_seed would seed CUDA too
        yield
