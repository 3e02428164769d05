"""Bounds of mutual information, by a decoder or by a critic, and what they are measured against. Everything is in nats.

Derived in the chapter *Mutual information*. The file needs torch alone: copy it as it is. A critic is any function
T(x, z) with one score a pair; its scores on the pairs of the data are called ``joint`` here, those on pairs of x with
the z of another row ``marginal``. Terms are per sample: their mean is the bound, which the critic is trained to raise.
"""

import math
from numbers import Integral

import torch
from torch import Generator, Tensor
from torch.nn import functional


def gaussian_information(cov: Tensor, dim_x: int) -> Tensor:
    r"""Mutual information of the two parts of a Gaussian vector (x, z).

    .. math:: I(x;z) = \tfrac12\log\frac{\det\Sigma_{xx}\,\det\Sigma_{zz}}{\det\Sigma}

    Implements ``eq-mutual_information-gaussian``.

    Args:
        cov: covariance of (x, z), shape (..., d, d), symmetric and positive definite.
        dim_x: how many of the d coordinates are x; they come first.

    Returns:
        Information in nats, shape (...).

    Raises:
        ValueError: if ``cov`` is no such matrix, or ``dim_x`` leaves x or z without a coordinate. A singular ``cov``
            has no density: where x is a function of z the information is infinite.
    """
    if cov.dtype not in (torch.float32, torch.float64) or cov.ndim < 2 or cov.shape[-1] != cov.shape[-2]:
        raise ValueError(f"cov must be float32 or float64 of shape (..., d, d), got {cov.dtype} {tuple(cov.shape)}")
    if not isinstance(dim_x, Integral) or not 1 <= dim_x < cov.shape[-1]:
        raise ValueError(f"dim_x must be a whole number between 1 and d - 1 = {cov.shape[-1] - 1}, got {dim_x}")
    if not torch.isfinite(cov).all():
        raise ValueError("cov must be finite, got NaN or infinite entries")
    if not torch.allclose(cov, cov.mT, rtol=1e-4, atol=1e-4 * float(cov.detach().abs().max())):
        raise ValueError("cov must be symmetric; use (cov + cov.mT) / 2 if the difference is rounding")
    log_det = []
    for block in (cov[..., :dim_x, :dim_x], cov[..., dim_x:, dim_x:], cov):
        factor, info = torch.linalg.cholesky_ex(block)
        if info.any():
            raise ValueError("cov must be positive definite; give a deterministic x the noise that the model has")
        log_det.append(2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))
    return 0.5 * (log_det[0] + log_det[1] - log_det[2])


def reconstruction_terms(
    z: Tensor, z_hat: Tensor, sigma: float | Tensor | None = None, *, entropy: float | None = None
) -> Tensor:
    r"""Terms of the lower bound of I(x; z) by a Gaussian that reconstructs z from x (Barber and Agakov, 2003).

    .. math:: H(z) - \sum_j\log\sigma_j - \tfrac d2\log 2\pi - \sum_j\frac{(z_j - \hat z_j)^2}{2\sigma_j^2}

    Implements ``eq-mutual_information-decoder``. The mean is a lower bound whatever the reconstruction and sigma. With
    the sigma that is best for the batch it is slightly too high, because it has seen the batch.

    Args:
        z: codes, (n, d).
        z_hat: their reconstructions from x, (n, d).
        sigma: standard deviation of z around z_hat: a number, or one for each coordinate, (d,). None takes the root
            mean squared error of each coordinate in this batch, the best there is (``eq-mutual_information-best``);
            one best value for all coordinates is ``(z - z_hat).square().mean().sqrt()``.
        entropy: H(z) in nats; None stands for that of N(0, I). It is a constant, but without it there is no bound.

    Returns:
        Terms in nats, (n,), differentiable in ``z_hat`` and sigma.

    Raises:
        ValueError: for shapes that do not fit, codes, reconstructions or an entropy that are not finite, a sigma that
            is not positive and finite, or reconstructions without error where sigma is None: then the bound is
            infinite.
    """
    if z.ndim != 2 or z.shape != z_hat.shape or 0 in z.shape:
        raise ValueError(f"z and z_hat must have one shape (n, d), got {tuple(z.shape)} and {tuple(z_hat.shape)}")
    for name, codes in (("z", z), ("z_hat", z_hat)):
        if not codes.is_floating_point() or not torch.isfinite(codes).all():
            raise ValueError(f"{name} must be floating point and finite, got {codes.dtype}, or NaN or infinite entries")
    if entropy is not None and not math.isfinite(entropy):
        raise ValueError(f"entropy must be finite, got {entropy}")
    d = z.shape[1]
    square = (z - z_hat).square()
    if sigma is None:
        sigma = square.mean(0).sqrt()
        if not (sigma > 0).all():
            raise ValueError("z_hat must not equal z in a whole coordinate where sigma is None: its best value is 0")
    sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
    if sigma.ndim and sigma.shape != (d,):
        raise ValueError(f"sigma must be a number or of shape ({d},), got shape {tuple(sigma.shape)}")
    if not ((sigma > 0) & torch.isfinite(sigma)).all():
        raise ValueError(f"sigma must be positive and finite, got {sigma.tolist()}")
    if entropy is None:
        entropy = 0.5 * d * math.log(2 * math.pi * math.e)
    log_density = -0.5 * square / sigma.square() - sigma.log() - 0.5 * math.log(2 * math.pi)
    return entropy + log_density.sum(1)


