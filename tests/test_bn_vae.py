"""Chapter *Posterior collapse and batch norm*: every equation, the property of the floor, the model and its study."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import hypothesis.strategies as st
import mpmath as mp
import pytest
import sympy as sp
import torch
from helpers import assert_z
from hypothesis import given
from torch import nn

from gae_core import metrics, nets, train
from gae_core.gaussian import kl_to_standard_normal
from gae_core.models.bn_vae import AutoregressiveVAE, PixelDecoder
from gae_core.normalization import CodeBatchNorm, CoupledBatchNorm, FixedScaleBatchNorm, FixedScaleLayerNorm
from gae_core.studies import bn_vae as study

ROOT = Path(__file__).parents[1]
EPS = 1e-5  # of the norms


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
    torch.set_default_dtype(torch.float32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- one direction of a linear VAE ---

A, W = sp.symbols("a w", real=True)
S2, LAM, BETA, VAR, GAMMA = sp.symbols("s2 lambda beta v gamma", positive=True)


def direction_loss(a, w, variance):
    """Written out from E (x - w z)² with z = a x + sigma eps, x of variance lambda, and the Gaussian divergence."""
    x, eps, sigma = sp.symbols("x eps sigma")
    squared = sp.expand((x - w * (a * x + sigma * eps)) ** 2)
    mean = squared.coeff(x, 2) * LAM + squared.coeff(eps, 2).subs(sigma**2, variance)
    return mean / (2 * S2) + BETA * (a**2 * LAM + variance - sp.log(variance) - 1) / 2


@pytest.mark.checks("eq-bn_vae-reduced", how="symbolic")
@pytest.mark.checks("eq-bn_vae-collapse", how="symbolic")
def test_a_direction_is_used_where_its_variance_is_above_the_noise():
    loss = direction_loss(A, W, VAR)
    best = {v: sp.solve(sp.diff(loss, v), v)[0] for v in (A, VAR)}
    c = W**2 + BETA * S2
    reduced = sp.simplify(loss.subs({A: best[A], VAR: best[VAR]}))
    expected = BETA / 2 * (LAM / c + sp.log(c / (BETA * S2)))
    assert sp.simplify(sp.expand_log(reduced - expected, force=True)) == 0

    # In c >= beta s2 the slope has the sign of c - lambda: the minimum is at max(lambda, beta s2).
    t = sp.symbols("t", positive=True)
    slope = sp.diff(BETA / 2 * (LAM / t + sp.log(t)), t)
    assert sp.simplify(slope - BETA * (t - LAM) / (2 * t**2)) == 0
    at = {W: sp.sqrt(LAM - BETA * S2)}
    divergence = (A**2 * LAM + VAR - sp.log(VAR) - 1) / 2
    used = divergence.subs({A: best[A], VAR: best[VAR]}).subs(at)
    assert sp.simplify(sp.expand_log(used - sp.log(LAM / (BETA * S2)) / 2, force=True)) == 0
    assert sp.simplify(divergence.subs({A: best[A], VAR: best[VAR]}).subs(W, 0)) == 0


@pytest.mark.checks("eq-bn_vae-saddle", how="symbolic")
def test_the_collapsed_point_is_stationary_and_a_saddle_above_the_noise():
    loss = direction_loss(A, W, VAR)
    point = {A: 0, W: 0, VAR: 1}
    assert [sp.diff(loss, v).subs(point) for v in (A, W, VAR)] == [0, 0, 0]
    determinant = sp.hessian(loss, (A, W)).subs(point).det()
    assert sp.simplify(determinant - LAM / S2 * (BETA - LAM / S2)) == 0


@pytest.mark.checks("eq-bn_vae-escape", how="symbolic")
def test_with_batch_norm_a_decoder_that_ignores_the_code_is_not_stationary():
    loss = direction_loss(GAMMA / sp.sqrt(LAM), W, VAR)
    assert sp.simplify(sp.diff(loss, W).subs(W, 0) + GAMMA * sp.sqrt(LAM) / S2) == 0
    (best,) = sp.solve(sp.diff(loss, W), W)
    assert sp.simplify(best - GAMMA * sp.sqrt(LAM) / (GAMMA**2 + VAR)) == 0
    saved = loss.subs(W, 0) - loss.subs(W, best)
    assert sp.simplify(saved - LAM * GAMMA**2 / (2 * S2 * (GAMMA**2 + VAR))) == 0


# --- the floor ---


def numbers(rng, rows, columns, scale=1.0):
    return [[mp.mpf(rng.gauss(0.5, scale)) for _ in range(columns)] for _ in range(rows)]


def mean(values):
    values = list(values)
    return mp.fsum(values) / len(values)


def batch_norm(column, eps):
    m = mean(column)
    v = mean((u - m) ** 2 for u in column)
    return [(u - m) / mp.sqrt(v + eps) for u in column], v


def divergence(mu, variance):
    """From the definition of the KL divergence, E log q - E log p, by the Gaussian entropy and second moment."""
    return -mp.log(2 * mp.pi * mp.e * variance) / 2 + (mp.log(2 * mp.pi) + mu**2 + variance) / 2


@pytest.mark.checks("eq-bn_vae-kl-mean", how="exact")
@pytest.mark.checks("eq-bn_vae-moment", how="exact")
@pytest.mark.checks("eq-bn_vae-bound", how="exact")
def test_the_floor_of_the_divergence_on_a_batch():
    rng = random.Random(0)
    with mp.workdps(40):
        eps = mp.mpf(10) ** -5
        for rows, columns, scale in ((2, 1, 1.0), (7, 3, 0.01), (5, 4, 2.0)):
            raw, spread = numbers(rng, rows, columns, scale), numbers(rng, rows, columns)
            gammas = [mp.mpf(rng.uniform(0.2, 1.5)) for _ in range(columns)]
            betas = [mp.mpf(rng.gauss(0, 1)) for _ in range(columns)]
            floor = total = mp.mpf(0)
            for j in range(columns):
                normed, v = batch_norm([row[j] for row in raw], eps)
                mu = [gammas[j] * u + betas[j] for u in normed]
                moment = gammas[j] ** 2 * v / (v + eps) + betas[j] ** 2
                assert abs(mean(m**2 for m in mu) - moment) < mp.mpf(10) ** -35
                for m, row in zip(mu, spread, strict=True):
                    assert divergence(m, mp.e ** row[j]) >= m**2 / 2
                    assert abs(divergence(m, mp.mpf(1)) - m**2 / 2) < mp.mpf(10) ** -35, "equality at sigma = 1"
                total += mean(divergence(m, mp.e ** row[j]) for m, row in zip(mu, spread, strict=True))
                floor += moment / 2
            assert total >= floor > 0


@given(
    n=st.integers(2, 40),
    d=st.integers(1, 6),
    seed=st.integers(0, 1000),
    exponent=st.floats(-5, 3),
    gamma=st.floats(0.05, 3),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_on_every_batch_the_module_keeps_the_divergence_at_or_above_the_floor(n, d, seed, exponent, gamma, spread):
    """The second moments are those of the statement to rounding, and no log-variance, up to some 100, goes below."""
    draws = torch.randn(3, n, d, generator=seeded(seed))
    mu, raw = 10.0**exponent * (draws[0] + 2), spread * draws[1]
    norm = FixedScaleBatchNorm(d, gamma)
    with torch.no_grad():
        norm.beta.copy_(draws[2, 0])
        out, logvar = norm(mu, raw)
    v = mu.var(0, correction=0)
    floor = 0.5 * (gamma**2 * v / (v + EPS) + norm.beta.detach() ** 2).sum()
    torch.testing.assert_close(0.5 * out.square().sum(1).mean(), floor, rtol=1e-9, atol=1e-12)
    kl = kl_to_standard_normal(out, logvar).mean()
    assert kl >= floor * (1 - 1e-9)
    if spread == 0:
        torch.testing.assert_close(kl, floor, rtol=1e-9, atol=1e-12)


@pytest.mark.checks("eq-bn_vae-running", how="statistical")
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_running_variances_vary_by_the_stated_amount(momentum):
    """4,000 coordinates, replicates, of the module itself; after 150 batches the start has weight 1e-7 or less."""
    size, norm = 16, CodeBatchNorm(4000, momentum=momentum)
    for _ in range(150):
        norm(torch.rand(size, 4000, generator=GENERATOR) * 12**0.5)  # uniform: variance 1, kurtosis 1.8
    squared = (norm.running_var - 1).square()
    expected = momentum / (2 - momentum) * (2 / (size - 1) + (1.8 - 3) / size)
    assert_z(squared, expected)
    with pytest.raises(AssertionError):
        assert_z(squared, momentum / (2 - momentum) * 2 / (size - 1))  # the kurtosis of a normal is seen


GENERATOR = torch.Generator().manual_seed(5)


# --- layer norm, and what batch norm does guarantee ---


@pytest.mark.checks("eq-bn_vae-layer-bound", how="exact")
def test_layer_norm_has_the_same_floor_for_every_single_image():
    rng = random.Random(1)
    with mp.workdps(40):
        eps, gamma = mp.mpf(10) ** -5, mp.mpf("0.7")
        for row, spread in zip(numbers(rng, 5, 6), numbers(rng, 5, 6), strict=True):
            normed, v = batch_norm(row, eps)
            mu = [gamma * u for u in normed]
            floor = 6 * gamma**2 * v / (v + eps) / 2
            assert abs(mp.fsum(m**2 for m in mu) / 2 - floor) < mp.mpf(10) ** -35
            assert mp.fsum(divergence(m, mp.e**s) for m, s in zip(mu, spread, strict=True)) >= floor


def test_layer_norm_counterexample_a_floor_without_information():
    """Equal means for all images: the divergence is at its floor, and posteriors that are one carry nothing."""
    same = torch.randn(1, 8).expand(50, -1)
    mu, logvar = FixedScaleLayerNorm(8, 0.7)(same, torch.zeros(50, 8))
    v = same[0].var(correction=0)
    floor = 0.5 * 8 * 0.49 * v / (v + EPS)
    torch.testing.assert_close(kl_to_standard_normal(mu, logvar), floor.expand(50))
    assert metrics.encoder_information(mu, logvar, generator=seeded()).mutual_information == pytest.approx(0, abs=1e-12)
    spread, _ = FixedScaleBatchNorm(8, 0.7)(same + 1e-1 * torch.randn(50, 8), torch.zeros(50, 8))
    torch.testing.assert_close(spread.std(0, correction=0), torch.full((8,), 0.7), rtol=1e-2, atol=0)


def information(means, deviations):
    """I(i; z) of a uniform index and z ~ N(means[i], deviations[i]²), by quadrature."""
    n = len(means)

    def density(z):
        return [mp.npdf(z, m, s) for m, s in zip(means, deviations, strict=True)]

    def integrand(z):
        q = density(z)
        mixture = mp.fsum(q) / n
        return mp.fsum(p * mp.log(p / mixture) for p in q if p > 0) / n

    low = min(m - 12 * s for m, s in zip(means, deviations, strict=True))
    high = max(m + 12 * s for m, s in zip(means, deviations, strict=True))
    return mp.quad(integrand, mp.linspace(low, high, 25))


@pytest.mark.checks("eq-bn_vae-information", how="exact")
def test_spread_means_carry_information_where_the_noise_is_bounded():
    rng = random.Random(2)
    with mp.workdps(30):
        for rows in (2, 3, 6):
            raw = [mp.mpf(rng.gauss(0, 1)) for _ in range(rows)]
            normed, _ = batch_norm(raw, mp.mpf(10) ** -5)
            means = [mp.mpf("0.7") * u + mp.mpf("0.2") for u in normed]
            deviations = [mp.mpf(rng.uniform(0.4, 1.1)) for _ in range(rows)]
            found, s = information(means, deviations), max(deviations)
            m2 = mean((m - mean(means)) ** 2 for m in means)
            width = max(means) - min(means)
            bound = m2 / (2 * (s**2 + width**2 / 4))
            assert found >= bound >= m2 / (2 * s**2 + rows * m2) > 0
        # Nothing better in general: two close posteriors reach the first bound to higher order in their distance.
        means, h = [-mp.mpf("0.05"), mp.mpf("0.05")], mp.mpf("0.05")
        assert information(means, [mp.mpf(1)] * 2) / (h**2 / (2 * (1 + h**2))) == pytest.approx(1, abs=5e-3)
        # Where sigma grows with the means fixed, the divergence grows and the information goes.
        found = [information([mp.mpf(-1), mp.mpf(1)], [mp.mpf(s)] * 2) for s in (1, 10)]
        assert found[1] < mp.mpf("0.006") < found[0] and divergence(mp.mpf(1), mp.mpf(100)) > 40


@pytest.mark.checks("eq-bn_vae-aggregate", how="exact")
@pytest.mark.parametrize("gamma", ["1.2", "1.5"])
def test_a_scale_above_one_keeps_the_aggregate_from_the_prior(gamma):
    with mp.workdps(30):
        gamma = mp.mpf(gamma)
        means, deviations = [-gamma, gamma, -gamma, gamma], [mp.mpf(x) for x in ("0.3", "0.4", "0.5", "0.6")]
        m2 = mean(m**2 for m in means) + mean(s**2 for s in deviations)

        def integrand(z):
            q = mean(mp.npdf(z, m, s) for m, s in zip(means, deviations, strict=True))
            return q * mp.log(q / mp.npdf(z)) if q > 0 else mp.mpf(0)

        found = mp.quad(integrand, mp.linspace(-8, 8, 33))
        assert found >= (m2 - 1 - mp.log(m2)) / 2 > (gamma**2 - 1 - mp.log(gamma**2)) / 2 > 0


# --- the coupled norm ---


@pytest.mark.checks("eq-bn_vae-coupled-moment", how="exact")
@pytest.mark.checks("eq-bn_vae-coupled-bound", how="exact")
def test_the_coupled_norms_moments_and_floor():
    rng = random.Random(3)
    with mp.workdps(40):
        eps, floor, tau = mp.mpf(10) ** -5, mp.mpf(10) ** -6, mp.mpf("0.3")
        for rows, theta in ((2, 0.5), (5, -3.0), (8, 2.0)):
            logistic = 1 / (1 + mp.e ** -mp.mpf(theta))
            share_mu, share_sigma = tau + (1 - tau) * logistic, (1 - tau) * (1 - logistic)
            normed, v = batch_norm([mp.mpf(rng.gauss(0, 0.05)) for _ in range(rows)], eps)
            other, w = batch_norm([mp.mpf(rng.gauss(0, 0.05)) for _ in range(rows)], eps)
            mu = [mp.sqrt(share_mu) * u for u in normed]
            variance = [share_sigma * u**2 + floor for u in other]
            moments = share_mu * v / (v + eps), share_sigma * w / (w + eps) + floor
            both = mean(m**2 for m in mu) + mean(variance)
            assert abs(both - sum(moments)) < mp.mpf(10) ** -35
            paid = mean(divergence(m, s) for m, s in zip(mu, variance, strict=True))
            assert paid >= (sum(moments) - 1 - mp.log(moments[1])) / 2
        # Without eps and floor; two rows are +1 and -1, so that |sigma| is constant: equality.
        for raw in ([mp.mpf(1), mp.mpf(-1)], [mp.mpf(rng.gauss(0, 1)) for _ in range(6)]):
            mu, sigma = ([mp.sqrt(s) * u for u in batch_norm(raw, 0)[0]] for s in (share_mu, share_sigma))
            paid = mean(divergence(m, s**2) for m, s in zip(mu, sigma, strict=True))
            lowest = -mp.log(share_sigma) / 2
            assert paid >= lowest - mp.mpf(10) ** -35 and lowest > -mp.log(1 - tau) / 2 > tau / 2
            assert (abs(paid - lowest) < mp.mpf(10) ** -35) == (len(raw) == 2)


@given(
    n=st.integers(2, 40),
    d=st.integers(1, 6),
    seed=st.integers(0, 1000),
    exponent=st.floats(-4, 3),
    tau=st.floats(0.01, 0.99),
)
def test_on_every_batch_the_coupled_norm_keeps_its_floor(n, d, seed, exponent, tau):
    draws = torch.randn(3, n, d, generator=seeded(seed))
    mu, raw = 10.0**exponent * (draws[0] + 2), 10.0**exponent * draws[1]
    norm = CoupledBatchNorm(d, tau)
    with torch.no_grad():
        norm.theta.copy_(3 * draws[2, 0])
        out, logvar = norm(mu, raw)
    v, w = mu.var(0, correction=0), raw.var(0, correction=0)
    scales = norm.squared_scales()
    m_mu, m_sigma = scales[0] * v / (v + EPS), scales[1] * w / (w + EPS) + 1e-6
    assert kl_to_standard_normal(out, logvar).mean() >= 0.5 * (m_mu + m_sigma - 1 - m_sigma.log()).sum() - 1e-9


def test_without_a_share_of_the_means_the_coupled_floor_is_zero():
    """As the source says: all the second moment to sigma, and a sigma of two values, is the prior for every datum."""
    norm = CoupledBatchNorm(2, 1e-12)
    nn.init.constant_(norm.theta, -40.0)
    mu, logvar = norm(torch.randn(30, 2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(15, 1))
    assert float(norm.squared_scales()[0].detach().max()) < 1e-11
    assert float(kl_to_standard_normal(mu, logvar).mean().detach()) < 1e-9


@pytest.mark.checks("eq-bn_vae-coupled-batch", how="exact")
@pytest.mark.parametrize("rows", [8, 32])
def test_two_valued_deviations_are_not_two_valued_in_a_batch(rows):
    """Over all numbers of positive ones but none and all, with their binomial probabilities."""
    with mp.workdps(40):
        average = square = mp.mpf(0)
        for positive in range(1, rows):
            m = (2 * mp.mpf(positive) - rows) / rows
            raw = [mp.mpf(1)] * positive + [mp.mpf(-1)] * (rows - positive)
            b, _ = batch_norm(raw, 0)
            found = mean(-mp.log(v**2) / 2 for v in b)
            claimed = m / 2 * mp.log((1 + m) / (1 - m))
            assert abs(found - claimed) < mp.mpf(10) ** -35 and claimed >= m**2
            if abs(m) < 0.2:
                assert claimed - m**2 <= m**4 / 2
            average += mp.binomial(rows, positive) / mp.mpf(2) ** rows * found
            square += mp.binomial(rows, positive) / mp.mpf(2) ** rows * m**2
        assert abs(square + 2 / mp.mpf(2) ** rows - mp.mpf(1) / rows) < mp.mpf(10) ** -35
        assert 1 < average * rows < 1 + mp.mpf(4) / rows
        # Normal outputs: b² / (B - 1) has the distribution Beta(1/2, B/2 - 1), and the sign is the other.
        normal = -(mp.log(rows - 1) + mp.psi(0, mp.mpf(1) / 2) - mp.psi(0, mp.mpf(rows - 1) / 2)) / 2
        assert normal - (mp.euler + mp.log(2)) / 2 == pytest.approx(-1 / (2 * (rows - 1)), rel=0.05)


def test_training_draws_the_deviations_of_the_coupled_norm_to_two_values_which_are_dearer_in_batches():
    """An encoder that is free for each datum, so that nothing but the divergence speaks; batches of 32."""
    n, d, size = 512, 4, 32
    raw, norm = nn.Parameter(torch.randn(n, d, generator=seeded())), CoupledBatchNorm(d, 0.5)
    mu, order = torch.randn(n, d, generator=seeded(1)), seeded(2)
    optimizer = torch.optim.Adam([raw], lr=0.1)

    def batches():
        return torch.randperm(n, generator=order).split(size)

    def cost(rows):
        return kl_to_standard_normal(*norm(mu[rows], raw[rows])).mean()

    def normalised():
        return ((raw - raw.mean(0)) / raw.std(0, correction=0)).detach().abs()

    assert (normalised() < 0.5).double().mean() > 0.3  # normal, at first
    for _ in range(20):
        for rows in batches():
            optimizer.zero_grad()
            cost(rows).backward()
            optimizer.step()
    assert (normalised() < 0.5).double().mean() < 0.01
    with torch.no_grad():
        paid = torch.stack([cost(rows) for _ in range(20) for rows in batches()])
        assert float(paid.mean() - cost(torch.arange(n))) == pytest.approx(d / size, rel=0.1)  # exact statistics
        norm.eval()
        assert paid.mean() > cost(torch.arange(n)) + 0.8 * d / size


@pytest.mark.checks("eq-bn_vae-dead", how="symbolic")
def test_what_a_dead_coordinate_pays_for_signed_standard_deviations():
    u = sp.symbols("u", positive=True)
    normal = 2 * sp.integrate(sp.log(u**2) * sp.exp(-(u**2) / 2) / sp.sqrt(2 * sp.pi), (u, 0, sp.oo))
    assert sp.simplify(sp.expand_log(normal + sp.EulerGamma + sp.log(2), force=True)) == 0
    uniform = sp.integrate(2 * sp.log(u), (u, 0, sp.sqrt(3))) / sp.sqrt(3)  # on [-√3, √3]: variance 1
    assert sp.simplify(sp.expand_log(uniform + 2 - sp.log(3), force=True)) == 0


@pytest.mark.checks("eq-bn_vae-slope", how="symbolic")
def test_the_floor_makes_the_slopes_second_moment_finite():
    u, delta = sp.symbols("u delta", positive=True)
    slope = sp.diff(sp.log(u**2 + delta), u)
    assert sp.simplify(2 * sp.integrate(slope**2, (u, 0, sp.oo)) - 2 * sp.pi / sp.sqrt(delta)) == 0
    assert sp.integrate(sp.diff(sp.log(u**2), u) ** 2, (u, 0, 1)) == sp.oo, "without it there is none"


def test_recorded_runs_of_the_coupled_norm_cost_less_in_evaluation_than_on_batches():
    """By about d / B = 8 / 32 nats, as two-valued deviations do; the means' norm alone hardly differs."""

    def difference(name, data):
        path = ROOT / "book" / "results" / f"text_{name}" / f"{data}-medium.json"
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return metrics["KL on batches"]["mean"] - metrics["KL"]["mean"]

    for data in ("learnable", "he2019"):
        assert all(0.1 < difference(f"coupled_{tau}", data) < 0.35 for tau in (0.2, 0.5, 0.8))
        assert all(abs(difference(f"bn_{gamma}", data)) < 0.1 for gamma in (0.3, 0.5, 0.7, 1.0, 1.2))


