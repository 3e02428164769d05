"""Markov chains that follow an energy, and what tells whether to believe them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Generator, Tensor

Energy = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chains:
    """What a sampler returns: samples of many chains, and what tells whether to believe them.

    Attributes:
        samples: kept states, (kept, chains, dim).
        energy: their energies in nats, (kept, chains).
        acceptance: share of accepted proposals of each chain after the warm-up, (chains,); 1 where nothing is refused.
        step_size: the step, after the warm-up.
    """

    samples: Tensor
    energy: Tensor
    acceptance: Tensor
    step_size: float

    @cached_property
    def ess(self) -> Tensor:
        """Effective sample size of all chains together, for the mean of each coordinate, (dim,)."""
        return effective_sample_size(self.samples)

    @cached_property
    def r_hat(self) -> Tensor:
        """Split R-hat of each coordinate, (dim,), which tells whether the chains agree in their means."""
        return split_rhat(self.samples)

    @cached_property
    def rank_r_hat(self) -> Tensor:
        """Rank-normalised R-hat of each coordinate, (dim,), which tells of their spreads too."""
        return rank_rhat(self.samples)


def langevin(
    energy: Energy,
    z0: Tensor,
    *,
    step_size: float,
    n_steps: int,
    warmup: int = 0,
    thin: int = 1,
    limit: float = 1e4,
    generator: Generator | None = None,
) -> Chains:
    r"""Unadjusted Langevin steps, for many chains at once.

    .. math:: z' = z - \tfrac\varepsilon2 \nabla U(z) + \sqrt\varepsilon\, \xi, \qquad \xi \sim N(0, I)

    Implements ``def-latent_mcmc-ula``. The chain does not converge to e^{-U}: its variances are too large, by the
    factor 1 / (1 - eps a / 4) for a Gaussian of precision a (``eq-latent_mcmc-ula``), and it runs away where eps a > 4.

    Args:
        energy: U, maps (chains, dim) to (chains,), in nats, row by row: a network in evaluation mode.
        z0: where the chains start, (chains, dim), floating.
        step_size: eps, a squared length. Half of it is the step of implementations that write sqrt(2 tau) xi.
        n_steps: steps after the warm-up, of one gradient each.
        warmup: steps before the first that counts.
        thin: every thin-th state is kept.
        limit: a chain with a larger coordinate has run away.
        generator: of the noise, on any device.

    Raises:
        ValueError: for a number that makes no sense, a start of another shape, or an energy that has another shape,
            does not depend on z, is not finite, or has no finite gradient.
        FloatingPointError: if a chain runs away.
    """
    return _run(energy, z0, step_size, n_steps, warmup, thin, limit, generator, adjust=False, target=None)


def mala(
    energy: Energy,
    z0: Tensor,
    *,
    step_size: float,
    n_steps: int,
    warmup: int = 0,
    thin: int = 1,
    target_acceptance: float | None = 0.574,
    limit: float = 1e4,
    generator: Generator | None = None,
) -> Chains:
    r"""Langevin steps that are accepted or refused, so that e^{-U} is stationary whatever the step (MALA).

    .. math:: \log\alpha = U(z) - U(z') + \tfrac12\|\xi\|^2
       - \frac{1}{2\varepsilon}\bigl\|z - z' + \tfrac\varepsilon2\nabla U(z')\bigr\|^2

    Implements ``eq-latent_mcmc-ratio`` for the proposal of :func:`langevin`, with one gradient a step. In the warm-up
    the step goes where the mean acceptance is ``target_acceptance``, by Robbins and Monro's recursion on its logarithm
    (``def-latent_mcmc-robbins-monro``); afterwards it is fixed. One step serves all chains.

    The acceptance needs differences of U to a small part of a nat. A float32 number of size c has a spacing of about
    1e-7 c: an offset of 1e5 in U does no harm, one of 1e7 spoils the chain. Take it off, or use float64.

    Args:
        energy: U, maps (chains, dim) to (chains,), in nats, row by row: a network in evaluation mode. It may be +inf:
            no chain goes there.
        z0: where the chains start, (chains, dim), floating, at finite energy.
        step_size: eps, a squared length; with a warm-up, where the search starts.
        n_steps: steps after the warm-up, of one gradient each.
        warmup: steps before the first that counts.
        thin: every thin-th state is kept.
        target_acceptance: 0.574 is best for smooth targets in many dimensions; None leaves the step as it is.
        limit: a chain with a larger coordinate has run away.
        generator: of the noise, on any device.

    Raises:
        ValueError: for a number that makes no sense, a start of another shape, or an energy that has another shape,
            does not depend on z, is NaN or -inf, or has no finite gradient where it is finite.
        FloatingPointError: if a chain passes ``limit``. That guards the run and is no test of the energy. Where e^{-U}
            has no finite integral, chains run away if U is flat far out; but if it falls ever more steeply, as -z²/2
            does, steps outwards are refused ever more often. With a fixed step the chains then all but stop, with an
            R-hat far above 1; in a warm-up they run outwards, and ``step_size`` falls towards 0.

    Source: Roberts and Tweedie, *Exponential convergence of Langevin distributions*, Bernoulli 1996; the acceptance,
    Roberts and Rosenthal, JRSS B 1998.
    """
    if target_acceptance is not None and not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance must be between 0 and 1, or None, got {target_acceptance}")
    return _run(energy, z0, step_size, n_steps, warmup, thin, limit, generator, adjust=True, target=target_acceptance)


class State(NamedTuple):
    """Of all chains: where they are, (chains, dim), their energies, (chains,), and the gradients, (chains, dim)."""

    z: Tensor
    u: Tensor
    g: Tensor


def ula_step(state: State, evaluate: Callable, eps: Tensor, xi: Tensor) -> State:
    """One step of ``def-latent_mcmc-ula`` with noise xi; ``evaluate`` gives energies and gradients."""
    z = state.z - 0.5 * eps * state.g + eps.sqrt() * xi
    return State(z, *evaluate(z))


def mala_step(
    state: State, evaluate: Callable, eps: Tensor, xi: Tensor, uniform: Tensor
) -> tuple[State, Tensor, Tensor]:
    """The same, accepted where ``uniform`` is below alpha of ``eq-latent_mcmc-ratio``; which were, and log alpha."""
    proposal = ula_step(state, evaluate, eps, xi)
    back = (state.z - proposal.z + 0.5 * eps * proposal.g).square().sum(1)
    log_alpha = state.u - proposal.u + 0.5 * xi.square().sum(1) - back / (2 * eps)
    log_alpha = torch.where(proposal.u == math.inf, -math.inf, log_alpha)
    accept = uniform.log() < log_alpha
    z, g = (torch.where(accept[:, None], new, old) for new, old in ((proposal.z, state.z), (proposal.g, state.g)))
    return State(z, torch.where(accept, proposal.u, state.u), g), accept, log_alpha


@torch.no_grad()
def _run(energy, z0, step_size, n_steps, warmup, thin, limit, generator, *, adjust, target) -> Chains:
    """Draw the noise, make the steps, choose their size in the warm-up, and keep what is asked for."""
    _check_run(z0, step_size, n_steps, warmup, thin)
    source, step = z0.device if generator is None else generator.device, 0

    def noise(draw: Callable, *shape: int) -> Tensor:
        return draw(shape, generator=generator, device=source, dtype=z0.dtype).to(z0.device)

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        if not adjust and step:
            _check_limit(z, limit, step)
        return _value_and_gradient(energy, z, step, infinite=adjust and step > 0)

    state = State(z0.detach().clone(), *evaluate(z0))
    eps = torch.as_tensor(step_size, dtype=z0.dtype, device=z0.device)
    log_eps, mean_log_eps = eps.log(), torch.zeros_like(eps)
    tail = max(1, warmup // 2)  # the fixed step is the geometric mean over this many last steps of the warm-up
    samples = z0.new_empty(n_steps // thin, *z0.shape)
    energies, accepted = state.u.new_empty(n_steps // thin, len(z0)), state.u.new_zeros(len(z0))
    for step in range(1, warmup + n_steps + 1):
        xi, counted = noise(torch.randn, *z0.shape), step - warmup
        if not adjust:
            state = ula_step(state, evaluate, eps, xi)
        else:
            state, accept, log_alpha = mala_step(state, evaluate, eps, xi, noise(torch.rand, len(z0)))
            _check_limit(state.z, limit, step)
            if counted > 0:
                accepted += accept
            elif target is not None:
                log_eps += step**-0.6 / (target * (1 - target)) * (log_alpha.clamp(max=0).exp().mean() - target)
                mean_log_eps += log_eps / tail if counted > -tail else 0
                eps = (mean_log_eps if counted == 0 else log_eps).exp()
        if counted > 0 and counted % thin == 0:
            samples[counted // thin - 1], energies[counted // thin - 1] = state.z, state.u
    return Chains(samples, energies, accepted / n_steps if adjust else torch.ones_like(state.u), float(eps))


def _check_run(z0: Tensor, step_size: float, n_steps: int, warmup: int, thin: int) -> None:
    """Raise a ValueError for numbers that make no sense, or a start of another shape."""
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a positive number, got {step_size}")
    whole = all(isinstance(count, Integral) for count in (n_steps, thin, warmup))
    if not whole or thin < 1 or n_steps < thin or warmup < 0:
        raise ValueError(
            f"thin must be at least 1, n_steps at least thin, warmup not negative, all of them whole numbers, "
            f"got thin={thin}, n_steps={n_steps}, warmup={warmup}"
        )
    if z0.ndim != 2 or 0 in z0.shape or not z0.is_floating_point():
        raise ValueError(f"z0 must be floating point of shape (chains, dim), got {tuple(z0.shape)} of {z0.dtype}")
    if not torch.isfinite(z0).all():
        raise ValueError("z0 must be finite, got NaN or infinite entries")


def _value_and_gradient(energy: Energy, z: Tensor, step: int, *, infinite: bool) -> tuple[Tensor, Tensor]:
    """U and its gradient at z; ValueError unless both are finite, or U is +inf where that is allowed."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        u = energy(z)
        if u.shape != (len(z),):
            raise ValueError(f"energy must map {tuple(z.shape)} to ({len(z)},), got {tuple(u.shape)}")
        g = None
        if u.requires_grad:  # otherwise grad raises; with parameters alone in the graph it returns None
            (g,) = torch.autograd.grad(u.sum(), z, allow_unused=True)
    if g is None:
        raise ValueError("energy must depend on z by operations with a gradient, got none: detach, or torch.no_grad()?")
    u = u.detach()
    if not math.isfinite(float(u.sum() + g.sum())):  # one look at the device in most steps
        outside = (u == math.inf) if infinite else torch.zeros_like(u, dtype=torch.bool)
        bad = ~(torch.isfinite(u) & torch.isfinite(g).all(1)) & ~outside
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"energy must be finite with a finite gradient, got U = {float(u[row])} with gradient "
                f"{g[row].tolist()[:4]} in chain {row} at step {step} ({int(bad.sum())} of {len(z)} chains)"
            )
    return u, g


