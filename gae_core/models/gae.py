"""Generative autoencoders without an encoder (GAE): the code of x is found by ascent on log q(z) q(x|z).

Derived in the chapter *One framework*. Likelihoods are in nats.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gae_core import parallel
from gae_core.gaussian import standard_normal_log_prob
from gae_core.models.autoencoder import Autoencoder


@dataclass(frozen=True)
class GAELoss:
    """Terms of the loss, each of shape (batch,).

    Attributes:
        total: what is minimised: reconstruction + prior of the best start, or minus the log of the starts' mean.
        reconstruction: -log q(x | z) at the best start's code.
        prior: -log q(z) there; 0 for the flat prior.
    """

    total: Tensor
    reconstruction: Tensor
    prior: Tensor


class GAE(Autoencoder):
    r"""A decoder alone: the code is where t steps of gradient ascent from :math:`z_0` arrive.

    .. math:: z_{s+1} = z_s + \eta\,\nabla_z \log q(z_s)\,q(x|z_s), \qquad
        l(z_0, t) = \log q(z_t)\,q(x|z_t), \qquad q(x|z) = N(x; g(z), \sigma^2 I)

    The loss is :math:`-l(z_0, t)`, whatever :math:`z_t` is: for a finite set of codes it bounds -log q(x) from above.
    For a continuous code the maximum of a density bounds nothing; :meth:`laplace_nll` adds the volume that it lacks.

    The ascent never falls for steps below 2/L, with L the largest curvature of -log q(z) q(x|z); for a linear decoder W
    it converges if and only if eta (lambda_max(W'W) / sigma² + 1) < 2, without the 1 for the flat prior.

    Args:
        decoder: module z (batch, dim) -> means of x (batch, ...).
        dim: dimension of the code.
        steps: t, at least 1.
        step_size: eta. In units of the gradient above: the squared error weighs 1 / (2 sigma²).
        n_starts: 1 starts at the origin; more add starts drawn from N(0, I): for the loss anew for each row, for
            :meth:`encode` always the same, for all rows.
        sigma: standard deviation of q(x | z).
        prior: "normal" for N(0, I), or "flat", which adds nothing, is no distribution on R^d, and leaves the codes'
            scale to the decoder.
        combine: how several starts make one loss: "max" takes the best, "logmeanexp" the logarithm of the mean of
            q(z_t) q(x | z_t), never above it.
        second_order: let the loss's gradient pass through the steps; otherwise z_t counts as a constant, which is the
            same where the ascent has converged (envelope theorem) and cheaper everywhere.

    Raises:
        ValueError: for arguments out of range; and when used, if the decoder gives another shape than that of x.
    """

    def __init__(
        self,
        decoder: nn.Module,
        dim: int,
        *,
        steps: int,
        step_size: float,
        n_starts: int = 1,
        sigma: float = 1.0,
        prior: str = "normal",
        combine: str = "max",
        second_order: bool = True,
    ) -> None:
        super().__init__(nn.Identity(), decoder, dim)
        if min(dim, steps, n_starts) < 1:
            raise ValueError(
                f"dim, steps and n_starts must be at least 1, got dim={dim}, steps={steps}, n_starts={n_starts}"
            )
        if not (0 < step_size < math.inf and 0 < sigma < math.inf):
            raise ValueError(f"step_size and sigma must be positive, got step_size={step_size}, sigma={sigma}")
        if prior not in ("normal", "flat"):
            raise ValueError(f'prior must be "normal" or "flat", got {prior!r}')
        if combine not in ("max", "logmeanexp"):
            raise ValueError(f'combine must be "max" or "logmeanexp", got {combine!r}')
        self.steps, self.step_size, self.n_starts = steps, step_size, n_starts
        self.sigma, self.prior, self.combine, self.second_order = sigma, prior, combine, second_order

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Logarithms of q(x | z) for each x (batch, ...) at its z (batch, dim), shape (batch,)."""
        output = self.decoder(z)
        if output.shape != x.shape:
            raise ValueError(f"decoder must give the shape of x, {tuple(x.shape)}, got {tuple(output.shape)}")
        residual = ((x - output) / self.sigma).flatten(1)
        return standard_normal_log_prob(residual) - residual.shape[1] * math.log(self.sigma)

    def log_prior(self, z: Tensor) -> Tensor:
        """Logarithms of q(z), shape (batch,); zeros for the flat prior."""
        return standard_normal_log_prob(z) if self.prior == "normal" else z.new_zeros(len(z))

    def infer(
        self, x: Tensor, *, steps: int | None = None, alike: bool = False, generator: Generator | None = None
    ) -> Tensor:
        """Codes after the ascent from every start.

        Args:
            x: data, (batch, ...).
            steps: instead of the model's own; 0 gives the starts.
            alike: all rows have the same starts; otherwise each has its own.
            generator: source of the starts after the first.

        Returns:
            Codes, (n_starts, batch, dim).

        Raises:
            ValueError: if ``steps`` is negative.
            FloatingPointError: if the ascent diverges.
        """
        if steps is not None and steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        parameter = next(self.decoder.parameters())
        z = parameter.new_zeros(self.n_starts, len(x), self.dim)
        if self.n_starts > 1:
            device = z.device if generator is None else generator.device
            rows = 1 if alike else len(x) * parallel.rank_and_size()[1]  # one draw for the batch of all processes
            shape = (self.n_starts - 1, rows, self.dim)
            noise = torch.randn(shape, generator=generator, device=device, dtype=z.dtype)
            noise = noise if alike else parallel.own(noise.transpose(0, 1)).transpose(0, 1)
            z = torch.cat([z[:1], noise.to(z.device).expand_as(z[1:])])
        rows = x.repeat(self.n_starts, *[1] * (x.ndim - 1))
        z = z.flatten(0, 1)
        through = self.second_order and torch.is_grad_enabled()
        with torch.enable_grad():  # also to encode under no_grad
            for _ in range(self.steps if steps is None else steps):
                z = z if through and z.requires_grad else z.detach().requires_grad_()
                value = (self.log_likelihood(rows, z) + self.log_prior(z)).sum()  # of the batch: each code has its own
                (gradient,) = torch.autograd.grad(value, z, create_graph=through)
                z = z + self.step_size * gradient
        if not torch.isfinite(z).all():
            raise FloatingPointError(
                f"the ascent to the codes diverged: step_size={self.step_size} is too large for this decoder at "
                f"sigma={self.sigma}; it must be below 2 / (largest curvature)"
            )
        return (z if through else z.detach()).unflatten(0, (self.n_starts, len(x)))

    def _values(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of all starts, and log q(x | z) and log q(z) at them, each (n_starts, batch)."""
        z = self.infer(x, **options)
        pairs = [(self.log_likelihood(x, start), self.log_prior(start)) for start in z]
        likelihood, prior = (torch.stack(values) for values in zip(*pairs, strict=True))
        return z, likelihood, prior

    def encode(self, x: Tensor) -> Tensor:
        """Codes (batch, dim) of x: the best of what its starts reach, which are the same for every row."""
        z, likelihood, prior = self._values(x, alike=True, generator=torch.Generator().manual_seed(0))
        return z[(likelihood + prior).argmax(0), torch.arange(len(x), device=z.device)]

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> GAELoss:
        """Loss on a batch, its starts from ``generator``; ``y`` is not used."""
        _, likelihood, prior = self._values(x, generator=generator)
        value = likelihood + prior
        best = value.argmax(0, keepdim=True)
        total = value.gather(0, best)[0] if self.combine == "max" else value.logsumexp(0) - math.log(self.n_starts)
        return GAELoss(-total, -likelihood.gather(0, best)[0], -prior.gather(0, best)[0])

    def laplace_nll(self, x: Tensor) -> Tensor:
        r"""Laplace's approximation of -log q(x): :math:`-l(z^*) - \tfrac d2\log 2\pi + \tfrac12\log\det H`.

        H is the curvature of -log q(z) q(x|z) at the code of x. Exact for a linear decoder and the normal prior, once
        the ascent has converged.

        Raises:
            ValueError: if a code is no strict maximum: more steps are needed, or the prior is flat along a direction.
        """
        z = self.encode(x).detach()

        def negative(code: Tensor, row: Tensor) -> Tensor:
            return -(self.log_likelihood(row[None], code[None]) + self.log_prior(code[None]))[0]

        curvature = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(negative)))(z, x)
        factor, info = torch.linalg.cholesky_ex(curvature)
        if info.any():
            raise ValueError(
                f"codes must be strict maxima of log q(z) q(x|z), {int((info > 0).sum())} of {len(x)} are none: "
                f"take more steps, or a prior that is not flat"
            )
        half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = self.log_likelihood(x, z) + self.log_prior(z)
        return -value - 0.5 * self.dim * math.log(2 * math.pi) + half_log_det

    def sample(self, n: int, y: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
        """Decode n codes drawn from N(0, I).

        Raises:
            ValueError: for the flat prior, which is no distribution.
        """
        if self.prior == "flat":
            raise ValueError(
                'prior must be "normal" to draw codes, got "flat": fit a density to the codes, for example '
                "with gae_core.densities.fit_gaussian_mixture, and decode its samples"
            )
        return super().sample(n, y, generator=generator)


class KernelMixture(nn.Module):
    r"""Weights of K components at a continuous code: :math:`u_k(v) \propto e^{-\|v - w_k\|^2}`, summing to 1.

    Args:
        components: K.
        dim: dimension of the code v.
        entries: number of entries of x.
    """

    def __init__(self, components: int, dim: int, entries: int) -> None:
        super().__init__()
        if min(components, dim, entries) < 1:
            raise ValueError(f"components, dim and entries must be at least 1, got {components}, {dim}, {entries}")
        self.centres = nn.Parameter(torch.randn(components, dim))
        self.means = nn.Parameter(torch.randn(components, entries))

    def log_weights(self, v: Tensor) -> Tensor:
        """Logarithms of the weights at codes v (batch, dim), shape (batch, K)."""
        return (-torch.cdist(v, self.centres).square()).log_softmax(1)

    def forward(self, v: Tensor) -> Tensor:
        """Mean of the mixture at codes v (batch, dim), shape (batch, entries)."""
        return self.log_weights(v).exp() @ self.means


class GGAE(GAE):
    r"""GAE whose decoder is a mixture with weights that move with the code (Gaussian-kernel GAE).

    .. math:: q(x|v) = \sum_k u_k(v)\,N(x; \mu_k, \sigma^2 I)

    Args:
        decoder: a :class:`KernelMixture`.
        dim: dimension of the code.
        **options: as for :class:`GAE`.
    """

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Logarithms of q(x | z) for each x (batch, entries) at its code, shape (batch,)."""
        means = self.decoder.means
        if x.shape[1:] != means.shape[1:]:
            raise ValueError(f"x must have shape (batch, {means.shape[1]}), got {tuple(x.shape)}")
        normal = standard_normal_log_prob((x[:, None] - means) / self.sigma) - x.shape[1] * math.log(self.sigma)
        return (self.decoder.log_weights(z) + normal).logsumexp(1)


def soft_minimum(values: Tensor, beta: float, *, mean: bool = False) -> Tensor:
    r"""Smooth minimum of negative losses -d: :math:`-\frac1\beta\log\sum_i e^{\beta d_i}`, or with the mean instead.

    With the sum it lies in :math:`[\min - \log N/\beta, \min]`, with the mean in :math:`[\min, \text{mean}]`.

    Args:
        values: -d, shape (n,).
        beta: sharpness, positive.
        mean: take the mean of the exponentials.

    Raises:
        ValueError: if ``beta`` is not positive, there is no value, or one is not finite.
    """
    if not 0 < beta < math.inf or values.ndim != 1 or not len(values):
        raise ValueError(f"beta must be positive and values of shape (n >= 1,), got {beta}, {tuple(values.shape)}")
    if not torch.isfinite(values).all():
        raise ValueError(f"values must be finite, got {int((~torch.isfinite(values)).sum())} that are not")
    total = (-beta * values).logsumexp(0)
    return -(total - math.log(len(values)) if mean else total) / beta