# --- another prior ---


@pytest.mark.checks("eq-bn_vae-vmf", how="exact")
@pytest.mark.parametrize("d", [2, 3, 8])
@pytest.mark.parametrize("kappa", ["0.5", "13"])
def test_the_divergence_of_von_mises_fisher_from_the_uniform(d, kappa):
    """By quadrature over the cosine t with the mean direction, whose density is exp(kappa t) (1 - t²)^((d - 3) / 2)."""
    with mp.workdps(40):
        kappa = mp.mpf(kappa)

        def integral(f, k):  # t = cos(phi), so that d = 2 has no poles
            return mp.quad(
                lambda p: f(mp.cos(p)) * mp.e ** (k * mp.cos(p)) * mp.sin(p) ** (d - 2), [0, mp.pi / 2, mp.pi]
            )

        z, z0 = integral(lambda t: 1, kappa), integral(lambda t: 1, 0)
        expected = integral(lambda t: kappa * t, kappa) / z - mp.log(z) + mp.log(z0)
        order = mp.mpf(d) / 2
        ratio = mp.besseli(order, kappa) / mp.besseli(order - 1, kappa)
        log_c = (order - 1) * mp.log(kappa) - order * mp.log(2 * mp.pi) - mp.log(mp.besseli(order - 1, kappa))
        area = mp.log(2 * mp.pi**order / mp.gamma(order))
        assert abs(kappa * ratio + log_c + area - expected) < mp.mpf(10) ** -30
        if d == 3:
            assert abs(expected - (kappa * mp.coth(kappa) - 1 + mp.log(kappa / mp.sinh(kappa)))) < mp.mpf(10) ** -30