def _check_limit(z: Tensor, limit: float, step: int) -> None:
    if not (largest := float(z.abs().amax())) <= limit:
        raise FloatingPointError(
            f"a chain has run away: a coordinate of {largest:.3g} at step {step}, beyond limit={limit:.3g}. Either the "
            f"energy does not hold it (e^-U needs a finite integral: add a prior term), or step_size is too large"
        )


def _halves(samples: Tensor) -> Tensor:
    """Each chain as two, (kept // 2, 2 * chains, dim); ValueError if there is nothing to compare."""
    if samples.ndim != 3 or len(samples) < 8 or 0 in samples.shape:
        raise ValueError(f"samples must have shape (kept >= 8, chains, dim), got {tuple(samples.shape)}")
    if not torch.isfinite(samples).all():
        raise ValueError("samples must be finite, got NaN or infinite entries")
    half = len(samples) // 2
    parts = torch.cat([samples[:half], samples[-half:]], 1).double()
    if (parts.var(0).mean(0) == 0).any():
        raise ValueError("samples must vary: in some coordinate no chain has moved, so there is nothing to judge")
    return parts


def split_rhat(samples: Tensor) -> Tensor:
    r"""Gelman and Rubin's factor with each chain split into halves, (dim,).

    .. math:: \hat R = \sqrt{\frac{n - 1}{n} + \frac{B}{W}}

    Implements ``def-latent_mcmc-rhat``: W is the mean variance within the halves, of n samples each, B the variance of
    their means. It is near 1 for chains that forgot their start, and larger for chains in different places or still
    on their way. Near 1 proves nothing if no chain has seen a mode, and chains of one mean that differ in their spread
    are not noticed: for those there is :func:`rank_rhat`.

    Args:
        samples: (kept >= 8, chains, dim).

    Raises:
        ValueError: for another shape, samples that are not finite, or a coordinate in which no chain has moved.
    """
    return _rhat(_halves(samples))


