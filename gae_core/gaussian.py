"""Closed forms for Gaussians. Everything is in nats.

Derived in the chapter *Maximum entropy*.
"""

import math

import torch
from torch import Tensor


def gaussian_entropy(cov: Tensor) -> Tensor:
    r"""Differential entropy of a Gaussian, :math:`\tfrac12\log\det(2\pi e\,\Sigma)`.

    Implements ``eq-max_entropy-gaussian-d``.

    Args:
        cov: covariance :math:`\Sigma`, shape (..., d, d), symmetric and positive definite. Half precision is widened
            to float32.

    Returns:
        Entropy in nats, shape (...).

    Raises:
        ValueError: if ``cov`` is no floating-point stack of square, symmetric, positive definite matrices.
    """
    if not isinstance(cov, Tensor):
        raise ValueError(f"cov must be a tensor, got {type(cov).__name__}: torch.as_tensor(cov) makes one")
    if not cov.is_floating_point() or cov.ndim < 2 or cov.shape[-1] != cov.shape[-2] or not cov.numel():
        raise ValueError(
            f"cov must be a floating-point tensor of shape (..., d, d), got {cov.dtype} {tuple(cov.shape)}"
        )
    cov = _widened(cov)
    if not torch.isfinite(cov).all():
        raise ValueError("cov must be finite, got NaN or infinite entries")
    if not torch.allclose(cov, cov.mT, rtol=1e-4, atol=1e-4 * float(cov.detach().abs().max())):
        raise ValueError("cov must be symmetric; use (cov + cov.mT) / 2 if the difference is rounding")
    factor, info = torch.linalg.cholesky_ex(cov)
    if info.any():
        raise ValueError(
            "cov must be positive definite, got a singular or indefinite matrix; a density on a subspace has "
            "entropy -inf: drop the dependent coordinates or add the noise that the model has"
        )
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return half_log_det + 0.5 * cov.shape[-1] * math.log(2 * math.pi * math.e)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    r"""Log-density of N(0, I), :math:`-\tfrac12\|z\|^2 - \tfrac d2\log 2\pi`.

    Args:
        z: points, shape (..., d). Half precision is widened to float32.

    Returns:
        Log-density in nats, shape (...). NaN where z has one: it stands in training steps, whose loop stops on that.
    """
    z = _widened(z)
    return -0.5 * (z * z).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def kl_to_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    r"""KL divergence of N(mu, diag exp(logvar)) from N(0, I), one value per sample.

    .. math:: \tfrac12\sum_j \left(\mu_j^2 + \sigma_j^2 - \log\sigma_j^2 - 1\right)

    Implements ``eq-vae-kl``, a case of ``eq-max_entropy-gaussian-kl``. With ``expm1``, so that near ``logvar = 0``,
    where the terms cancel, the rounding error is that of ``logvar``, not of 1.

    Args:
        mu: means, shape (..., d).
        logvar: logarithms of the variances :math:`\sigma_j^2`, same shape. Half precision is widened to float32.

    Returns:
        Divergence in nats, shape (...). Sum or average over samples is the caller's. It is infinite where the variance
        is, for a logvar from 89 on in float32 and from 710 on in float64, or zero; and NaN where an argument is NaN.
        This stands inside training steps, whose loop stops on either.

    Raises:
        ValueError: if the shapes differ.
    """
    if mu.shape != logvar.shape:
        raise ValueError(f"mu and logvar must have the same shape, got {tuple(mu.shape)} and {tuple(logvar.shape)}")
    mu, logvar = _widened(mu), _widened(logvar)
    return 0.5 * (mu * mu + torch.expm1(logvar) - logvar).sum(-1)


def _widened(x: Tensor) -> Tensor:
    """The same numbers in float32, if their precision is lower: there squares overflow from 256 on."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