def test_solution_batch_norm_and_then_layer_norm():
    """Rows a_i + b_i w: layer norm leaves the sign of b_i alone, batch norm before it makes both signs occur."""
    w = torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=torch.float64)
    a, b = torch.randn(2, 30, 1, dtype=torch.float64)
    b = 5 + b.abs()
    layer, batch = FixedScaleLayerNorm(4, 0.7, eps=1e-12), CodeBatchNorm(4, eps=1e-12)
    raw = torch.zeros(30, 4, dtype=torch.float64)
    same, _ = layer(a + b * w, raw)
    torch.testing.assert_close(same, same[:1].expand(30, -1))
    spread, _ = layer(batch(b * w), raw)  # batch norm makes them (b_i - mean) sign(w)
    rows = spread.round(decimals=6).unique(dim=0)
    assert len(rows) == 2 and torch.allclose(rows[0], -rows[1]) and rows.abs().min() > 0.3
    zero, _ = layer(batch(a.expand(-1, 4)), raw)
    assert zero.abs().max() < 1e-6


# --- errata of the source ---


def test_erratum_the_floor_is_a_sum_over_coordinates():
    """The source has d / 2 (beta² + gamma²) with one beta. With the smallest it bounds, with the largest not."""
    norm = FixedScaleBatchNorm(3, 0.5)
    with torch.no_grad():
        norm.beta.copy_(torch.tensor([2.0, -0.5, 1.8]))
    mu, logvar = norm(torch.randn(30, 3), torch.zeros(30, 3))
    kl = float(kl_to_standard_normal(mu, logvar).mean().detach())
    squares = norm.beta.detach().square().tolist()
    source = [3 / 2 * (square + 0.25) for square in squares]
    assert (
        [value <= kl for value in source] == [square <= sum(squares) / 3 for square in squares] == [False, True, False]
    )
    assert source[1] == min(source) < kl - 1, "and it is a loose bound"
    assert kl == pytest.approx(3 / 2 * (sum(squares) / 3 + 0.25), rel=1e-3), (
        "with the mean of the squares it is the floor"
    )


