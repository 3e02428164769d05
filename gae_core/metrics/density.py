"""Log-densities of data, and what is missing in them, under mixtures of Gaussians and decoders with Gaussian noise."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

from gae_core.densities import GaussianMixture
from gae_core.gaussian import standard_normal_log_prob

Components = list[MultivariateNormal | LowRankMultivariateNormal]  # of a mixture, each in D dimensions and float64


@dataclass(frozen=True)
class Density:
    """Log-densities of some data.

    Attributes:
        values: in nats, (n,); exact, or estimates that are never above it on average.
        doubled: by how much all the draws have raised the estimate above that of half of them, (n,); None if exact.
    """

    values: Tensor
    doubled: Tensor | None = None


# ---- mixtures of Gaussians ---------------------------------------------------------------------------------------


def gaussian_mixture_parts(x: Tensor, weights: Tensor, components: Components) -> Tensor:
    """Logarithms of each component's weight times its density, (n, K), at x (n, D), in float64.

    They are made one at a time, for the sake of memory.
    """
    x = x.double()
    return torch.stack([w.log() + c.log_prob(x) for w, c in zip(weights.double(), components, strict=True)], 1)


def gaussian_mixture_density(x: Tensor, weights: Tensor, components: Components) -> Tensor:
    """Log-densities, (n,), of x (n, D) under a mixture of K Gaussians in float64, weights (K,)."""
    return gaussian_mixture_parts(x, weights, components).logsumexp(1)


def gaussian_mixture_fill(x: Tensor, known: Tensor, weights: Tensor, components: Components) -> Tensor:
    """Means of all entries, (n, D), given those of x (n, D) that ``known`` (D,) marks, under a mixture of Gaussians."""
    x = x[:, known].double()
    parts = [MultivariateNormal(c.mean[known], c.covariance_matrix[known][:, known]) for c in components]
    share = gaussian_mixture_parts(x, weights, parts).softmax(1)
    means = [
        c.mean + torch.cholesky_solve((x - part.mean).mT, part.scale_tril).mT @ c.covariance_matrix[known]
        for c, part in zip(components, parts, strict=True)
    ]
    return torch.einsum("nk,knd->nd", share, torch.stack(means))


def low_rank_gaussians(means: Tensor, factors: Tensor, noise: Tensor) -> Components:
    """Gaussians of means (K, D) and covariances F F' + diag noise, for factors F (K, D, q) and variances (D,)."""
    each = zip(means.double(), factors.double(), strict=True)
    return [LowRankMultivariateNormal(mean, factor, noise.double()) for mean, factor in each]


def linear_mixture(
    mu: Tensor, W: Tensor, noise: float | Tensor, codes: GaussianMixture | None = None
) -> tuple[Tensor, Components]:
    """The mixture of Gaussians that mu + W z + N(0, diag noise) is: weights (K,) and components.

    Args:
        mu: (D,).
        W: (D, d).
        noise: its variance, one for all entries or one for each, (D,).
        codes: distribution of z; None is N(0, I).
    """
    if codes is None:
        one = W.new_ones(1)
        codes = GaussianMixture(one, W.new_zeros(1, W.shape[1]), torch.eye(W.shape[1], dtype=W.dtype)[None])
    noise = torch.as_tensor(noise, dtype=W.dtype).expand(len(mu))
    return codes.weights, low_rank_gaussians(mu + codes.means @ W.T, W @ codes.factors, noise)


def linear_density(
    x: Tensor, mu: Tensor, W: Tensor, noise: float | Tensor, codes: GaussianMixture | None = None
) -> Tensor:
    """Exact log-densities (n,) of x (n, D) under :func:`linear_mixture`."""
    return gaussian_mixture_density(x, *linear_mixture(mu, W, noise, codes))


# ---- decoders with Gaussian noise --------------------------------------------------------------------------------