def rank_rhat(samples: Tensor) -> Tensor:
    r"""Split R-hat of the samples' normal scores and of those of their distances from the median, the larger, (dim,).

    .. math:: \max\{\hat R(s),\, \hat R(s')\}, \qquad s_i = \Phi^{-1}\left(\frac{r_i - 3/8}{S + 1/4}\right)

    Implements ``def-latent_mcmc-rank-rhat``: r_i is the rank of a sample among all S of its coordinate, equal ones
    sharing their mean rank, and s' are the scores of \|z_i - median\|. The first compares the chains' places also where
    they have no variance, the second their spreads.

    Args:
        samples: (kept >= 8, chains, dim).

    Raises:
        ValueError: for another shape, samples that are not finite, or a coordinate in which no chain has moved.

    Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner, *Rank-normalization, folding, and localization: an improved
    R-hat*, Bayesian Analysis 2021.
    """
    parts = _halves(samples)
    ordered = parts.flatten(0, 1).sort(0).values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    # Where all distances are equal, as for samples of two values, the second is NaN, and has nothing to say.
    return torch.fmax(_rhat(_normal_scores(parts)), _rhat(_normal_scores((parts - median).abs())))


def _rhat(parts: Tensor) -> Tensor:
    n = len(parts)
    return ((n - 1) / n + parts.mean(0).var(0) / parts.var(0).mean(0)).sqrt()


