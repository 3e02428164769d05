"""Entropy from nearest neighbours (Kozachenko and Leonenko, 1987), differentiable, on any device, in nats.

Derived in the chapter *Entropy from nearest neighbours*. The file needs torch alone: copy it as it is.
"""

import math
import numbers

import torch
from torch import Tensor


def log_unit_ball_volume(d: int, p: float = 2.0) -> float:
    r"""Logarithm of the volume of the unit ball of the p-norm in d dimensions.

    .. math:: \log V_d(p) = d\log\bigl(2\,\Gamma(1+\tfrac1p)\bigr) - \log\Gamma(1+\tfrac dp)

    Implements ``eq-knn_entropy-ball``; in logarithms, because :math:`V_{128}(2)` is already near 5e-58.

    Args:
        d: dimension, at least 1.
        p: norm, at least 1; ``math.inf`` for the largest coordinate.

    Raises:
        ValueError: if ``d < 1`` or ``p < 1``.
    """
    if not d >= 1:
        raise ValueError(f"d must be at least 1, got {d}")
    if not p >= 1:
        raise ValueError(f"p must be at least 1 (below it is no norm) or math.inf, got {p}")
    return d * (math.log(2) + math.lgamma(1 + 1 / p)) - math.lgamma(1 + d / p)


def knn_local_entropy(
    x: Tensor, k: int = 1, *, p: float = 2.0, duplicates: str = "raise", chunk_size: int = 1024
) -> Tensor:
    r"""Estimates of :math:`-\log f(x_i)` at every point of a sample; their mean is the entropy estimate.

    .. math:: \hat h_i = \psi(n) - \psi(k) + \log V_d(p) + d\log\varepsilon_k(i)

    Implements ``eq-knn_entropy-local``, where :math:`\varepsilon_k(i)` is the distance of point i to its k-th
    neighbour. The neighbours are searched without gradient, then their distances are recomputed with it: the
    gradient is exact wherever the neighbours do not change, and sums to zero over the points.

    Args:
        x: sample, one point a row, shape (n, d), float32 or float64 (half precision is widened to float32).
        k: which neighbour, 1 <= k < n. The variance falls and the bias grows with k.
        p: norm of the distances, 1 <= p <= math.inf.
        duplicates: what to do when points coincide, for which the estimate is minus infinity (k = 1):
            "raise", or "clamp" the distance at the rounding error of the data's largest coordinate, where the
            value is finite and the gradient zero.
        chunk_size: rows of the distance matrix held at once; memory is chunk_size * n.

    Returns:
        Values in nats, shape (n,), differentiable in ``x``.

    Raises:
        ValueError: for an ``x`` that is not (n, d), not floating or not finite, ``k`` outside 1 <= k < n,
            ``p < 1``, coinciding points (unless clamped), or an unknown ``duplicates``.

    Note:
        The bias vanishes with growing n, ever more slowly as d grows: at n = 100 it is about +0.9 nats for a
        standard normal in 16 dimensions. See the chapter before taking the value for an entropy.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a tensor, got {type(x).__name__}: torch.as_tensor(x) makes one")
    if x.ndim != 2:
        raise ValueError(f"x must have shape (n, d), got {tuple(x.shape)}; a 1-D sample is x[:, None]")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}; convert with x.double()")
    n, d = x.shape
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or not 1 <= k < n:
        raise ValueError(f"k must be an integer with 1 <= k < n, got k={k} for n={n} points")
    if not isinstance(chunk_size, numbers.Integral) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size}")
    if duplicates not in ("raise", "clamp"):
        raise ValueError(f'duplicates must be "raise" or "clamp", got {duplicates!r}')
    log_volume = log_unit_ball_volume(d, p)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest, limits = float(x.detach().abs().max()), torch.finfo(x.dtype)
    if not math.isfinite(largest):
        raise ValueError("x must be finite, got NaN or infinite entries")
    # Where squares of differences would overflow or underflow, the sample is scaled by a power of two, which is exact.
    powers = 0
    if largest > 0 and not limits.tiny**0.25 < largest < limits.max**0.25:
        bits = -round(math.log2(limits.tiny))
        powers = min(max(math.frexp(largest)[1], 8 - bits), bits - 8)
        x = x * 2.0**-powers

    neighbour, coincides = _neighbours(x.detach(), k, p, chunk_size)
    if duplicates == "raise" and coincides.any():
        raise ValueError(
            f"x has {int(coincides.sum())} of {n} points that coincide with another: no density has those. "
            'Remove the copies, add the noise that the data have, or pass duplicates="clamp"'
        )
    difference = x - x[neighbour]  # (n, d)
    # The largest coordinate is divided out, so that squares neither overflow nor underflow.
    scale = difference.detach().abs().amax(-1)  # (n,)
    if duplicates == "clamp":
        scale = scale.clamp_min(max(limits.eps * float(x.detach().abs().max()), limits.tiny))
    # The norm that is left is 1 or more, except where points coincide: there it is set to 1.
    unit = torch.linalg.vector_norm(difference / scale[:, None], ord=p, dim=-1).clamp_min(1.0)
    log_distance = scale.log() + unit.log()
    psi_n, psi_k = torch.special.digamma(torch.tensor([n, k], dtype=torch.float64)).tolist()
    return psi_n - psi_k + log_volume + d * (log_distance + powers * math.log(2) if powers else log_distance)


def knn_entropy(x: Tensor, k: int = 1, *, p: float = 2.0, duplicates: str = "raise", chunk_size: int = 1024) -> Tensor:
    r"""Nearest-neighbour estimate of the differential entropy of the density that ``x`` was drawn from.

    .. math:: \hat H = \psi(n) - \psi(k) + \log V_d(p) + \frac dn \sum_{i=1}^n \log\varepsilon_k(i)

    Implements ``eq-knn_entropy-estimator``: the mean of :func:`knn_local_entropy`, which documents the
    arguments, the errors and the gradient.

    Returns:
        Scalar in nats, differentiable in ``x``.
    """
    return knn_local_entropy(x, k, p=p, duplicates=duplicates, chunk_size=chunk_size).mean()


def knn_entropy_bound(n: int, d: int) -> float:
    r"""Largest value of the 1-nearest-neighbour estimate on a batch with mean 0 and variances 1 (2-norm).

    .. math:: \psi(n) - \psi(1) + \log V_d(2) + \frac d2 \log\frac{2nd}{n-1}

    Implements ``eq-knn_entropy-bound``. A regular simplex reaches it, which exists for n <= d + 1; there it
    lies above the entropy of N(0, I), although no density with these variances has more.

    Args:
        n: points in the batch, at least 2.
        d: dimension, at least 1.

    Returns:
        Bound in nats.

    Raises:
        ValueError: if ``n < 2`` or ``d < 1``.
    """
    if not n >= 2:
        raise ValueError(f"n must be at least 2, got {n}: one point has no neighbour")
    psi_n, psi_1 = torch.special.digamma(torch.tensor([n, 1], dtype=torch.float64)).tolist()
    return psi_n - psi_1 + log_unit_ball_volume(d) + 0.5 * d * math.log(2 * n * d / (n - 1))


@torch.no_grad()
def _neighbours(x: Tensor, k: int, p: float, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Index of each point's k-th neighbour, and whether its first one is at distance zero; each (n,)."""
    neighbour, coincides = [], []
    for start in range(0, len(x), chunk_size):
        rows = x[start : start + chunk_size]
        # Differences, not the matrix product: that one loses all digits where |x| is large against distances.
        distance = torch.cdist(rows, x, p=p, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(rows), device=x.device)
        distance[own, start + own] = math.inf
        nearest, index = distance.topk(k, largest=False)
        neighbour.append(index[:, -1])
        coincides.append(nearest[:, 0] == 0)
    return torch.cat(neighbour), torch.cat(coincides)