def _curvature(
    decode: Callable, z: Tensor, rows: tuple[Tensor, ...], sigma: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """Jacobian of g/sigma at each z, (n, D, d), and Gauss and Newton's curvature of -log p(x, z), (n, d, d)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own use of torch.jit
        J = torch.func.vmap(torch.func.jacfwd(lambda c, *r: decode(c[None], *(v[None] for v in r))[0]))(z, *rows)
    J = J / sigma[:, None]
    return J, J.mT @ J + precision


def _find(
    decode: Callable, x: Tensor, z: Tensor, rows: tuple, sigma: Tensor, mean: Tensor, precision: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Codes (n, d) of larger log p(x, z) by Gauss and Newton's steps, each shortened until it helps; and its value."""

    def value(z: Tensor) -> Tensor:
        away = z - mean
        return -0.5 * ((x - decode(z, *rows)) / sigma).square().sum(1) - 0.5 * (away @ precision * away).sum(1)

    length, best = z.new_ones(len(z), 1), value(z)
    for _ in range(steps):
        J, H = _curvature(decode, z, rows, sigma, precision)
        slope = (((x - decode(z, *rows)) / sigma)[:, None] @ J)[:, 0] - (z - mean) @ precision
        trial = z + length * torch.linalg.solve(H, slope)
        reached = value(trial)
        better = reached > best
        z, best = torch.where(better[:, None], trial, z), torch.where(better, reached, best)
        length = torch.where(better[:, None], (2 * length).clamp(max=1), length / 4)
    return z, best


def _moments(prior: GaussianMixture | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and inverse covariance (d, d) of a distribution of codes, in the kind of ``like``; None is N(0, I)."""
    d = like.shape[-1]
    if prior is None:
        return like.new_zeros(d), torch.eye(d, dtype=like.dtype)
    mean = prior.weights @ prior.means
    away = prior.means - mean
    covariance = (prior.weights[:, None, None] * (prior.factors @ prior.factors.mT)).sum(0)
    return mean.to(like), torch.linalg.inv(covariance + away.T @ (prior.weights[:, None] * away)).to(like)


def _spread(sigma: float | Tensor, x: Tensor) -> Tensor:
    """Standard deviations, (D,), of the noise on x (n, D)."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(x.shape[1])
    if not ((sigma > 0) & sigma.isfinite()).all():
        raise ValueError(f"sigma must be positive and finite, got {float(sigma.min())} to {float(sigma.max())}")
    return sigma


@torch.no_grad()
def decoder_codes(
    decode: Callable,
    x: Tensor,
    z: Tensor,
    *,
    sigma: float | Tensor,
    prior: GaussianMixture | None = None,
    rows: tuple[Tensor, ...] = (),
    steps: int = 10,
) -> tuple[Tensor, Tensor]:
    """Codes of large p(z) N(x; g(z), diag sigma²), those of a :class:`gae_core.models.gae.GAE`, by a local search.

    Its steps are Gauss and Newton's, each shortened until it helps. A mixture as prior stands for the Gaussian with its
    moments.

    Args:
        decode: g, maps codes (n, d), and ``rows``, to (n, D).
        x: data, (n, D).
        z: where the search starts, (n, d).
        sigma: standard deviation of the noise around g, one for all entries or one for each, (D,).
        prior: p(z), in float64; None is N(0, I).
        rows: what else ``decode`` takes, one row for each x: labels, for example.
        steps: of the search.

    Returns:
        Codes (n, d), and the logarithms of what is maximised, up to a constant, (n,).

    Raises:
        ValueError: if ``sigma`` is not positive, or z has not a row for each x.
    """
    if len(z) != len(x):
        raise ValueError(f"z must have a row for each row of x, got {len(z)} and {len(x)}")
    sigma, moments = _spread(sigma, x), _moments(prior, z)
    batches = zip(*(v.split(400) for v in (x, z, *rows)), strict=True)
    parts = [_find(decode, some, start, tuple(beside), sigma, *moments, steps) for some, start, *beside in batches]
    return torch.cat([codes for codes, _ in parts]), torch.cat([values for _, values in parts])


@torch.no_grad()
def decoder_density(
    decode: Callable,
    x: Tensor,
    z: Tensor,
    *,
    sigma: float | Tensor,
    prior: GaussianMixture | None = None,
    rows: tuple[Tensor, ...] = (),
    draws: int = 200,
    steps: int = 10,
    generator: Generator | None = None,
) -> Density:
    r"""Importance-weighted estimates of :math:`\log\int p(z)\,N(x; g(z), \mathrm{diag}\,\sigma^2)\,dz`.

    .. math:: \log\frac1S\sum_{s=1}^S \frac{p(z_s)\,N(x; g(z_s), \mathrm{diag}\,\sigma^2)}{r(z_s)}, \qquad z_s \sim r

    Implements ``def-family-importance``; on average never above the integral's logarithm. The proposal r is a Gaussian
    for each x: its mean is found from the code z by :func:`decoder_codes`, its precision is the curvature there. For a
    linear decoder and a Gaussian prior it is the posterior, and the result exact for any S. No encoder takes part
    beyond the place where the search starts. Networks may count in float32; weights are put together in float64.

    Args:
        decode: g, maps codes (n, d), and ``rows``, to (n, D).
        x: data, (n, D).
        z: where the search starts, (n, d).
        sigma: standard deviation of the noise around g, one for all entries or one for each, (D,).
        prior: p(z), in float64; None is N(0, I).
        rows: what else ``decode`` takes, one row for each x: labels, for example.
        draws: S.
        steps: of the search.
        generator: of the noise.

    Returns:
        Estimates in nats, and by how much S draws raise them above S/2 (None for S = 1).

    Raises:
        ValueError: if there are no draws, ``sigma`` is not positive, or z has not a row for each x.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    best, _ = decoder_codes(decode, x, z, sigma=sigma, prior=prior, rows=rows, steps=steps)
    sigma, (_, precision) = _spread(sigma, x), _moments(prior, z)
    log_prior = standard_normal_log_prob if prior is None else prior.log_prob
    weights = []
    for some, mean, *beside in zip(*(v.split(max(1, 20_000 // draws)) for v in (x, best, *rows)), strict=True):
        _, H = _curvature(decode, mean, tuple(beside), sigma, precision)
        factor = torch.linalg.cholesky(H.double())
        eps = torch.randn(len(mean), draws, z.shape[1], generator=generator, dtype=torch.float64)
        code = mean[:, None] + torch.linalg.solve_triangular(factor.mT, eps.mT, upper=True).mT
        flat = code.flatten(0, 1)
        images = decode(flat.to(z), *(v.repeat_interleave(draws, 0) for v in beside)).unflatten(0, eps.shape[:2])
        log_p = standard_normal_log_prob((some[:, None] - images) / sigma).double() - sigma.log().sum()
        log_r = standard_normal_log_prob(eps) + factor.diagonal(dim1=1, dim2=2).log().sum(1)[:, None]
        weights.append(log_prior(flat).view_as(log_p) + log_p - log_r)
    weights = torch.cat(weights)
    values = weights.logsumexp(1) - math.log(draws)
    if draws < 2:
        return Density(values)
    half = draws // 2
    parts = [weights[:, :half], weights[:, half : 2 * half]]
    return Density(values, values - torch.stack([w.logsumexp(1) - math.log(half) for w in parts]).mean(0))


@torch.no_grad()
def decoder_fill(
    decode: Callable,
    x: Tensor,
    known: Tensor,
    z: Tensor,
    *,
    sigma: float | Tensor,
    prior: GaussianMixture | None = None,
    rows: tuple[Tensor, ...] = (),
    steps: int = 10,
) -> Tensor:
    """Images g(z), (n, D), of the likeliest code given the entries of x (n, D) that ``known`` (D,) marks.

    That is the code of a :class:`gae_core.models.gae.GAE` for an image of which only these are known. Searches begin at
    several codes for each x, z (n, K, d), for half of an image may be that of different ones; the best is taken. The
    rest is as for :func:`decoder_codes`.
    """
    k, starts = z.shape[1], z.flatten(0, 1)
    rows = tuple(v.repeat_interleave(k, 0) for v in rows)
    codes, values = decoder_codes(
        lambda z, *rows: decode(z, *rows)[:, known],
        x[:, known].repeat_interleave(k, 0),
        starts,
        sigma=_spread(sigma, x)[known],
        prior=prior,
        rows=rows,
        steps=steps,
    )
    best = torch.arange(len(x)) * k + values.view(-1, k).argmax(1)
    return decode(codes[best], *(v[best] for v in rows))