def test_erratum_the_floor_has_eps_in_it():
    """A small variance before the norm: the source's floor is broken, that with v / (v + eps) is kept."""
    mu = torch.randn(30, 1)
    mu = (mu - mu.mean()) / mu.std(correction=0) * EPS**0.5
    out, logvar = FixedScaleBatchNorm(1, 0.7)(mu, torch.zeros(30, 1))
    kl = float(kl_to_standard_normal(out, logvar).mean().detach())
    assert kl < 0.51 * (0.7**2 / 2)
    assert kl == pytest.approx(0.7**2 / 2 * 0.5, rel=1e-9)


def test_erratum_the_floor_is_that_of_batches():
    """In evaluation, with statistics that lag behind, the divergence can be anything."""
    norm, mu = FixedScaleBatchNorm(1, 0.7), torch.randn(500, 1)
    norm(10 * mu, mu)  # an early batch, ten times as wide
    out, logvar = norm.eval()(0.1 * mu, torch.zeros(500, 1))
    assert float(kl_to_standard_normal(out, logvar).mean().detach()) < 0.05 * 0.7**2 / 2


def test_erratum_the_coupled_floor_is_higher_than_that_of_the_means():
    """The source counts the means alone, tau / 2 a coordinate. Normalised deviations pay as well."""
    norm = CoupledBatchNorm(3, 0.5)
    for theta in (-20.0, 0.0):
        nn.init.constant_(norm.theta, theta)
        mu, logvar = norm(torch.randn(4000, 3), torch.randn(4000, 3))
        kl = float(kl_to_standard_normal(mu, logvar).mean().detach())
        right = -0.5 * float(norm.squared_scales()[1].log().sum().detach())
        assert kl > right >= -1.5 * math.log(0.5) - 1e-6 > 3 * 0.25
        assert kl == pytest.approx(right + 1.5 * (0.5772156649 + math.log(2)), rel=0.05)  # normal deviations


