"""Measures of reconstructions, samples and codes. Each says what a perfect model would get."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gae_core.data import to_unit


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, *, batch_size: int = 1000) -> Tensor:
    """Apply a function or module to x by batches, without gradient; bytes become floats in [0, 1].

    A module is put where its parameters are, in the mode that it is in: call ``.eval()`` first for a model with
    batch norm.

    Args:
        function: maps (batch, ...) to (batch, ...).
        x: inputs, (n, ...), on any device.
        batch_size: rows at a time.

    Returns:
        Results, (n, ...), on the device of ``x``.
    """
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    parameter = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
    device = x.device if parameter is None else parameter.device
    return torch.cat([function(to_unit(batch.to(device))).to(x.device) for batch in x.split(batch_size)])


def squared_error(model: nn.Module, x: Tensor) -> Tensor:
    r"""Reconstruction error :math:`\|x - D(E(x))\|^2`, summed over the entries of x, one value per sample (n,)."""
    return (to_unit(x) - in_batches(model, x)).square().flatten(1).sum(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Squared Wasserstein distance between Gaussians with the moments of two samples (Fréchet distance).

    .. math:: \|m_a - m_b\|^2 + \operatorname{tr}\bigl(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}\bigr)

    Implements ``def-autoencoder-frechet``. It is 0 if the first two moments agree, not only if the distributions do,
    and biased upwards by sampling: two samples of the same distribution do not give 0. Compare figures of the same
    features and sample sizes only.

    Args:
        a: features of one sample, (n, d), n >= 2.
        b: features of the other, (m, d), m >= 2.

    Returns:
        Distance, in squared units of the features.

    Raises:
        ValueError: for shapes that do not fit, or features that are not finite.
    """
    for name, value in (("a", a), ("b", b)):
        if value.ndim != 2 or len(value) < 2 or value.shape[1] != a.shape[1]:
            raise ValueError(f"{name} must have shape (n >= 2, d), d as in a, got {tuple(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    d = a.shape[1]
    cov_a, cov_b = (torch.cov(x.T).reshape(d, d) for x in (a, b))
    eigen = (torch.linalg.eigh(cov) for cov in (cov_a, cov_b))
    root_a, root_b = (vectors * values.clamp_min(0).sqrt() @ vectors.T for values, vectors in eigen)
    # The singular values of the product are the eigenvalues of that root, without the square root of a rounding error.
    cross = torch.linalg.svdvals(root_a @ root_b).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


@dataclass(frozen=True)
class Gaussianity:
    """How far codes are from N(0, I). Each but radius_std is 0 for the distribution itself, up to sampling.

    Attributes:
        ks_marginal: mean over coordinates of the Kolmogorov-Smirnov distance to N(0, 1).
        ks_radius: Kolmogorov-Smirnov distance of the squared length to chi-squared with d degrees of freedom. Codes
            on a sphere have nearly normal marginals in high dimension: this is what sees them.
        radius_std: standard deviation of the squared length over sqrt(2 d), its value for N(0, I): 1 for that.
        max_correlation: largest absolute correlation between two coordinates (0 for d = 1).
        ks_noise: 1.36 / sqrt(n), what a Kolmogorov-Smirnov distance of truly normal codes exceeds once in twenty.
    """

    ks_marginal: float
    ks_radius: float
    radius_std: float
    max_correlation: float
    ks_noise: float


def gaussianity(z: Tensor) -> Gaussianity:
    """Compare codes with N(0, I): marginals, radius, correlations.

    Args:
        z: codes, (n, d), n >= 3.

    Raises:
        ValueError: for another shape, codes that are not finite, or a coordinate that is constant.
    """
    from scipy import stats

    if z.ndim != 2 or len(z) < 3 or z.shape[1] < 1:
        raise ValueError(f"z must have shape (n >= 3, d >= 1), got {tuple(z.shape)}")
    if not torch.isfinite(z).all():
        raise ValueError("z must be finite, got NaN or infinite entries")
    z = z.detach().double().cpu()
    n, d = z.shape
    if (constant := (z.std(0) == 0)).any():
        raise ValueError(f"z must vary in every coordinate, got constant ones: {constant.nonzero().ravel().tolist()}")
    marginal = [stats.kstest(column.numpy(), "norm").statistic for column in z.T]
    squared = z.square().sum(1)
    correlation = torch.corrcoef(z.T).reshape(d, d) - torch.eye(d)
    return Gaussianity(
        ks_marginal=float(sum(marginal)) / d,
        ks_radius=float(stats.kstest(squared.numpy(), "chi2", args=(d,)).statistic),
        radius_std=float(squared.std()) / math.sqrt(2 * d),
        max_correlation=float(correlation.abs().max()),
        ks_noise=1.36 / math.sqrt(n),
    )
