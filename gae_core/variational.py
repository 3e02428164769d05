"""Measures of a variational model: its likelihood, and what its encoder's distribution q(z | x) carries. In nats."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core.data import to_unit
from gae_core.gaussian import kl_to_standard_normal


@torch.no_grad()
def importance_weighted_nll(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    samples: int = 500,
    proposal: str = "posterior",
    chunk_size: int = 5000,
    generator: Generator | None = None,
) -> Tensor:
    r"""Estimate -log p(x) of each x from importance-weighted samples of the encoder (Burda et al., ICLR 2016).

    .. math:: -\log\frac1S\sum_{s=1}^S \frac{p(x|z_s)\,p(z_s)}{q(z_s|x)}, \qquad z_s \sim q(z|x)

    Implements ``def-vae-iw``. Its expectation is at least -log p(x) and falls to it as S grows, with an excess in 1 / S
    (``eq-vae-iw-gap``): quote S with the figure. With S = 1 it estimates
    the negative evidence lower bound. Where q(z | x) is the posterior it is exact for any S. A q narrower than the
    posterior makes it fall slowly, and nothing in the figure tells. For beta other than 1 this is still -log p(x).

    With y it is -log p(x | y) of a conditional model, with q(z | x, y) and p(z | y). With the prior as proposal the
    weights are p(x | z, y) alone, at z from p(z | y), which is plain Monte Carlo. It has the same limit, but weights
    that are nearly all negligible: at equal S it lies above, by tens of nats where z decides much
    (``eq-cvae-prior-excess``).

    Args:
        model: has ``dim`` and ``log_weights(x, eps)``, see :meth:`gae_core.models.vae.VAE.log_weights`, or
            ``log_weights(x, eps, y)``, see :meth:`gae_core.models.cvae.CVAE.log_weights`; in evaluation mode.
        x: data, (n, ...), bytes or floats.
        y: condition of each x, (n, ...), for a conditional model alone.
        samples: S.
        proposal: "posterior", or "prior" for a conditional model.
        chunk_size: pairs (x, z) decoded at a time. The result does not depend on it, but for rounding.
        generator: source of the noise, on any device.

    Returns:
        Estimates in nats, (n,), float64, on the device of ``x``. Their mean is the figure of the literature.

    Raises:
        ValueError: if there is no x, ``samples`` or ``chunk_size`` is below 1, y has not a row for each x, the model
            refuses one of them, or an estimate is not finite.
    """
    if min(len(x), samples, chunk_size) < 1:
        raise ValueError(
            f"x must have rows, samples and chunk_size must be at least 1, "
            f"got {len(x)} rows, samples={samples}, chunk_size={chunk_size}"
        )
    if y is not None and len(y) != len(x):
        raise ValueError(f"y must have one row for each row of x, got {len(y)} and {len(x)}")
    parameter = next(model.parameters())
    source = parameter.device if generator is None else generator.device
    dtype = x.dtype if x.is_floating_point() else parameter.dtype  # tokens have no noise of their own kind
    options = {} if proposal == "posterior" else {"proposal": proposal}
    size = max(1, chunk_size // samples)
    conditions = itertools.repeat(()) if y is None else ((part,) for part in y.to(parameter.device).split(size))
    result = []
    for rows, condition in zip(x.split(size), conditions, strict=False):
        rows = to_unit(rows.to(parameter.device))
        # One draw for each x, so that its noise does not depend on the chunks.
        eps = [torch.randn(samples, model.dim, generator=generator, device=source, dtype=dtype) for _ in rows]
        total = rows.new_full((len(rows),), -math.inf, dtype=torch.float64)
        for part in torch.stack(eps).to(parameter.device).split(chunk_size, dim=1):
            total = torch.logaddexp(total, model.log_weights(rows, part, *condition, **options).double().logsumexp(1))
        result.append((math.log(samples) - total).to(x.device))
    nll = torch.cat(result)
    if not torch.isfinite(nll).all():
        raise ValueError(f"model must give finite weights, it does not for {int((~nll.isfinite()).sum())} rows of x")
    return nll


def active_units(mu: Tensor, *, threshold: float = 0.01) -> int:
    r"""Number of coordinates j with :math:`\operatorname{Var}_x \mathrm{E}_q[z_j|x] \ge` threshold (Burda et al.).

    It says that the code's mean moves, not that the code carries information, nor that the decoder uses it: batch norm
    of the means makes every unit active, whatever their noise. Report :func:`encoder_information` beside it.

    Args:
        mu: means of q(z | x) for each x, (n >= 2, d).
        threshold: smallest variance of an active unit; 0.01 in the literature.

    Raises:
        ValueError: for another shape, or means that are not finite.
    """
    _check_codes("mu", mu)
    return int((mu.detach().double().var(0) >= threshold).sum())


@dataclass(frozen=True)
class EncoderInformation:
    """How the divergence in a VAE's loss splits: kl = mutual_information + kl_aggregate, ``eq-vae-split``.

    Attributes:
        kl: mean of KL(q(z | x) || p(z)) over the data, in closed form.
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
    mu: Tensor, logvar: Tensor, *, samples: int = 1, chunk_size: int = 1000, generator: Generator | None = None
) -> EncoderInformation:
    r"""Mutual information of data and code, and divergence of the aggregate posterior from N(0, I).

    .. math:: \hat I = \frac1N \sum_n \log\frac{q(z_n|x_n)}{\frac1N\sum_m q(z_n|x_m)}, \qquad z_n \sim q(z|x_n)

    The mixture runs over all N rows. Give it the whole data set: the estimate is at most ln N, and averages over
    batches of 32, as some published figures are, at most ln 32 = 3.47. Its expectation is the information on which of
    the N rows was encoded, which on average over data sets is at most I(x; z). That is not negative, but the estimate
    can be, slightly, where it is near 0.

    Args:
        mu: means of q(z | x) for each x, (N >= 2, d).
        logvar: logarithms of the variances, (N, d).
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
    kl = float(kl_to_standard_normal(mu, logvar).mean())
    information = float(torch.cat(gains).mean())
    return EncoderInformation(kl, information, kl_aggregate=kl - information, cap=math.log(n))


def _check_codes(name: str, value: Tensor) -> None:
    """Raise a ValueError unless ``value`` is finite, of shape (n >= 2, d >= 1)."""
    if value.ndim != 2 or len(value) < 2 or value.shape[1] < 1:
        raise ValueError(f"{name} must have shape (n >= 2, d >= 1), got {tuple(value.shape)}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