# --- the norms in a VAE ---


def images(n=40, seed=0):
    return torch.bernoulli(torch.full((n, 1, 5, 6), 0.4), generator=seeded(seed))


def model(norm=None, reach=1, dim=3, **options):
    torch.default_generator.manual_seed(0)
    encoder, _ = nets.mlp_pair((1, 5, 6), dim, hidden=(16,), heads=2)
    decoder = PixelDecoder((1, 5, 6), dim, reach=reach, channels=2, hidden=8, width=8)
    return AutoregressiveVAE(encoder, decoder, dim, norm=norm, **options)


NORMS = {
    "fixed": lambda: FixedScaleBatchNorm(3, 0.7),
    "layer": lambda: FixedScaleLayerNorm(3, 0.7),
    "coupled": lambda: CoupledBatchNorm(3, 0.5),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_reaches_the_loss_and_gradients_reach_all_parameters(name):
    m = model(NORMS[name]())
    loss = m.loss(images(), generator=seeded())
    mu, raw = m.encoder(images()).chunk(2, dim=1)
    torch.testing.assert_close(loss.kl, kl_to_standard_normal(*NORMS[name]()(mu, raw)))
    loss.total.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters())
    assert all(p.grad.abs().max() > 0 for p in m.norm.parameters())


@pytest.mark.parametrize("name", ["fixed", "coupled"])
def test_a_batch_of_one_is_refused_in_training_and_taken_in_evaluation(name):
    m, x = model(NORMS[name]()), images(1)
    with pytest.raises(ValueError, match=r"at least 2 rows in training, got 1; call \.eval\(\)"):
        m.loss(x)
    assert torch.isfinite(m.eval().loss(x).total).all()