def _normal_scores(parts: Tensor) -> Tensor:
    """Normal quantiles of the ranks among all samples of a coordinate, equal samples with their mean rank."""
    scores = torch.empty_like(parts)
    for j in range(parts.shape[2]):
        _, place, count = parts[..., j].unique(return_inverse=True, return_counts=True)
        rank = count.cumsum(0) - (count.double() - 1) / 2
        scores[..., j] = torch.special.ndtri((rank - 0.375) / (parts[..., j].numel() + 0.25))[place]
    return scores


def effective_sample_size(samples: Tensor) -> Tensor:
    r"""Number of independent samples whose mean is as precise, all chains together, (dim,).

    .. math:: \frac{M n}{1 + 2\sum_t \rho_t}

    Implements ``def-latent_mcmc-ess``, with autocorrelations from the halves of the chains (M halves of n samples),
    summed by Geyer's initial monotone sequence. Chains that disagree have a small one.

    Args:
        samples: (kept >= 8, chains, dim).

    Raises:
        ValueError: for another shape, samples that are not finite, or a coordinate in which no chain has moved.

    Source: Geyer, *Practical Markov chain Monte Carlo*, 1992; for several chains, Gelman et al., *Bayesian Data
    Analysis*, 3rd edition, section 11.5.
    """
    parts = _halves(samples)
    n, m, _ = parts.shape
    spectrum = torch.fft.rfft(parts - parts.mean(0), n=2 * n, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[:n].mean(1) / n  # (n, dim)
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + parts.mean(0).var(0)
    rho = 1 - (within - covariance) / total
    rho[0] = 1
    pairs = rho[: n // 2 * 2].reshape(n // 2, 2, -1).sum(1)  # positive and falling for a reversible chain
    positive = (pairs > 0).cumprod(0)
    tau = 2 * (pairs.cummin(0).values * positive).sum(0) - 1
    return m * n / tau.clamp(min=1 / math.log10(m * n))