def jsd_terms(joint: Tensor, marginal: Tensor) -> Tensor:
    r"""Terms of the Jensen-Shannon objective, with which Deep InfoMax and MEG train their critic.

    .. math:: \log\sigma(T) + \log\sigma(-T'),

    where T is a score of a pair and T' that of x with another z. Implements ``def-mutual_information-jsd``: the mean is
    at most 2 JSD - log 4 (``eq-mutual_information-jsd``), a number in [-log 4, 0], and no estimate of I(x; z). That of
    a bad critic has no lower limit. It is minus twice the binary cross entropy of telling the pairs apart.

    Args:
        joint: scores of the pairs (x_i, z_i), (n,).
        marginal: scores of x_i with other z, (n,) or (n, m) for m of them.

    Returns:
        Terms in nats, (n,).

    Raises:
        ValueError: for other shapes, or scores that are not finite.
    """
    marginal = _check_scores(joint, marginal)
    return functional.logsigmoid(joint) + functional.logsigmoid(-marginal).mean(1)


def dv_terms(joint: Tensor, marginal: Tensor) -> Tensor:
    r"""Terms of the bound of Donsker and Varadhan, the objective of MINE.

    .. math:: T_i - \log\,\mathrm{mean}\; e^{T'}

    Implements ``eq-mutual_information-dv``. The logarithm is of the mean over all of ``marginal``: on a batch the
    result is too high on average (``eq-mutual_information-dv-bias``), and may exceed I(x; z).

    Args:
        joint: scores of the pairs (x_i, z_i), (n,).
        marginal: scores of x_i with other z, (n,) or (n, m) for m of them.

    Returns:
        Terms in nats, (n,).

    Raises:
        ValueError: for other shapes, or scores that are not finite.
    """
    marginal = _check_scores(joint, marginal)
    return joint - marginal.logsumexp((0, 1)) + math.log(marginal.numel())


def nwj_terms(joint: Tensor, marginal: Tensor) -> Tensor:
    r"""Terms of the bound of Nguyen, Wainwright and Jordan, which is unbiased on every batch.

    .. math:: T_i - e^{T'_i - 1}

    Implements ``eq-mutual_information-nwj``. The variance grows like exp(I) (``eq-mutual_information-variance``).

    Args:
        joint: scores of the pairs (x_i, z_i), (n,). The best are 1 + log of the ratio of densities.
        marginal: scores of x_i with other z, (n,) or (n, m) for m of them.

    Returns:
        Terms in nats, (n,).

    Raises:
        ValueError: for other shapes, scores that are not finite, or scores so large that their exponential is not.
    """
    marginal = _check_scores(joint, marginal)
    terms = joint - (marginal - 1).exp().mean(1)
    if not torch.isfinite(terms).all():
        raise ValueError(f"marginal must have scores whose exponential is finite, got up to {float(marginal.max()):g}")
    return terms


def info_nce_terms(scores: Tensor) -> Tensor:
    r"""Terms of the InfoNCE bound: how well the z of a row is found among those of the batch.

    .. math:: \log\frac{e^{T(x_i, z_i)}}{\frac1n\sum_j e^{T(x_i, z_j)}}

    Implements ``eq-mutual_information-nce``. The mean is at most log n, and on average at most I(x; z).

    Args:
        scores: (n, n), row i and column j has the score of x_i with z_j; the pairs are on the diagonal.

    Returns:
        Terms in nats, (n,).

    Raises:
        ValueError: if ``scores`` is not square with n >= 2, or not floating point and finite.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        raise ValueError(f"scores must have shape (n, n) with n >= 2, got {tuple(scores.shape)}")
    if not scores.is_floating_point() or not torch.isfinite(scores).all():
        raise ValueError(f"scores must be floating point and finite, got {scores.dtype}, or NaN or infinite entries")
    return scores.diagonal() - scores.logsumexp(1) + math.log(len(scores))


def permute_rows(z: Tensor, *, generator: Generator | None = None) -> Tensor:
    """The rows of z in another order, at random among those that form one cycle: no row stays where it was.

    So a row of x beside a row of the result is a pair from p(x) p(z). A permutation drawn among all of them leaves
    one row in place on average: one pair in n is of the joint distribution (``eq-mutual_information-permutation``).

    Args:
        z: codes, (n >= 2, ...).
        generator: source of the order, on any device.

    Raises:
        ValueError: if there are fewer than 2 rows.
    """
    if z.ndim < 1 or len(z) < 2:
        raise ValueError(f"z must have at least 2 rows to exchange, got shape {tuple(z.shape)}")
    device = z.device if generator is None else generator.device
    order = torch.randperm(len(z), generator=generator, device=device).to(z.device)
    source = torch.empty_like(order)
    source[order] = order.roll(1)
    return z[source]


def _check_scores(joint: Tensor, marginal: Tensor) -> Tensor:
    """``marginal`` with shape (n, m) for ``joint`` of shape (n,), or a ValueError."""
    if joint.ndim != 1 or marginal.ndim not in (1, 2) or len(joint) != len(marginal) or marginal.numel() == 0:
        raise ValueError(
            f"joint must have shape (n,), marginal (n,) or (n, m), got {tuple(joint.shape)} and {tuple(marginal.shape)}"
        )
    for name, scores in (("joint", joint), ("marginal", marginal)):
        if not scores.is_floating_point() or not torch.isfinite(scores).all():
            raise ValueError(f"{name} must be floating point and finite, got {scores.dtype}, or NaN or infinite scores")
    return marginal.reshape(len(joint), -1)