@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_extreme_log_variances_are_finite_here_and_stop_a_training_where_they_overflow(value):
    m = model(FixedScaleBatchNorm(3, 0.7))
    with torch.no_grad():
        m.encoder[-1][-1].weight[3:] = 0
        m.encoder[-1][-1].bias[3:] = value
    loss = m.loss(images(), generator=seeded())
    expected = 3 * 0.5 * (math.exp(value) - value - 1)
    assert float(loss.kl.mean().detach()) == pytest.approx(expected + 3 * 0.49 / 2, rel=1e-3)
    torch.set_default_dtype(torch.float32)
    options = dict(epochs=1, batch_size=20, device="cpu", progress=False)
    if value > 0:  # exp(100) is above float32
        with pytest.raises(FloatingPointError, match="'kl' is inf"):
            train.fit(m.float(), images().float(), **options)
    else:
        assert torch.isfinite(train.fit(m.float(), images().float(), **options).history["total"]).all()


def test_training_never_falls_below_the_floor_and_the_plain_model_does():
    """Images without structure: nothing to say, so that the plain model's divergence vanishes."""
    torch.set_default_dtype(torch.float32)
    x = images(256).float()
    options = dict(epochs=40, batch_size=64, lr=1e-2, device="cpu", progress=False)
    lowest = {
        name: float(train.fit(model(norm).float(), x, **options).history["kl"].min())
        for name, norm in (("plain", None), ("fixed", FixedScaleBatchNorm(3, 0.7)), ("coupled", CoupledBatchNorm(3)))
    }
    assert lowest["plain"] < 0.1
    assert lowest["fixed"] >= 0.999 * 3 * 0.49 / 2
    assert lowest["coupled"] >= 1.5 * math.log(2)


# --- the decoder that sees pixels ---


def test_a_logit_depends_on_its_neighbours_before_it_and_the_code_alone():
    m, x, z = model(reach=2), images(1), torch.randn(1, 3)
    jacobian = torch.autograd.functional.jacobian(lambda v: m.decoder(v, z)[0, 0], x)[:, :, 0, 0]
    for (i, j), (k, n) in itertools.product(itertools.product(range(5), range(6)), repeat=2):
        near = abs(k - i) <= 2 and abs(n - j) <= 2 and (k, n) < (i, j)
        assert (jacobian[i, j, k, n] != 0) <= near, (i, j, k, n)
    assert (jacobian[3, 3, 1, 1:6] != 0).any() and jacobian[3, 3, 3, 2] != 0
    code = torch.autograd.functional.jacobian(lambda v: m.decoder(x, v)[0, 0], z)
    assert (code.abs().sum((2, 3)) > 0).all()


@pytest.mark.parametrize("reach", [0, 1])
def test_the_likelihood_sums_to_one_over_all_images(reach):
    decoder = PixelDecoder((1, 2, 3), 2, reach=reach, channels=2, hidden=8, width=8)
    m = AutoregressiveVAE(nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), decoder, 2)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).view(64, 1, 2, 3)
    for z in 3 * torch.randn(3, 2):
        total = m.log_likelihood(every, z.expand(64, 2)).exp().sum()
        assert float(total.detach()) == pytest.approx(1, abs=1e-12)


def test_drawn_images_have_the_probabilities_of_the_likelihood():
    decoder = PixelDecoder((1, 2, 2), 1, reach=1, channels=2, hidden=8, width=8)
    m = AutoregressiveVAE(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), decoder, 1)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).view(16, 1, 2, 2)
    z = torch.tensor([[1.5]])
    with torch.no_grad():
        decoder.map[0][-1].weight.mul_(10)  # so that the code's place matters
    drawn = m.decode(z.expand(20_000, 1), generator=seeded()).flatten(1)
    p = m.log_likelihood(every, z.expand(16, 1)).detach().exp()
    for image, probability in zip(every.view(16, 4), p, strict=True):
        assert_z((drawn == image).all(1).double(), float(probability))


