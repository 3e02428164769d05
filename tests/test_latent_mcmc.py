"""The chapter on Markov chains in the latent space: its equations, the wrong kernels, the energies of codes."""

import dataclasses
import json
import math
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from helpers import assert_z
from scipy import stats

from gae_core.chains import effective_sample_size, langevin, mala, split_rhat
from gae_core.energy import latent_energy
from gae_core.studies import meg_chains

ROOT = Path(__file__).resolve().parents[1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def quadratic(z):
    return 0.5 * z.square().sum(1)


@pytest.mark.checks("eq-latent_mcmc-fokker-planck", how="symbolic")
def test_both_forms_of_fokker_planck_agree_and_the_boltzmann_density_is_stationary():
    x, y, t, z0 = sp.symbols("x y t z0", real=True)
    u, p = sp.Function("U")(x, y), sp.Function("p")(x, y)

    def first(p):
        return sum(sp.diff(p * sp.diff(u, v), v) + sp.diff(p, v, 2) for v in (x, y)) / 2

    def second(p):
        return sum(sp.diff(p * sp.diff(sp.log(p) + u, v), v) for v in (x, y)) / 2

    assert sp.simplify(first(p) - second(p)) == 0
    assert sp.simplify(first(sp.exp(-u))) == 0
    assert sp.simplify(first(sp.exp(-2 * u))) != 0  # the drift without its half would have this one
    # The known transition density of dz = -z/2 dt + dB solves it for U = z^2 / 2.
    mean, var = z0 * sp.exp(-t / 2), 1 - sp.exp(-t)
    p = sp.exp(-((x - mean) ** 2) / (2 * var)) / sp.sqrt(2 * sp.pi * var)
    right = (sp.diff(p * x, x) + sp.diff(p, x, 2)) / 2
    assert sp.simplify((sp.diff(p, t) - right) / p) == 0


@pytest.mark.checks("eq-latent_mcmc-decay", how="symbolic")
def test_the_divergence_falls_by_half_the_relative_fisher_information():
    """For U = z^2 / 2 and a Gaussian start all is in closed form: mean and variance relax with rates 1/2 and 1."""
    x, m0 = sp.symbols("x m0", real=True)
    t, s0 = sp.symbols("t s0", positive=True)
    m, s = m0 * sp.exp(-t / 2), 1 + (s0 - 1) * sp.exp(-t)
    kl = (m**2 + s - 1 - sp.log(s)) / 2
    slope = sp.diff(-((x - m) ** 2) / (2 * s) + x**2 / 2, x)  # of log p_t / pi
    square = sp.Poly(sp.expand(slope**2), x)
    moments = {0: 1, 1: m, 2: m**2 + s}
    fisher = sum(c * moments[k] for (k,), c in square.terms())
    assert sp.simplify(sp.diff(kl, t) + fisher / 2) == 0


@pytest.mark.checks("eq-latent_mcmc-ula", how="exact")
def test_unadjusted_steps_leave_their_own_gaussian_invariant():
    """The covariance solves S = F S F + eps I, and F S is symmetric, which is exchangeability of the pair."""
    with mp.workdps(40):
        root = mp.matrix([[mp.mpf("1.3"), mp.mpf("0.4")], [mp.mpf("-0.2"), mp.mpf("0.9")]])
        a, one, eps = root.T * root, mp.eye(2), mp.mpf("0.37")
        s = a**-1 * (one - eps / 4 * a) ** -1
        f = one - eps / 2 * a
        assert mp.norm(f * s * f.T + eps * one - s) < 1e-35
        assert mp.norm(f * s - (f * s).T) < 1e-35
        assert mp.norm(f * a**-1 * f.T + eps * one - a**-1) > 0.01  # the target itself is not invariant


@pytest.mark.parametrize("eps", [0.2, 1.0])
@pytest.mark.checks("eq-latent_mcmc-ula", how="statistical")
def test_the_unadjusted_sampler_has_the_bias_of_the_equation(eps):
    run = langevin(quadratic, normal(400, 2), step_size=eps, n_steps=500, warmup=int(20 / eps), generator=generator(1))
    variance = run.samples.square().mean((0, 2)).numpy()
    assert_z(variance, 1 / (1 - eps / 4))
    with pytest.raises(AssertionError, match="z ="):
        assert_z(variance, 1.0)
    assert (run.acceptance == 1).all()


def test_one_number_for_all_coordinates_shakes_along_one_line():
    """The source's noise N(0, 1) for a vector: the stationary covariance is of rank one, that of N(0, I) is not."""
    eps = sp.symbols("epsilon", positive=True)
    phi, ones = 1 - eps / 2, sp.ones(3, 3)
    for noise, rank in ((ones, 1), (sp.eye(3), 3)):
        covariance = noise / (1 - eps / 4)
        assert sp.simplify(phi**2 * covariance + eps * noise - covariance) == sp.zeros(3)
        assert covariance.rank() == rank


class Anharmonic:
    """An energy of two coordinates that is no quadratic, for mpmath."""

    @staticmethod
    def u(z):
        return z[0] ** 4 / 4 + mp.cos(z[0] * z[1]) + mp.exp(z[1] / 3) + z[1] ** 2

    @staticmethod
    def g(z):
        s = mp.sin(z[0] * z[1])
        return mp.matrix([z[0] ** 3 - z[1] * s, -z[0] * s + mp.exp(z[1] / 3) / 3 + 2 * z[1]])


def square(v):
    return sum(c**2 for c in v)


def log_proposal(to, start, eps):
    """Density of z - eps/2 grad U + sqrt(eps) xi, from that of xi."""
    return -square((to - start + eps / 2 * Anharmonic.g(start)) / mp.sqrt(eps)) / 2 - mp.log(2 * mp.pi * eps)


@pytest.mark.checks("eq-latent_mcmc-balance", how="exact")
@pytest.mark.checks("eq-latent_mcmc-ratio", how="exact")
def test_detailed_balance_and_both_forms_of_the_ratio():
    with mp.workdps(40):
        for seed in range(5):
            random = np.random.default_rng(seed).normal(size=4)
            z, xi = (mp.matrix([mp.mpf(v) for v in part]) for part in (random[:2], random[2:]))
            eps = mp.mpf("0.3")
            g = Anharmonic.g(z)
            new = z - eps / 2 * g + mp.sqrt(eps) * xi
            g1, du = Anharmonic.g(new), Anharmonic.u(new) - Anharmonic.u(z)
            there = -Anharmonic.u(z) + log_proposal(new, z, eps)
            back = -Anharmonic.u(new) + log_proposal(z, new, eps)
            log_ratio = back - there
            first = -du + square(xi) / 2 - square(z - new + eps / 2 * g1) / (2 * eps)
            trapezoid = sum((new - z)[i] * (g + g1)[i] for i in range(2)) / 2
            second = -du + trapezoid - eps / 8 * (square(g1) - square(g))
            assert abs(first - log_ratio) < 1e-35 and abs(second - log_ratio) < 1e-35
            doubled = -du + (square(new - z + eps * g) - square(z - new + eps * g1)) / (2 * eps)  # the source's
            assert abs(doubled - log_ratio) > 1e-3
            flow = mp.exp(there) * min(1, mp.exp(first))
            assert abs(flow - mp.exp(min(there, back))) < 1e-35
            assert abs(flow - mp.exp(back) * min(1, mp.exp(-first))) < 1e-35


@pytest.mark.checks("eq-latent_mcmc-filter", how="exact")
def test_a_filter_multiplies_the_stationary_distribution():
    with mp.workdps(40):
        flow = mp.matrix([[3, 1, 2], [1, 4, 5], [2, 5, 1]])  # symmetric: pi_0(i) q(j | i) up to a factor
        pi0 = [sum(flow[i, j] for j in range(3)) for i in range(3)]
        w = [mp.mpf("0.3"), mp.mpf("1.7"), mp.mpf("0.9")]
        kernel = mp.matrix(3, 3)
        for i in range(3):
            for j in range(3):
                if i != j:
                    kernel[i, j] = flow[i, j] / pi0[i] * min(1, w[j] / w[i])
            kernel[i, i] = 1 - sum(kernel[i, j] for j in range(3) if j != i)
        target = [p * v for p, v in zip(pi0, w, strict=True)]
        for i in range(3):
            for j in range(3):
                assert abs(target[i] * kernel[i, j] - target[j] * kernel[j, i]) < 1e-35
        row = mp.matrix([target])
        assert mp.norm(row * kernel - row) < 1e-35


@pytest.mark.checks("eq-latent_mcmc-kernels", how="symbolic")
def test_the_wrong_ratios_on_a_gaussian_and_their_variances():
    """Each exponent from the densities as its author writes them; the variance from a product of Gaussians."""
    z, new = sp.symbols("z z1", real=True)
    eps = sp.symbols("epsilon", positive=True)
    difference = new**2 - z**2

    def log_q(to, start, drift):
        return -((to - start + drift * start) ** 2) / (2 * eps)

    energy = -difference / 2
    ratios = {
        "right": (energy + log_q(z, new, eps / 2) - log_q(new, z, eps / 2), -eps / 8, 1),
        "source": (energy + log_q(z, new, eps) - log_q(new, z, eps), (1 - eps) / 2, 4 / (3 * eps)),
        "paper": (energy, -sp.Rational(1, 2), sp.Rational(1, 2) / (1 - eps / 8)),
        "none": (sp.Integer(0), sp.Integer(0), 1 / (1 - eps / 4)),
    }
    phi = 1 - eps / 2
    unadjusted = eps / (1 - phi**2)
    for log_ratio, factor, variance in ratios.values():
        assert sp.simplify(log_ratio - factor * difference) == 0
        # pi_0 times w, w = exp(factor z^2): the coefficient of -z^2 / 2 is the precision
        assert sp.simplify(1 / (1 / unadjusted - 2 * factor) - variance) == 0


def metropolis(rule, d, eps, *, steps, warmup, chains=400, start=1.0, seed=0):
    """A Metropolis chain on N(0, I) with Langevin proposals and one of several rules: mean squares by chain."""
    source = generator(seed)
    z = start * torch.randn(chains, d, dtype=torch.float64, generator=source)
    last, total = z, torch.zeros(chains, dtype=torch.float64)

    def log_q(to, start, drift=eps / 2, power=2):
        return -((to - start + drift * start).norm(dim=1) ** power) / (2 * eps)

    for step in range(warmup + steps):
        new = (1 - eps / 2) * z + math.sqrt(eps) * torch.randn(chains, d, dtype=torch.float64, generator=source)
        log_ratio = quadratic(last if rule == "last proposal" else z) - quadratic(new)
        if rule == "source":
            log_ratio = log_ratio + log_q(z, new, eps) - log_q(new, z, eps)
        elif rule == "norm without its square":
            log_ratio = log_ratio + log_q(z, new, power=1) - log_q(new, z, power=1)
        elif rule != "paper":
            log_ratio = log_ratio + log_q(z, new) - log_q(new, z)
        accept = torch.rand(chains, dtype=torch.float64, generator=source).log() < log_ratio
        z, last = torch.where(accept[:, None], new, z), new
        total += z.square().mean(1) if step >= warmup else 0
    return (total / steps).numpy()


@pytest.mark.parametrize(
    ("rule", "d", "eps", "variance"),
    [
        ("right", 2, 0.5, 1.0),
        ("source", 2, 0.5, 8 / 3),
        ("source", 2, 1.0, 4 / 3),
        ("source", 16, 1.0, 4 / 3),
        ("paper", 2, 0.2, 0.5 / (1 - 0.2 / 8)),
        ("paper", 2, 1.0, 0.5 / (1 - 1 / 8)),
        ("paper", 16, 0.5, 0.5 / (1 - 0.5 / 8)),
    ],
)
@pytest.mark.checks("eq-latent_mcmc-kernels", how="statistical")
def test_wrong_kernels_have_the_variances_of_the_closed_forms(rule, d, eps, variance):
    values = metropolis(rule, d, eps, steps=600, warmup=300, start=math.sqrt(variance) * 0.8)
    assert_z(values, variance)
    if rule != "right":
        with pytest.raises(AssertionError, match="z ="):  # the test that MALA passes
            assert_z(values, 1.0, bound=3.0)


@pytest.mark.checks("eq-latent_mcmc-kernels", how="statistical")
def test_the_sources_kernel_gets_worse_for_small_steps():
    values = metropolis("source", 2, 0.2, steps=3000, warmup=2000, start=2.0)
    assert_z(values, 4 / 0.6)


@pytest.mark.parametrize(
    ("rule", "d", "eps", "low", "high"),
    [
        ("last proposal", 2, 1.0, 1.02, 1.06),
        ("last proposal", 16, 1.0, 1.10, 1.17),
        ("norm without its square", 2, 0.2, 0.78, 0.84),
        ("norm without its square", 16, 0.2, 0.57, 0.63),
    ],
)
def test_two_more_slips_move_the_variance(rule, d, eps, low, high):
    values = metropolis(rule, d, eps, steps=600, warmup=200)
    assert low < values.mean() < high
    with pytest.raises(AssertionError, match="z ="):
        assert_z(values, 1.0)


def exact_acceptance(d, eps):
    x = (1 - 1 / mp.sqrt(1 + 64 / mp.mpf(eps) ** 3)) / 2
    return 2 * mp.betainc(mp.mpf(d) / 2, mp.mpf(d) / 2, 0, x, regularized=True)


@pytest.mark.parametrize(("d", "eps"), [(1, 2.0), (2, 0.5), (2, 1.0), (16, 1.0), (16, 2.0)])
@pytest.mark.checks("eq-latent_mcmc-acceptance", how="statistical")
def test_the_share_that_mala_accepts_on_a_gaussian(d, eps):
    run = mala(quadratic, normal(400, d), step_size=eps, n_steps=300, target_acceptance=None, generator=generator(1))
    assert_z(run.acceptance.numpy(), float(exact_acceptance(d, eps)))


@pytest.mark.checks("eq-latent_mcmc-acceptance", how="exact")
@pytest.mark.checks("eq-latent_mcmc-acceptance-limit", how="exact")
def test_the_acceptance_in_one_two_and_infinitely_many_dimensions():
    with mp.workdps(30):
        # d = 1 by a double integral over the two independent numbers: P(|z'| < |z|) is an angle in their plane
        eps = mp.mpf(2)
        angle = mp.atan2(1, mp.sqrt(eps))  # z' = sqrt(2) xi: |xi| < |z| / sqrt(2)
        assert abs(exact_acceptance(1, 2) - 4 * angle / mp.pi) < 1e-25
        eps = mp.mpf("0.7")
        assert abs(exact_acceptance(2, eps) - (1 - 1 / mp.sqrt(1 + 64 / eps**3))) < 1e-25
        errors = []
        for d in (100, 400, 1600):
            eps = mp.mpf(20) ** (mp.mpf(1) / 3) / mp.mpf(d) ** (mp.mpf(1) / 3)
            errors.append(abs(exact_acceptance(d, eps) - 2 * mp.ncdf(-mp.sqrt(20) / 8)))
        assert errors[0] > 3.5 * errors[1] > 12 * errors[2] and errors[2] < 1e-3  # it falls as 1 / d


@pytest.mark.checks("eq-latent_mcmc-optimum", how="exact")
def test_the_best_acceptance_is_0574():
    with mp.workdps(40):

        def optimum(power):
            """Root of the derivative of log(s^power Phi(-s))."""
            return mp.findroot(lambda s: power / s - mp.npdf(s) / mp.ncdf(-s), 0.6)

        s = optimum(mp.mpf(2) / 3)
        assert mp.nstr(2 * mp.ncdf(-s), 3) == "0.574"
        assert mp.nstr((8 * s) ** (mp.mpf(2) / 3), 3) == "2.72"
        speed = [t ** (mp.mpf(2) / 3) * mp.ncdf(-t) for t in (s * mp.mpf("0.99"), s, s * mp.mpf("1.01"))]
        assert speed[1] > max(speed[0], speed[2])
        assert mp.nstr(2 * mp.ncdf(-optimum(2)), 3) == "0.234"  # the random walk of the text, eps in place of eps^(1/3)


@pytest.mark.checks("eq-latent_mcmc-ar1", how="symbolic")
def test_the_share_of_effective_samples_of_an_autoregression():
    phi, a, eps = sp.symbols("phi a epsilon", positive=True)
    n = sp.symbols("n", positive=True, integer=True)
    partial = sp.summation(phi**n, (n, 1, sp.Symbol("N", integer=True, positive=True)))
    total = phi / (1 - phi)
    N = next(s for s in partial.free_symbols if s.name == "N")
    assert sp.simplify(sp.piecewise_fold(partial).args[-1][0] - total * (1 - phi**N)) == 0
    share = 1 / (1 + 2 * total)
    assert sp.simplify(share - (1 - phi) / (1 + phi)) == 0
    assert sp.simplify(share.subs(phi, 1 - eps * a / 2) - eps * a / (4 - eps * a)) == 0


@pytest.mark.checks("eq-latent_mcmc-ar1", how="statistical")
def test_unadjusted_chains_have_that_share():
    eps, n = 0.8, 3000
    run = langevin(quadratic, normal(64, 1), step_size=eps, n_steps=n, warmup=50, generator=generator(2))
    shares = torch.stack([effective_sample_size(part) for part in run.samples.split(4, dim=1)])[:, 0] / (4 * n)
    assert_z(shares.numpy(), eps / (4 - eps))


def test_two_stuck_wells_have_the_r_hat_of_the_exercise():
    m, s = 1.5, 0.5
    samples = s * normal(4000, 40, 1) + m * torch.tensor([1.0, -1.0]).double().repeat(20)[:, None]
    assert float(split_rhat(samples)) == pytest.approx(math.sqrt(1 + m**2 / s**2), rel=0.02)  # 80 halves, not many
    assert float(split_rhat(samples[:, ::2])) < 1.01


@pytest.mark.checks("eq-latent_mcmc-frozen", how="symbolic")
def test_far_out_a_quartic_energy_refuses_everything():
    z, eps, xi = sp.symbols("z epsilon xi", positive=True)

    def u(v):
        return v**4 / 4

    new = z - eps / 2 * z**3 + sp.sqrt(eps) * xi
    log_alpha = u(z) - u(new) + xi**2 / 2 - (z - new + eps / 2 * new**3) ** 2 / (2 * eps)
    polynomial = sp.Poly(sp.expand(log_alpha), z)
    assert polynomial.degree() == 18
    assert sp.simplify(polynomial.LC() + eps / 8 * (eps / 2) ** 6) == 0


@pytest.mark.parametrize(
    ("eps", "wall", "before", "peak"), [(0.1, 5.6, 1e-6, 0.98), (0.3, 3.3, 0.06, 0.85), (1.0, 2.1, 0.46, 0.48)]
)
def test_the_acceptance_of_a_quartic_energy_rises_once_more_before_it_falls(eps, wall, before, peak):
    """The figure of the chapter: a wall or a dip, and behind it a peak a little before z² = 1 + 4 / eps."""
    z = torch.linspace(0, 8, 801, dtype=torch.float64)
    xi = torch.from_numpy(stats.norm.ppf((np.arange(4001) + 0.5) / 4001))

    def u(z):
        return z**4 / 4 - z**2 / 2

    new = (z - eps / 2 * (z**3 - z))[:, None] + math.sqrt(eps) * xi
    back = (z[:, None] - new + eps / 2 * (new**3 - new)).square() / (2 * eps)
    accept = (u(z)[:, None] - u(new) + xi**2 / 2 - back).clamp(max=0).exp().mean(1)
    opposite = math.sqrt(1 + 4 / eps)  # here the drift alone leads to -z
    assert opposite - eps / 2 * (opposite**3 - opposite) == pytest.approx(-opposite)
    assert accept[0] > 0.95
    assert float(accept[(z - wall).abs() < 0.3].min()) < before
    near = (z > 0.9 * opposite) & (z < opposite)
    assert peak < float(accept[near].max()) < peak + 0.05
    assert (accept[z > 1.3 * opposite] < 1e-6).all()


def test_frozen_chains_and_what_shows_them():
    """Chains at |z| > 3 never move at eps = 1; the acceptance of each chain says so, their mean does not."""
    run = mala(
        lambda z: (z**4 / 4 - z**2 / 2).sum(1),
        torch.linspace(-5, 5, 101, dtype=torch.float64)[:, None],
        step_size=1.0,
        n_steps=500,
        target_acceptance=None,
        generator=generator(3),
    )
    far = torch.linspace(-5, 5, 101).abs() > 3
    assert (run.acceptance[far] == 0).all() and (run.acceptance[far.logical_not()] > 0).any()
    assert 0.2 < float(run.acceptance.mean()) < 0.7
    assert float(run.r_hat) > 2


def test_the_data_grid_is_never_crossed_and_r_hat_tells():
    """Modes 40 standard deviations apart: right within, the weights are those of the starts."""
    axis = 2.0 * torch.arange(-2, 3, dtype=torch.float64)
    means, std = torch.cartesian_prod(axis, axis), 0.05
    starts = means.repeat(8, 1)

    def energy(x):
        return -torch.logsumexp(-(x[:, None] - means).square().sum(2) / (2 * std**2), dim=1)

    run = mala(energy, starts, step_size=std**2, n_steps=300, warmup=100, generator=generator(4))
    inside = run.samples - starts
    assert float(inside.abs().amax()) < 8 * std
    assert_z(inside.square().mean((0, 2)).numpy(), std**2)
    assert float(run.r_hat.min()) > 10


def test_a_barrier_is_invisible_to_the_acceptance():
    """Ten nats instead of one: the same acceptance, and R-hat far from 1 where the chains start on both sides."""
    starts = torch.tensor([1.0, -1.0]).double().repeat(32)[:, None] * torch.tensor([1.0, 0.0]).double()
    runs = {
        height: mala(
            lambda z, h=height: h * (z[:, 0] ** 2 - 1) ** 2 + 0.5 * z[:, 1] ** 2,
            starts,
            step_size=0.1,
            n_steps=1500,
            warmup=200,
            generator=generator(5),
        )
        for height in (1.0, 10.0)
    }
    for run in runs.values():
        assert float(run.acceptance.mean()) == pytest.approx(0.574, abs=0.04)
    assert float(runs[1.0].r_hat[0]) < 1.1
    x = torch.linspace(0, 3, 3001, dtype=torch.float64)  # one well, by quadrature
    p = (-10 * (x**2 - 1) ** 2).softmax(0)
    mean, square = float(p @ x), float(p @ x**2)
    stuck = math.sqrt(1 + mean**2 / (square - mean**2))  # as in the exercise
    assert 8 < stuck < 9 and float(runs[10.0].r_hat[0]) == pytest.approx(stuck, rel=0.05)
    # The scores see that the sides do not overlap, and no distance: 1.66, and 128 halves instead of many.
    assert float(runs[10.0].rank_r_hat[0]) == pytest.approx(math.sqrt(math.pi / (math.pi - 2)), rel=0.02)
    one_side = mala(
        lambda z: 10 * (z[:, 0] ** 2 - 1) ** 2 + 0.5 * z[:, 1] ** 2,
        starts.abs(),
        step_size=0.1,
        n_steps=1500,
        warmup=200,
        generator=generator(6),
    )
    assert float(one_side.r_hat[0]) < 1.1  # nothing to see


@pytest.mark.checks("eq-latent_mcmc-pullback", how="exact")
def test_the_pull_back_gives_the_model_and_the_sources_energy_does_not():
    with mp.workdps(30):

        def f(x):  # a test function
            return mp.cos(x) + x**2 / 7

        def u(x):
            return x**4 / 9 + x / 2

        line = [-mp.inf, -1, 1, mp.inf]
        expected = mp.quad(lambda x: f(x) * mp.exp(-u(x)), line)
        bounds = [-4, -2, 0, 2, 4]  # sinh 4 = 27: nothing beyond
        pulled = mp.quad(lambda z: f(mp.sinh(z)) * mp.exp(-u(mp.sinh(z))) * mp.cosh(z), bounds)
        assert abs(pulled - expected) < 1e-20

        # A bounded generator, 2 tanh: the model cut off at its range and normalised there, not the model.
        cosh = [mp.quad(lambda z, g=g: g(2 * mp.tanh(z)) * mp.exp(-u(2 * mp.tanh(z))) * 2 / mp.cosh(z) ** 2,
                        [-mp.inf, -1, 0, 1, mp.inf]) for g in (f, lambda x: 1)]  # fmt: skip
        cut, line_of = (
            mp.quad(lambda x: f(x) * mp.exp(-u(x)), ends) / mp.quad(lambda x: mp.exp(-u(x)), ends)
            for ends in ([-2, 0, 2], line)
        )
        assert abs(cosh[0] / cosh[1] - cut) < 1e-15 and abs(cut - line_of) > 0.01

        # A curve (t, t^2 / 2) in the plane, parametrised by z -> t = sinh z; arc length by its closed form
        def on_curve(t):
            return mp.exp(-u(t) - t**4 / 8) * f(t)

        def arc(t):
            return (t * mp.sqrt(1 + t**2) + mp.asinh(t)) / 2

        by_area = mp.quad(lambda t: on_curve(t) * mp.diff(arc, t), [-6, -2, 0, 2, 6])
        by_code = mp.quad(
            lambda z: on_curve(mp.sinh(z)) * mp.sqrt(mp.cosh(z) ** 2 + (mp.sinh(z) * mp.cosh(z)) ** 2),
            [-mp.asinh(6), -1, 0, 1, mp.asinh(6)],
        )
        assert abs(by_area - by_code) < 1e-15


@pytest.mark.checks("eq-latent_mcmc-source-density", how="exact")
def test_without_the_jacobian_the_samples_have_another_density():
    """E f under codes of energy U(sinh z), against the density e^-U / cosh(asinh x) on x; then U = -log p_G."""
    with mp.workdps(30):

        def u(x):
            return x**4 / 9 + x / 2

        def f(x):
            return mp.cos(x) + x**2 / 7

        codes = mp.quad(lambda z: f(mp.sinh(z)) * mp.exp(-u(mp.sinh(z))), [-4, -2, 0, 2, 4])
        data = mp.quad(lambda x: f(x) * mp.exp(-u(x)) / mp.sqrt(1 + x**2), [-mp.inf, -1, 1, mp.inf])
        assert abs(codes - data) < 1e-20

        def p_generated(x):  # derivative of the distribution function of sinh z
            return mp.diff(lambda v: mp.ncdf(mp.asinh(v)), x)

        for z in (mp.mpf("0.3"), mp.mpf("-1.7")):
            assert abs(p_generated(mp.sinh(z)) - mp.npdf(z) / mp.cosh(z)) < 1e-12


@pytest.mark.checks("eq-latent_mcmc-sinh", how="exact")
def test_the_variance_for_sinh():
    with mp.workdps(30):
        weights = [mp.quad(lambda z, k=k: z**k * mp.npdf(z) / mp.cosh(z), [-mp.inf, 0, mp.inf]) for k in (0, 2)]
        assert mp.nstr(weights[1] / weights[0], 3) == "0.592"
        # The same on the data's side: asinh(x)^2 under p_G(x) / sqrt(1 + x^2), p_G by its change of variables
        other = [
            mp.quad(
                lambda x, k=k: (
                    mp.asinh(x) ** k
                    * mp.exp(-(mp.asinh(x) ** 2) / 2)
                    / (1 + x**2)
                    * mp.sqrt(1 + x**2)
                    / mp.sqrt(1 + x**2)
                ),
                [-mp.inf, -10, 0, 10, mp.inf],
            )
            for k in (0, 2)
        ]
        assert abs(other[1] / other[0] - weights[1] / weights[0]) < 1e-8


def generated_energy(x):
    """-log p_G of x = sinh z for z from N(0, 1): energy and generator agree."""
    return 0.5 * torch.asinh(x[:, 0]).square() + 0.5 * torch.log1p(x[:, 0].square())


@pytest.mark.parametrize(("term", "variance"), [("jacobian", 1.0), ("none", 0.592)])
@pytest.mark.checks("eq-latent_mcmc-sinh", how="statistical")
@pytest.mark.checks("eq-latent_mcmc-source-density", how="statistical")
def test_where_energy_and_generator_agree_codes_should_stay(term, variance):
    run = mala(
        latent_energy(generated_energy, torch.sinh, term=term),
        normal(400, 1),
        step_size=1.0,
        n_steps=400,
        warmup=100,
        generator=generator(7),
    )
    assert_z(run.samples.square().mean((0, 2)).numpy(), variance)


@pytest.mark.checks("eq-latent_mcmc-folded", how="exact")
def test_a_folded_generator_counts_its_codes():
    """The map z³ - 3z has three codes for |x| < 2 and one beyond; it folds at z = -1 and 1, where x = 2 and -2."""
    with mp.workdps(30):

        def density(x):
            return mp.exp(-((x - mp.mpf("0.5")) ** 2) / 3)

        for f in (lambda x: 1, lambda x: x, mp.cos):
            codes = mp.quad(
                lambda z, f=f: f(z**3 - 3 * z) * density(z**3 - 3 * z) * abs(3 * z**2 - 3), [-4, -2, -1, 0, 1, 2, 4]
            )
            once, inside = (
                mp.quad(lambda x, f=f: f(x) * density(x), places) for places in ([-52, -9, -2, 0, 2, 9, 52], [-2, 0, 2])
            )
            assert abs(codes - (once + 2 * inside)) < mp.mpf(10) ** -15
            assert abs(codes - once) > 0.1


@pytest.mark.checks("eq-latent_mcmc-improper", how="exact")
def test_a_bounded_generators_normaliser_grows_without_bound():
    """G = 2 tanh, U = x^2 <= 4 = M, on the line: V_1 = 2. With the Jacobian the integral converges."""
    with mp.workdps(30):
        for radius in (1, 10, 1000):
            points = [-radius, -3, 0, 3, radius] if radius > 3 else [-radius, 0, radius]
            inside = mp.quad(lambda z: mp.exp(-((2 * mp.tanh(z)) ** 2)), points)
            assert inside >= mp.exp(-4) * 2 * radius
        assert inside > 30
        proper = mp.quad(lambda z: mp.exp(-((2 * mp.tanh(z)) ** 2)) * 2 / mp.cosh(z) ** 2, [-mp.inf, 0, mp.inf])
        assert abs(proper - mp.quad(lambda x: mp.exp(-(x**2)), [-2, 0, 2])) < 1e-20


@pytest.mark.checks("eq-latent_mcmc-drift", how="statistical")
def test_on_a_flat_energy_the_chain_is_a_random_walk():
    d, eps, n = 3, 0.7, 50
    start = normal(2000, d)
    run = mala(lambda z: z.sum(1) * 0, start, step_size=eps, n_steps=n, target_acceptance=None, generator=generator(8))
    assert (run.acceptance == 1).all()
    assert_z((run.samples[-1].square().sum(1) - start.square().sum(1)).numpy(), d * eps * n)


@pytest.mark.checks("eq-latent_mcmc-residual", how="exact")
def test_residual_energies_for_an_invertible_and_a_folded_generator():
    """E f(G(z)) e^-W(G(z)) over codes against the integral with p_G: chi-squared for the square, lognormal for exp."""
    with mp.workdps(30):

        def weighted(x):  # f times e^-W
            return 1 / (2 + x**2) * mp.exp(-mp.atan(x))

        cuts = [mp.mpf(c) for c in (-11, -6, -3, -1, 0, 1, 3, 6, 11)]  # beyond 11 there is less than 1e-27

        def codes(g):
            return mp.quad(lambda z: mp.npdf(z) * weighted(g(z)), cuts)

        folded = mp.quad(
            lambda r: weighted(r**2) * mp.exp(-(r**2) / 2) / mp.sqrt(2 * mp.pi * r**2) * 2 * r, cuts[4:]
        )  # the density of chi-squared at x = r^2, dx = 2 r dr
        assert abs(codes(lambda z: z**2) - folded) < 1e-20
        generated = mp.quad(lambda x: weighted(mp.log(x)) * mp.npdf(mp.log(x)) / x, [mp.exp(c) for c in cuts])
        assert (
            abs(codes(lambda z: mp.log(mp.exp(z))) - generated) < 1e-8
        )  # G = exp, W and f of log x: lognormal density


def test_the_logit_of_the_best_discriminator_is_the_log_ratio():
    """Its probability of a datum is p / (p + p_G); the logarithm of the ratio is the logit of that."""
    t = sp.symbols("t", real=True)
    p, g = sp.symbols("p p_G", positive=True)
    sigmoid = 1 / (1 + sp.exp(-t))
    gain = p * sp.log(sigmoid) + g * sp.log(1 - sigmoid)  # at one place, with its densities of data and samples
    best = sp.log(p) - sp.log(g)
    assert sp.simplify(sp.diff(gain, t).subs(t, best)) == 0
    assert sp.simplify(sp.diff(gain, t, 2)).subs({p: 2, g: 3, t: 1}) < 0
    assert sp.simplify(sigmoid.subs(t, best) - p / (p + g)) == 0


@pytest.mark.checks("eq-latent_mcmc-residual", how="statistical")
def test_the_prior_is_right_for_a_residual_and_too_sharp_for_a_model():
    """G = 2 z and the model N(0, 1): W = log p_G - log q gives variance 1; U in place of W gives 4 / 5."""

    def model(x):
        return 0.5 * x[:, 0].square()

    def residual(x):
        return model(x) - x[:, 0].square() / 8

    for energy, variance in ((residual, 1.0), (model, 0.8)):
        run = mala(
            latent_energy(energy, lambda z: 2 * z, term="prior"),
            normal(400, 1),
            step_size=0.2,
            n_steps=400,
            warmup=100,
            generator=generator(9),
        )
        assert_z((2 * run.samples).square().mean((0, 2)).numpy(), variance)


RING = 2 * torch.tensor([[math.cos(k * math.pi / 3), math.sin(k * math.pi / 3)] for k in range(6)]).double()


def ring(x):
    """Six Gaussians on a ring, sigma 0.2: minus the logarithm of their density."""
    squares = (x[:, None] - RING).square().sum(2)
    return -torch.logsumexp(-squares / 0.08, dim=1) + math.log(6 * 2 * math.pi * 0.04)


def ring_generator(z):
    r = (z.square().sum(1, keepdim=True) + 1e-12).sqrt()
    return 2.7 * torch.tanh(r / 1.4) * z / r


def ring_quadrature(term):
    """Share within 3 sigma and KL to the model of G(z), by quadrature over the codes, in polar coordinates."""
    r = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 * 12
    angle = (torch.arange(600, dtype=torch.float64) + 0.5) / 600 * 2 * math.pi
    x = 2.7 * torch.tanh(r / 1.4)
    log_det = torch.log(2.7 / 1.4 / torch.cosh(r / 1.4) ** 2 * x / r)[:, None]
    points = torch.stack([x[:, None] * angle.cos(), x[:, None] * angle.sin()], -1)
    u = ring(points.reshape(-1, 2)).reshape(len(r), -1)
    prior = 0.5 * r[:, None].square()
    energy = {"generator": prior + 0 * u, "prior": u + prior, "jacobian": u - log_det}[term]
    log_cell = r.log()[:, None] - energy
    log_p = -energy - torch.logsumexp(log_cell.flatten(), 0) - math.log(12 / 2000 * 2 * math.pi / 600)
    mass = (log_p + r.log()[:, None]).exp() * 12 / 2000 * 2 * math.pi / 600
    near = (points[..., None, :] - RING).square().sum(-1).amin(-1) < 0.36
    good = torch.where(mass > 0, mass * (log_p - log_det + u), 0)
    return float((mass * near).sum()), float(good.sum())


def test_the_ring_of_the_chapter():
    shares = {term: ring_quadrature(term) for term in ("generator", "prior", "jacobian")}
    assert shares["generator"][0] < 1 / 3
    assert (
        shares["jacobian"][0] == pytest.approx(1 - math.exp(-4.5), abs=1e-3) and shares["jacobian"][1] < 5e-4
    )  # beyond the bound
    assert shares["jacobian"][0] < shares["prior"][0] and 0.001 < shares["prior"][1] < 0.01
    for term in ("prior", "jacobian"):
        run = mala(
            latent_energy(ring, ring_generator, term=term),
            normal(600, 2),
            step_size=0.02,
            n_steps=200,
            warmup=200,
            thin=5,
            generator=generator(10),
        )
        x = ring_generator(run.samples.flatten(0, 1))
        near = ((x[:, None] - RING).square().sum(2).amin(1) < 0.36).double().reshape(-1, 600).mean(0)
        assert_z(near.numpy(), shares[term][0])


def test_exercise_values():
    assert 4 / math.pi * math.asin(math.sqrt(1 / 3)) == pytest.approx(2 * stats.beta.cdf(1 / 3, 0.5, 0.5))


def test_the_benchmark_runs_the_same_chains_and_places_its_table(tmp_path, monkeypatch):
    import mala as benchmark

    few = {name: 30 for name in benchmark.STEPS}
    for target, (dim, eps) in benchmark.TARGETS.items():
        shares = [make(target, 30)(0)[1] for make in (benchmark.of_mala, benchmark.of_loop)]
        assert abs(shares[0] - shares[1]) < 0.05
        if dim == 16:  # exactly known at stationarity, where they start
            exact = 2 * stats.beta.cdf(0.5 * (1 - 1 / math.sqrt(1 + 64 / eps**3)), 8, 8)
            assert shares == pytest.approx([exact] * 2, abs=0.03)
        lines = benchmark.measure(target, 1, few)
        assert [line.split(" | ")[1] for line in lines[:2]] == ["mala", "a loop over chains"]
    (tmp_path / "benchmarks").mkdir()
    readme = tmp_path / "benchmarks" / "README.md"
    readme.write_text((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    for text in ("before\n", "after\n"):
        benchmark.place(text)
    found = readme.read_text(encoding="utf-8")
    assert "<!-- mala -->\nafter\n<!-- end -->" in found and "\nbefore\n" not in found and "<!-- cpu -->" in found


class Agreed(torch.nn.Module):
    """Energy and generator of N(0, 0.09 I), which agree."""

    surrogate = None

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.3))

    def decode(self, z):
        return self.scale * z

    def energy_of(self, x):
        return 0.5 * (x / self.scale).square().sum(1) - 7  # its zero does not matter


@pytest.mark.parametrize(
    ("term", "divergence", "length"), [("before", 0, 2), ("jacobian", 0, 2), ("none", 0, 2), ("prior", None, 1)]
)
def test_the_study_of_chains_where_everything_is_known(term, divergence, length, monkeypatch):
    monkeypatch.setattr(meg_chains, "build", lambda *_: Agreed())
    monkeypatch.setattr(meg_chains.Recipe, "fit", lambda *_, **__: None)
    monkeypatch.setattr(meg_chains, "draw", lambda *_: None)
    study = meg_chains.STUDIES[f"meg_mcmc_{term}"]
    recipe = dataclasses.replace(study.recipe("plane", "short"), chains=1500, draws=1500)
    if recipe.term:
        recipe = dataclasses.replace(recipe, warmup=60, chain_steps=60)
    found = study.run(recipe, "plane", 0, torch.device("cpu")).metrics
    # The product of both has half the variance, and KL(N(0, s²/2) | N(0, s²)) = log 2 - 1/2 in the plane.
    expected = math.log(2) - 0.5 if divergence is None else divergence
    assert found["KL(samples | energy)"] == pytest.approx(expected, abs=0.1)
    assert found["draws of the energy: KL(samples | energy)"] == pytest.approx(0, abs=0.1)
    assert found["mean of |z|²"] == pytest.approx(length, abs=0.15)
    assert found["codes on the smaller side of a fold, %"] == 0
    modes = 2 / math.sqrt(8) * (torch.cartesian_prod(torch.arange(5), torch.arange(5)) - 2.0).double()
    grid = torch.linspace(-1.5, 1.5, 1501, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    near = torch.cdist(points, modes).amin(1) < 3 * 0.05 / math.sqrt(8)
    share = float((-points.square().sum(1) / 0.18).softmax(0)[near].sum())
    assert found["energy: high quality, %"] == pytest.approx(100 * share, rel=0.02)
    if divergence == 0:
        assert found["high quality, %"] == pytest.approx(100 * share, abs=4 * 100 * math.sqrt(share / 1500))


def test_the_recorded_chains_walk_on_the_energy_of_the_chapter_before():
    runs = {
        term: json.loads((ROOT / f"book/results/meg_mcmc_{term}/plane-medium.json").read_text(encoding="utf-8"))
        for term in ("before", "none", "prior", "jacobian")
    }
    toy = json.loads((ROOT / "book/results/meg_toy/plane-medium.json").read_text(encoding="utf-8"))
    same = ("width", "rows", "epochs", "batch_size", "lr", "steps", "lam", "surrogate")
    for run in runs.values():
        assert all(run[key] == toy[key] for key in same) and run["chains"] == 2500 and run["seeds"] == [0, 1, 2]
        assert (run["warm-up"], run["chain steps"]) == (200, 400) if run is not runs["before"] else True
    energies = [run["metrics"]["energy: high quality, %"]["by seed"] for run in runs.values()]
    assert all(energy == pytest.approx(energies[0], rel=1e-6) for energy in energies)  # the same one in all columns
