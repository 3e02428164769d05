"""Measures of a variational model: its likelihood, and what its encoder's distribution q(z | x) carries. In nats."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core.data import to_unit
from gae_core.gaussian import kl_to_standard_normal, standard_normal_log_prob

WIDTHS = (0.3, 0.7)  # of the widened posteriors: their smallest standard deviations, in those of the prior
PROPOSALS = ("mixture", "posterior", "prior")


@dataclass(frozen=True)
class ImportanceWeighted:
    """Estimates of -log p(x) in nats, one for each x, (n,), float64, on the device of the data.

    Attributes:
        nll: from all S draws. Its mean over x is the figure of the literature.
        halved: from half as many, the mean of the two halves of the same draws; None for a single draw. For even S it
            is never below ``nll``. Where the excess over -log p(x) falls as 1 / S, ``halved - nll`` is what is left.
    """

    nll: Tensor
    halved: Tensor | None


@torch.no_grad()
def importance_weighted_nll(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    samples: int = 512,
    proposal: str = "mixture",
    chunk_size: int = 5000,
    generator: Generator | None = None,
) -> ImportanceWeighted:
    r"""Estimate -log p(x) of each x by importance sampling from a mixture around the encoder's distribution.

    .. math::

        -\log\frac1S\sum_{s=1}^S \frac{p(x|z_s)\,p(z_s)}{g(z_s)}, \qquad
        g(z) = \frac14\Big(q(z|x) + q_{0.3}(z|x) + q_{0.7}(z|x) + p(z)\Big)

    Implements ``def-bn_vae-mixture``; :math:`q_\delta` is q(z | x) with standard deviations of at least :math:`\delta`
    times the prior's. The S draws go to the four in turn; g has the shares that they get, which are quarters where S is
    a multiple of four. The mean of the weights is unbiased for p(x) whatever q is, so the expectation of the estimate
    is at least -log p(x), and it falls to it as S grows: quote S with the figure. With quarters no weight exceeds
    4 p(x | z). The estimate is good where the posterior is about as wide as one of the four in every coordinate; where
    it is much narrower than :math:`q_{0.3}` and q narrower still, all of them miss it.

    With q(z | x) as the only proposal (``def-vae-iw``, Burda et al., ICLR 2016) a q narrower than the posterior leaves
    out most of p(x) until S is astronomical, and models are punished for their encoders: see *Posterior collapse and
    batch norm*. Where q(z | x) is the posterior it is exact for any S; with S = 1 it estimates the negative evidence
    lower bound. With the prior as proposal it is plain Monte Carlo, whose weights are nearly all negligible where z
    decides much (``eq-cvae-prior-excess``). All have the same limit. For beta other than 1 it is still -log p(x).

    With y it is -log p(x | y) of a conditional model, with q(z | x, y) and p(z | y). For a prior of another kind p(z)
    in g is the Gaussian of the model's ``prior``: with the mixture and the posterior all of the above holds but for the
    bound on the weights.

    Args:
        model: has ``dim``, ``posterior(x, y)``, ``prior(y, like)`` and ``log_joint(x, z, y)``, as a
            :class:`gae_core.models.vae.LatentVariableModel` has; in evaluation mode.
        x: data, (n, ...), bytes or floats.
        y: condition of each x, (n, ...), for a conditional model alone.
        samples: S, best a multiple of eight: then both halves have the four proposals in equal parts.
        proposal: "mixture", "posterior" or "prior".
        chunk_size: pairs (x, z) decoded at a time. The result does not depend on it, but for rounding.
        generator: source of the noise, on any device.

    Raises:
        ValueError: if there is no x, ``samples`` or ``chunk_size`` is below 1, the proposal is unknown, or the prior
            where that is no Gaussian, y has not a row for each x, the model has no likelihood or refuses its input, or
            an estimate is not finite.
    """
    if min(len(x), samples, chunk_size) < 1:
        raise ValueError(
            f"x must have rows, samples and chunk_size must be at least 1, "
            f"got {len(x)} rows, samples={samples}, chunk_size={chunk_size}"
        )
    if proposal not in PROPOSALS:
        raise ValueError(f"proposal must be one of {', '.join(PROPOSALS)}, got {proposal!r}")
    if not hasattr(model, "log_joint"):
        raise ValueError(f"model must have log_joint(x, z), as a VAE has, got a {type(model).__name__}")
    if proposal == "prior" and not getattr(model, "has_gaussian_prior", True):
        raise ValueError(f'proposal must not be "prior" for a prior that is no Gaussian, got a {type(model).__name__}')
    if y is not None and len(y) != len(x):
        raise ValueError(f"y must have one row for each row of x, got {len(y)} and {len(x)}")
    parameter = next(model.parameters())
    source = parameter.device if generator is None else generator.device
    dtype = x.dtype if x.is_floating_point() else parameter.dtype  # tokens have no noise of their own kind
    size = max(1, chunk_size // samples)
    conditions = itertools.repeat(None) if y is None else y.to(parameter.device).split(size)
    result = []
    for rows, condition in zip(x.split(size), conditions, strict=False):
        rows = to_unit(rows.to(parameter.device))
        means, scales = (v[:, :samples] for v in _proposals(model, rows, condition, proposal))  # (rows, K, d)
        component = torch.arange(samples, device=parameter.device) % means.shape[1]
        # One draw for each x, so that its noise does not depend on the chunks.
        eps = torch.stack(
            [torch.randn(samples, model.dim, generator=generator, device=source, dtype=dtype) for _ in rows]
        )
        z = means[:, component] + scales[:, component] * eps.to(parameter.device)  # (rows, S, d)
        log_g = torch.logsumexp(
            torch.stack(
                [
                    standard_normal_log_prob((z - mean[:, None]) / scale[:, None]) - scale.log().sum(-1, keepdim=True)
                    for mean, scale in zip(means.unbind(1), scales.unbind(1), strict=True)
                ]
            )
            + (component.bincount() / samples).log()[:, None, None],
            dim=0,
        )
        parts = z.to(dtype).split(chunk_size, dim=1)
        log_joint = torch.cat([model.log_joint(rows, part, condition) for part in parts], 1)
        result.append((log_joint.double() - log_g).to(x.device))
    log_weights = torch.cat(result)
    nll = math.log(samples) - log_weights.logsumexp(1)
    if not torch.isfinite(nll).all():
        raise ValueError(f"model must give finite weights, it does not for {int((~nll.isfinite()).sum())} rows of x")
    half = samples // 2
    halves = log_weights[:, : 2 * half].unflatten(1, (2, half)) if half else None
    return ImportanceWeighted(nll, None if halves is None else (math.log(half) - halves.logsumexp(2)).mean(1))


def _proposals(model: nn.Module, x: Tensor, y: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the Gaussians that codes are drawn from, each (batch, K, d), in float64."""
    prior_mean, prior_logvar = (v.double() for v in model.prior(y, x))
    if kind == "prior":
        return prior_mean[:, None], (0.5 * prior_logvar[:, None]).exp()
    mu, logvar = (v.double() for v in model.posterior(x, y))
    sigma, scale = (0.5 * logvar).exp(), (0.5 * prior_logvar).exp()
    if kind == "posterior":
        return mu[:, None], sigma[:, None]
    wide = [torch.maximum(sigma, width * scale) for width in WIDTHS]
    return torch.stack([mu, *(mu for _ in wide), prior_mean], 1), torch.stack([sigma, *wide, scale], 1)


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