def test_shared_noise_gives_equal_codes_equal_images():
    m = model()
    z = torch.randn(1, 3).expand(6, 3)
    shared, own = (m.decode(z, generator=seeded(), shared=s) for s in (True, False))
    assert (shared == shared[0]).all() and not (own == own[0]).all()
    assert torch.equal(m.sample(4, generator=seeded()), m.sample(4, generator=seeded()))
    assert m.sample(4).shape == (4, 1, 5, 6)


def test_without_reach_it_is_a_decoder_of_independent_pixels():
    m, z = model(reach=0), torch.randn(4, 3)
    zeros, ones = (torch.full((4, 1, 5, 6), v) for v in (0.0, 1.0))
    assert torch.equal(m.decoder(zeros, z), m.decoder(ones, z))


@pytest.mark.parametrize(("shape", "reach"), [((3, 4, 4), 1), ((1, 4, 4), -1)])
def test_images_with_colours_and_a_negative_reach_are_refused(shape, reach):
    with pytest.raises(ValueError, match="shape must have one colour and reach be at least 0, got"):
        PixelDecoder(shape, 2, reach=reach)


# --- the study ---


def test_the_gain_is_what_other_codes_cost():
    m = model().eval()
    assert study.gain(m, images(200)) != 0
    with torch.no_grad():
        m.decoder.map[0][0].weight.zero_()  # the decoder becomes deaf
    assert study.gain(m, images(200)) == pytest.approx(0, abs=1e-12)


def test_the_gain_of_a_known_decoder_is_the_distance_to_the_codes_of_other_images():
    """Half of the images have the code 0, half have 3, without noise: a code of another image costs 9, or nothing."""

    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def posterior(self, x):
            return 3 * x[:, 0, 0, :1], torch.full((len(x), 1), -80.0)

        def log_likelihood(self, x, z):
            return -(z - self.posterior(x)[0]).square().sum(1)

    x = torch.arange(2.0).repeat(1500)[:, None, None, None].expand(-1, 1, 5, 6)
    found = [study.gain(Known(), x, seed=seed) for seed in range(8)]
    assert_z(found, 9 * 0.5)
    assert study.gain(Known(), x[::2]) == pytest.approx(0, abs=1e-12)


def test_what_a_study_measures_of_a_known_model():
    """A model without a code: its likelihood is exact, of the first images alone, and all else is 0."""
    m = model(FixedScaleLayerNorm(3, 0.7)).eval()
    for network in (m.encoder, m.decoder):
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
    nn.init.constant_(list(m.decoder.pixel.parameters())[-1], -1.2)
    x = torch.zeros(40, 1, 5, 6)
    x[:10, :, 0] = 1  # six white pixels, of the first ten
    x[10:, :, :4] = 1

    def nll(white):
        return white * math.log1p(math.exp(1.2)) + (30 - white) * math.log1p(math.exp(-1.2))

    for images, expected in ((10, nll(6)), (40, (nll(6) + 3 * nll(24)) / 4)):
        found = study.measure(m, x, images=images, samples=8, seed=0)
        assert found["NLL"] == pytest.approx(expected) and found["NLL, fall on doubling"] == pytest.approx(0, abs=1e-9)
    assert found["KL"] == found["active units"] == 0 and found["cap of the information"] == math.log(40)
    for name in ("mutual information", "KL of the aggregate", "gain from z"):
        assert found[name] == pytest.approx(0, abs=1e-9)
    assert found["floor of the KL"] == pytest.approx(3 * 0.49 / 2)


@pytest.mark.parametrize("name", study.VARIANTS)
def test_every_variant_gets_the_training_that_the_settings_say_and_is_measured_on_test_images(name, monkeypatch):
    torch.set_default_dtype(torch.float32)
    x_train, x_test = (images(n, seed=s).float()[..., :4, :4].contiguous() for n, s in ((300, 0), (600, 1)))
    monkeypatch.setattr(study, "_load", lambda name: (x_train, x_test))
    monkeypatch.setitem(study.SIZES, "short", {"epochs": 4, "rows": 256, "test": 500, "images": 50, "samples": 8})
    trained, measured, fit = [], [], train.fit

    def watched(model, x, y, **how):
        trained.append((model, x, how))
        return fit(model, x, y, **how)

    def measure(model, x, **how):
        measured.append((model, x, how))
        return {}

    monkeypatch.setattr(train, "fit", watched)
    monkeypatch.setattr(study, "measure", measure)
    found = study.STUDIES[f"bn_vae_{name}"]
    recipe = found.recipe("any", "short")
    outcome, said = found.run(recipe, "any", 0, torch.device("cpu")), recipe.settings()
    ((model_, x, how),) = trained
    assert torch.equal(x, x_train[:256])
    assert (how["epochs"], how["batch_size"], how["lr"], said["beta"]) == (4, 128, 2e-3, model_.beta)
    assert (how["epochs"], how["batch_size"], how["lr"]) == tuple(said[key] for key in ("epochs", "batch_size", "lr"))
    assert outcome.training.rows == 4 * 256 and len(outcome.curves["KL in training"]) == 4 * 2
    ((same, x, how),) = measured
    assert same is model_ and torch.equal(x, x_test[:500]) and (how["images"], how["samples"]) == (50, 8)
    assert (
        type(model_.norm).__name__
        == {
            "none": "NoneType",
            "laye": "FixedScaleLayerNorm",
            "gamm": "FixedScaleBatchNorm",
            "tau0": "CoupledBatchNorm",
        }[name[:4]]
    )
    assert model_.beta == (2 if name.endswith("beta2") else 1)


