"""Measures of codes: of their distribution, of their neighbourhoods, and of what they tell of the data."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gae_core.data import to_unit
from gae_core.gaussian import kl_to_standard_normal


def trustworthiness(x: Tensor, z: Tensor, k: int = 12) -> float:
    r"""How far the nearest neighbours of the codes are neighbours of the data, in [0, 1]; near 1/2 by chance.

    .. math:: 1 - \frac{2}{n k (2n - 3k - 1)} \sum_i \sum_{j \in N_k(z_i)} \max(0, r_i(j) - k)

    Implements ``def-family-trustworthiness``: r_i(j) is the rank of x_j among the neighbours of x_i. Only
    the order of distances counts, so the codes' scale does not matter. Where codes are equal the order is arbitrary: a
    code of a few symbols has no trustworthiness.

    Source: Venna and Kaski, *Neighborhood preservation in nonlinear projection methods*, ICANN 2001.

    Args:
        x: data, (n, ...).
        z: their codes, (n, d).
        k: neighbours, below n / 2.

    Raises:
        ValueError: if the rows differ in number, are not finite, or are too few for k.
    """
    from sklearn.manifold import trustworthiness as measured

    if len(x) != len(z) or k != int(k) or not 1 <= k < len(x) / 2:
        raise ValueError(
            f"z must have one row for each x, and k be a whole number from 1 to n / 2, "
            f"got {len(z)} and {len(x)} rows, k={k}"
        )
    if z.ndim != 2:
        raise ValueError(f"z must have shape (n, d), got {tuple(z.shape)}; codes of one dimension are z[:, None]")
    if not (torch.isfinite(x).all() and torch.isfinite(z).all()):
        raise ValueError("x and z must be finite, got NaN or infinite entries")
    return float(measured(*(to_unit(v).flatten(1).double().cpu().numpy() for v in (x, z)), n_neighbors=k))


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


def active_units(mu: Tensor, *, threshold: float = 0.01) -> int:
    r"""Number of coordinates j with :math:`\operatorname{Var}_x \mathrm{E}_q[z_j|x] \ge` threshold (Burda et al.).

    It says that the code's mean moves, not that the code carries information, nor that the decoder uses it: batch norm
    of the means makes every unit active, whatever their noise. Report :func:`encoder_information` beside it.

    Args:
        mu: means of q(z | x) for each x, (n >= 2, d).
        threshold: smallest variance of an active unit; 0.01 in the literature.

    Raises:
        ValueError: for another shape, means that are not finite, or a threshold that is no number of at least 0.
    """
    _check_codes("mu", mu)
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be a number of at least 0, got {threshold}")
    return int((mu.detach().double().var(0) >= threshold).sum())


@dataclass(frozen=True)
class EncoderInformation:
    """How the divergence in a VAE's loss splits: kl = mutual_information + kl_aggregate, ``eq-vae-split``.

    Attributes:
        kl: mean of KL(q(z | x) || p(z)) over the data, in closed form unless given.
        mutual_information: I(x; z) under q, by one or more z for each x.
        kl_aggregate: KL(q(z) || p(z)) of the aggregate posterior q(z), the mean of q(z | x) over the data.
        cap: ln N, which ``mutual_information`` cannot exceed. A value near it says "at least", and ``kl_aggregate``
            "at most", for new data of the same kind.
    """

    kl: float
    mutual_information: float
    kl_aggregate: float
    cap: float


@torch.no_grad()
def encoder_information(
    mu: Tensor,
    logvar: Tensor,
    *,
    kl: Tensor | None = None,
    samples: int = 1,
    chunk_size: int = 1000,
    generator: Generator | None = None,
) -> EncoderInformation:
    r"""Mutual information of data and code, and divergence of the aggregate posterior from the prior.

    .. math:: \hat I = \frac1N \sum_n \log\frac{q(z_n|x_n)}{\frac1N\sum_m q(z_n|x_m)}, \qquad z_n \sim q(z|x_n)

    The mixture runs over all N rows. Give it the whole data set: the estimate is at most ln N, and averages over
    batches of 32, as some published figures are, at most ln 32 = 3.47. Its expectation is the information on which of
    the N rows was encoded, which on average over data sets is at most I(x; z). That is not negative, but the estimate
    can be, slightly, where it is near 0.

    Args:
        mu: means of q(z | x) for each x, (N >= 2, d).
        logvar: logarithms of the variances, (N, d).
        kl: divergence of each q(z | x) from a prior other than N(0, I), (N,), such as a model's loss has.
        samples: z drawn for each x.
        chunk_size: rows of the N x N matrix at a time.
        generator: source of the noise, on any device.

    Raises:
        ValueError: for shapes that do not fit, entries that are not finite, or a number below 1.
    """
    _check_codes("mu", mu)
    _check_codes("logvar", logvar)
    if mu.shape != logvar.shape or samples < 1 or chunk_size < 1:
        raise ValueError(
            f"logvar must have the shape of mu, samples and chunk_size be at least 1, "
            f"got {tuple(logvar.shape)} for {tuple(mu.shape)}, samples={samples}, chunk_size={chunk_size}"
        )
    if logvar.abs().max() > 600:
        raise ValueError(
            f"logvar must be in [-600, 600], where its exponentials are finite, got {float(logvar.min()):g} to "
            f"{float(logvar.max()):g}: such a posterior is a point, or none"
        )
    if kl is not None and (kl.shape != mu.shape[:1] or not kl.isfinite().all()):
        wrong = int((~kl.isfinite()).sum())
        raise ValueError(f"kl must be finite, of shape ({len(mu)},), got shape {tuple(kl.shape)}, {wrong} not finite")
    mu, logvar = mu.double(), logvar.double()
    n, d = mu.shape
    precision = (-logvar).exp()
    natural = torch.cat([mu * precision, -0.5 * precision], 1)  # of the Gaussians, for z and its square
    log_norm = -0.5 * (logvar.sum(1) + d * math.log(2 * math.pi) + (mu.square() * precision).sum(1))  # (N,)
    own = torch.arange(n, device=mu.device)
    device = mu.device if generator is None else generator.device
    gains = []
    for _ in range(samples):
        eps = torch.randn(n, d, generator=generator, device=device, dtype=torch.float64).to(mu.device)
        z = mu + (0.5 * logvar).exp() * eps
        for rows, points in zip(own.split(chunk_size), z.split(chunk_size), strict=True):
            log_q = torch.addmm(log_norm, torch.cat([points, points.square()], 1), natural.T)  # (chunk, N)
            gains.append(log_q.gather(1, rows[:, None])[:, 0] - log_q.logsumexp(1) + math.log(n))
    kl = float((kl_to_standard_normal(mu, logvar) if kl is None else kl.double()).mean())
    information = float(torch.cat(gains).mean())
    return EncoderInformation(kl, information, kl_aggregate=kl - information, cap=math.log(n))


def _check_codes(name: str, value: Tensor) -> None:
    """Raise a ValueError unless ``value`` is finite, of shape (n >= 2, d >= 1)."""
    if value.ndim != 2 or len(value) < 2 or value.shape[1] < 1:
        raise ValueError(f"{name} must have shape (n >= 2, d >= 1), got {tuple(value.shape)}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
