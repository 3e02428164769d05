"""Likelihoods p(x | z): what a decoder's output says of the data. In nats."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gae_core import parallel
from gae_core.gaussian import standard_normal_log_prob


class Likelihood(nn.Module):
    """What a model takes for p(x | z). A subclass has ``log_prob(x, output)``, (batch,), from the decoder's output."""

    binary = False  # whether x is zeros and ones, and the output their logits

    def mean(self, output: Tensor) -> Tensor:
        """Means (batch, ...) of p(x | z) from what the decoder gives."""
        return output

    def check_range(self, x: Tensor) -> None:
        """Raise a ValueError if x is nothing to train on."""

    def check_support(self, x: Tensor) -> None:
        """Raise a ValueError if x has no likelihood."""


class Bernoulli(Likelihood):
    """Independent binary entries with the decoder's output as logits: a likelihood for entries 0 and 1 alone.

    Grey values train as well, on the cross-entropy that is common for them, but what they give is no -log p(x): the
    density that it implies does not integrate to 1. Measures of the likelihood refuse them.

    Raises:
        ValueError: for a ``sigma``.
    """

    binary = True

    def __init__(self, sigma: float | None = 1.0) -> None:
        super().__init__()
        if sigma != 1.0:
            raise ValueError(f"sigma must be left out for a Bernoulli likelihood, which has none, got {sigma}")

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Logarithms of p(x | z), (batch,), for x and its logits, each (batch, ...)."""
        return -F.binary_cross_entropy_with_logits(_fitting(output, x), x, reduction="none").flatten(1).sum(1)

    def mean(self, output: Tensor) -> Tensor:
        """Means (batch, ...) of p(x | z) from the logits."""
        return output.sigmoid()

    def draw(self, mean: Tensor, generator: Generator | None) -> Tensor:
        """Zeros and ones (batch, ...) with these means."""
        return (parallel.rand_like(mean, generator=generator) < mean).to(mean.dtype)

    def check_range(self, x: Tensor) -> None:
        """Raise a ValueError unless all entries are in [0, 1]: outside, the loss falls without end."""
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError(
                f"x must be in [0, 1] for the Bernoulli likelihood, got {float(x.min()):g} to {float(x.max()):g}: "
                "gae_core.data.to_unit(x) makes such floats of bytes, and (x + 1) / 2 of images in [-1, 1]"
            )

    def check_support(self, x: Tensor) -> None:
        """Raise a ValueError unless all entries are 0 or 1."""
        if not ((x == 0) | (x == 1)).all():
            raise ValueError(
                "x must have entries 0 and 1 alone, got others: grey values have no Bernoulli likelihood; "
                "binarise them, for example by torch.bernoulli(x, generator=...), and say so beside the figure"
            )


class Gaussian(Likelihood):
    r""":math:`N(x; m, \sigma^2 I)` with the decoder's output as means m.

    Its -log p(x | z) is the squared error over :math:`2\sigma^2`, plus :math:`\tfrac12\log 2\pi\sigma^2` an entry.

    Args:
        sigma: standard deviation, the same for all entries; None learns it, from 1.

    Raises:
        ValueError: for a ``sigma`` that is not positive.
    """

    def __init__(self, sigma: float | None = 1.0) -> None:
        super().__init__()
        if sigma is not None and not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be a positive number, or None to learn it, got {sigma}")
        self.log_sigma = nn.Parameter(torch.zeros(())) if sigma is None else nn.Buffer(torch.tensor(math.log(sigma)))

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Logarithms of p(x | z), (batch,), for x and its means, each (batch, ...)."""
        residual = ((x - _fitting(output, x)) / self.log_sigma.exp()).flatten(1)
        return standard_normal_log_prob(residual) - residual.shape[1] * self.log_sigma

    def draw(self, mean: Tensor, generator: Generator | None) -> Tensor:
        """A sample (batch, ...) with these means."""
        return mean + self.log_sigma.exp() * parallel.randn_like(mean, generator=generator)


def _fitting(output: Tensor, x: Tensor) -> Tensor:
    """The decoder's output, where it has the shape of x, in the precision of x: autocast would round the likelihood."""
    if output.shape != x.shape:
        raise ValueError(f"decoder must give the shape of x, {tuple(x.shape)}, got {tuple(output.shape)}")
    return output.to(x.dtype)


NAMES = {"bernoulli": Bernoulli, "gaussian": Gaussian}


def as_likelihood(likelihood: str | Likelihood, sigma: float | None = 1.0) -> Likelihood:
    """The likelihood of that name with this sigma, or the one given.

    Raises:
        ValueError: for another name, a sigma that the name has no use for, or one beside a likelihood given.
    """
    if isinstance(likelihood, Likelihood) and sigma == 1.0:
        return likelihood
    if likelihood not in NAMES:
        told = 'must be "bernoulli" or "gaussian", or a Likelihood without sigma beside it'
        raise ValueError(f"likelihood {told}, got {likelihood!r}, sigma={sigma}")
    return NAMES[likelihood](sigma)