def test_binary_images_are_halved_and_drawn_once():
    from gae_core.data import Images

    grey = torch.zeros(50, 1, 28, 28, dtype=torch.uint8)
    grey[:, :, :14] = 255
    y = torch.zeros(50, dtype=torch.int64)
    x, held_out = study.binary_images(Images("halves", grey, y, grey, y))
    assert x.shape == held_out.shape == (50, 1, 14, 14)
    assert (x[:, :, :7] == 1).all() and (x[:, :, 7:] == 0).all()
    small = torch.full((4000, 1, 8, 8), 0.3)
    first, again = (study.binary_images(Images("grey", small, y, small, y))[0] for _ in range(2))
    assert first.shape == small.shape and torch.equal(first, again)
    assert_z(first.mean((1, 2, 3)), 0.3)


@pytest.mark.parametrize("name", ["bn_vae_none", "bn_vae_tau0.5"])
def test_a_study_runs_and_says_what_it_did(name):
    torch.set_default_dtype(torch.float32)
    found = study.STUDIES[name]
    outcome = found.run(found.recipe("digits", "short"), "digits", 0, torch.device("cpu"))
    assert all(math.isfinite(v) for v in outcome.metrics.values()) and outcome.training.rows == 1280
    assert {"NLL", "KL", "gain from z", "active units"} <= set(outcome.metrics)
    assert json.dumps(found.recipe("digits", "short").settings()) and found.recipe("digits", "medium").epochs == 2
    assert set(study.STUDIES) == {f"bn_vae_{variant}" for variant in (*study.VARIANTS, "estimates")}


def test_the_recorded_likelihoods_are_estimated_as_the_chapter_says():
    names = ("none", "layer", "gamma0.7", "gamma1.2", "gamma0.4", "tau0.1", "tau0.5", "none_beta2", "gamma0.7_beta2")
    for name in names:
        path = ROOT / "book" / "results" / f"bn_vae_{name}" / "mnist-medium.json"
        run = json.loads(path.read_text(encoding="utf-8"))
        assert (run["proposal"], run["importance samples"], run["images of the likelihood"]) == ("mixture", 256, 500)
        assert all(len(curve) == 104 for curve in run["curves"]["KL in training"]), "a point for nine steps"


def test_the_floors_of_the_coupled_norm_that_the_results_name():
    starts = [CoupledBatchNorm(16, tau).floor() for tau in (0.1, 0.5)]
    assert starts == pytest.approx([6.4, 11.1], abs=0.05)
    assert -8 * math.log(0.9) == pytest.approx(0.84, abs=0.005)


def test_what_draws_give_back_of_a_spike():
    noise = torch.Generator().manual_seed(0)

    def back(draws, dim, count):
        squares = torch.randn(count, draws, dim, generator=noise).square().sum(2)
        return float((0.5 * squares.double()).logsumexp(1).mean() - math.log(draws))

    assert [back(8, 1, 200_000), back(512, 1, 8000)] == pytest.approx([0.79, 1.18], abs=0.02)
    assert back(100_000, 1, 100) == pytest.approx(1.43, abs=0.1)
    assert [back(8, 16, 30_000), back(512, 16, 1000)] == pytest.approx([10.7, 14.0], abs=0.1)
    assert back(512, 1, 8000) - back(256, 1, 16_000) == pytest.approx(0.04, abs=0.02)
    assert back(512, 16, 2000) - back(256, 16, 4000) == pytest.approx(0.4, abs=0.1)
    r, d = 1 / 9, 16  # the exercise
    assert d / 2 * math.log(1 / r) - d / 2 * (1 - r) == pytest.approx(10.47, abs=0.005)


def test_the_study_of_estimates_has_a_curve_for_each_model_and_proposal():
    torch.set_default_dtype(torch.float32)
    found = study.STUDIES["bn_vae_estimates"]
    outcome = found.run(found.recipe("digits", "short"), "digits", 0, torch.device("cpu"))
    assert outcome.training.rows == 3 * 1280
    assert set(outcome.curves) == {f"{m}, {p}" for m in study.ESTIMATED.values() for p in metrics.PROPOSALS}
    assert {key: values[-1] for key, values in outcome.curves.items()} == outcome.metrics
    assert all(len(v) == len(study.DRAWS["short"]) and all(map(math.isfinite, v)) for v in outcome.curves.values())


def test_what_is_recorded_is_what_is_run():
    """Each field of the recipe changes what is trained or measured, and the record says so."""
    torch.set_default_dtype(torch.float32)
    start = {"epochs": 1, "batch_size": 50, "rows": 200, "test": 40, "images": 5, "samples": 4}
    coupled = study.Recipe(norm="coupled", tau=0.5, **start)
    fixed = study.Recipe(norm="batch", gamma=0.7, **start)
    changes = {"rows": 300, "test": 30, "images": 6, "samples": 8, "dim": 3, "hidden": 9, "beta": 2.0, "norm": "layer"}
    changes |= {"epochs": 2, "batch_size": 40, "lr": 1e-3, "schedule": "constant", "optimizer": "sgd", "clip": 0.1}
    changes |= {"betas": (0.5, 0.9), "gamma": 0.3}
    assert {*changes, "tau"} == set(fixed.settings())

    def outcome(recipe):
        return study.run(recipe, "digits", 0, torch.device("cpu")).metrics

    first = outcome(fixed)
    assert outcome(fixed) == first
    for recipe, name, value in [*((fixed, *item) for item in changes.items()), (coupled, "tau", 0.1)]:
        other = dataclasses.replace(recipe, **{name: value})
        assert other.settings()[name] != recipe.settings()[name]
        assert outcome(other) != (first if recipe is fixed else outcome(coupled)), name
