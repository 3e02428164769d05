"""Likelihoods of models with a latent variable, by importance sampling."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core.data import to_unit
from gae_core.gaussian import standard_normal_log_prob

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
