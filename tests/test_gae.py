"""GAE: codes without an encoder, and the known methods that it contains."""

import itertools
import math
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_swiss_roll
from sklearn.decomposition import NMF, PCA, FactorAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from torch.utils.flop_counter import FlopCounterMode

from gae_core import data, nets, train
from gae_core.models import local_linear
from gae_core.models.gae import GAE, GGAE, KernelMixture, soft_minimum
from gae_core.models.local_linear import (
    LocalLinearGAE,
    factor_log_likelihood,
    fit_local_linear,
    nmf_step,
    plus_plus,
    ppca,
)

TOL = {"rtol": 0, "atol": 1e-8}


@pytest.fixture(scope="module")
def digits():
    """Training and test images, (n, 64), in [0, 1]."""
    parts = train_test_split(load_digits().data / 16, test_size=0.25, random_state=0)
    return [torch.from_numpy(part) for part in parts]


def linear(W, mu):
    """The decoder mu + W z."""
    decoder = torch.nn.Linear(*W.shape[::-1], dtype=W.dtype)
    with torch.no_grad():
        decoder.weight.copy_(W)
        decoder.bias.copy_(mu)
    return decoder


def test_hard_assignment_is_lloyds_algorithm(digits):
    x = digits[0]
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:10]]
    fit = fit_local_linear(x, 10, 0, start=start)
    lloyd = KMeans(10, init=start.numpy(), n_init=1, max_iter=1000, tol=0, algorithm="lloyd").fit(x.numpy())
    torch.testing.assert_close(fit.model.mu, torch.from_numpy(lloyd.cluster_centers_), **TOL)
    assert float(fit.model.squared_distances(x).amin(1).sum()) == pytest.approx(lloyd.inertia_, abs=1e-8)


@pytest.mark.parametrize("q", [2, 10])
def test_one_component_is_pca_and_one_step_from_anywhere_its_code(digits, q):
    x, unseen = digits
    model = fit_local_linear(x, 1, q).model
    pca = PCA(q, svd_solver="full").fit(x.numpy())
    torch.testing.assert_close(model(unseen), torch.from_numpy(pca.inverse_transform(pca.transform(unseen))), **TOL)
    W = torch.from_numpy(pca.components_.T)
    gae = GAE(linear(W, torch.from_numpy(pca.mean_)), q, steps=1, step_size=1.0, prior="flat", n_starts=3)
    code = torch.from_numpy(pca.transform(unseen.numpy()))
    for z in gae.infer(unseen):  # starts: the origin, and two at random
        torch.testing.assert_close(z.detach(), code, **TOL)


def test_coordinate_descent_is_that_of_nmf(digits):
    x = digits[0]
    generator = torch.Generator().manual_seed(0)
    z, W = (torch.rand(shape, generator=generator, dtype=x.dtype) for shape in ((len(x), 10), (10, 64)))
    known = NMF(10, init="custom", solver="cd", max_iter=50, tol=0)
    theirs = known.fit_transform(x.numpy(), W=z.numpy().copy(), H=W.numpy().copy())
    for _ in range(50):
        z = nmf_step(x, z, W)
        W = nmf_step(x.mT, W.mT, z.mT).mT
    torch.testing.assert_close(z, torch.from_numpy(theirs), **TOL)
    torch.testing.assert_close(W, torch.from_numpy(known.components_), **TOL)


def test_the_likelihoods_of_factor_analysis_and_ppca_are_scikit_learns(digits):
    x = digits[0][:, digits[0].std(0) > 0.01].numpy()
    factors = FactorAnalysis(3).fit(x)
    arguments = (torch.from_numpy(np.asarray(v)) for v in (x, factors.mean_, factors.components_.T))
    ours = factor_log_likelihood(*arguments, torch.from_numpy(factors.noise_variance_))
    np.testing.assert_allclose(ours, factors.score_samples(x), **TOL)
    pca = PCA(5).fit(x)
    W = pca.components_.T * np.sqrt(pca.explained_variance_ - pca.noise_variance_)
    psi = np.full(x.shape[1], pca.noise_variance_)
    ours = factor_log_likelihood(*(torch.from_numpy(v) for v in (x, pca.mean_, W, psi)))
    np.testing.assert_allclose(ours, pca.score_samples(x), rtol=0, atol=1e-8)


def test_the_likelihood_of_factor_analysis_is_that_of_its_whole_covariance():
    """As many entries as MNIST has pixels, and a noise of which there is little: nothing is lost by the short way."""
    generator = torch.Generator().manual_seed(0)
    for entries, dim, least in ((1, 1, 0.1), (40, 3, 1e-3), (784, 10, 0.1)):
        shapes = ((20, entries), (entries,), (entries, dim), (entries,))
        x, mu, W, psi = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        psi = least * psi.exp()
        whole = torch.distributions.MultivariateNormal(mu, W @ W.T + psi.diag()).log_prob(x)
        torch.testing.assert_close(factor_log_likelihood(x, mu, W, psi), whole, rtol=1e-12, atol=1e-12)
        half = factor_log_likelihood(*(v.float() for v in (x, mu, W, psi)))
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="q at least 1"):
        factor_log_likelihood(x, mu, W[:, :0], psi)


# The claims of the chapter, one by one.


def random_linear(seed=0, entries=6, dim=3):
    """W (entries, dim), mu (entries,), x (5, entries)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((entries, dim), (entries,), (5, entries))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.checks("eq-gae-finite", how="exact")
@given(st.lists(st.floats(-700, 5), min_size=1, max_size=20))
def test_the_largest_term_bounds_a_sum(logs):
    with mp.workdps(40):
        total = mp.log(mp.fsum(mp.exp(mp.mpf(v)) for v in logs))
        slack = mp.mpf(10) ** -30
        assert max(logs) - slack <= total <= max(logs) + mp.log(len(logs)) + slack


@pytest.mark.checks("eq-gae-finite", how="exact")
def test_both_ends_of_the_finite_bound_are_reached():
    with mp.workdps(40):
        assert mp.almosteq(mp.log(4 * mp.exp(-3)), -3 + mp.log(4))
        assert mp.log(mp.exp(-3) + 0) == -3
        # It is the terms that must be alike, not the likelihoods: codes of 4/5 and 1/5 that explain x equally well.
        even, uneven = (
            mp.log(mp.fsum(terms)) - max(map(mp.log, terms))
            for terms in ([mp.mpf(4) / 5 * 1, mp.mpf(1) / 5 * 4], [mp.mpf(4) / 5, mp.mpf(1) / 5])
        )
        assert mp.almosteq(even, mp.log(2)) and uneven < mp.log(2) - 0.4


@pytest.mark.checks("eq-gae-counterexample", how="exact")
@pytest.mark.parametrize("s", ["0.1", "0.31", "2"])
def test_a_maximum_of_densities_is_no_bound(s):
    with mp.workdps(40):
        s = mp.mpf(s)
        log_q = mp.log(mp.quad(lambda z: mp.npdf(0, z, s), [mp.mpf(-1) / 2, -s / 20, 0, s / 20, mp.mpf(1) / 2]))
        claimed = mp.log(mp.erf(1 / (2 * mp.sqrt(2) * s)))
        assert abs(log_q - claimed) < mp.mpf(10) ** -20
        largest = -mp.log(2 * mp.pi * s**2) / 2
        assert abs(largest - mp.log(mp.npdf(0, 0, s))) < mp.mpf(10) ** -35
        if s == mp.mpf("0.1"):  # the source's inequality, and the figure in the text
            assert largest > log_q and mp.nstr(largest - log_q, 3) == "1.38"
        if s == 2:  # in other units the same maximum is below: "any amount" goes both ways
            assert largest + mp.log(mp.mpf(1) / 100) < log_q


@pytest.mark.checks("eq-gae-units", how="symbolic")
def test_the_maximum_changes_with_the_units():
    z, a, x, s = sp.symbols("z a x s", positive=True)
    d = sp.symbols("d", integer=True, positive=True)
    log_density = -(z**2) / 2 - (x - z) ** 2 / (2 * s**2)
    # In coordinates z' with z = a z' the density of a coordinate is multiplied by a, of d coordinates by a^d.
    other = sp.log(a**d) + log_density.subs(z, a * sp.Symbol("u"))
    u = sp.solve(sp.diff(other, sp.Symbol("u")), sp.Symbol("u"))[0]
    best = sp.solve(sp.diff(log_density, z), z)[0]
    difference = other.subs(sp.Symbol("u"), u) - log_density.subs(z, best)
    assert sp.simplify(sp.expand_log(difference - d * sp.log(a), force=True)) == 0


@pytest.mark.checks("eq-gae-laplace", how="symbolic")
def test_the_corrected_value_does_not_change_with_the_units_and_the_correction_does():
    """In two dimensions: the maximum gains d log a, -1/2 log det H loses it; log det H alone changes by twice that."""
    a, s, x = sp.symbols("a s x", positive=True)
    z, u = sp.symbols("z:2"), sp.symbols("u:2")
    value = -(z[0] ** 2 + z[1] ** 2) / 2 - (x - z[0] - 2 * z[1]) ** 2 / (2 * s**2) - (1 + z[0] - z[1]) ** 2

    def parts(value, at):
        best = sp.solve([sp.diff(value, v) for v in at], at)
        return value.subs(best), -sp.hessian(value, at).subs(best).det()

    there = value.subs(dict(zip(z, (a * u[0], a * u[1]), strict=True)), simultaneous=True) + 2 * sp.log(a)
    (maximum, det), (moved, det_moved) = parts(value, z), parts(there, u)
    gained, bent = sp.simplify(moved - maximum), sp.simplify(sp.log(sp.simplify(det_moved / det)))
    assert sp.simplify(gained - 2 * sp.log(a)) == 0
    assert sp.simplify(sp.expand_log(bent, force=True) - 2 * gained) == 0
    assert sp.simplify(sp.expand_log(gained - bent / 2, force=True)) == 0


@pytest.mark.checks("eq-gae-laplace", how="exact")
@pytest.mark.checks("eq-gae-factor-analysis", how="exact")
def test_laplace_is_exact_and_the_maximum_alone_is_not():
    W, mu, x = random_linear()
    gae = GAE(linear(W, mu), 3, steps=800, step_size=0.05, sigma=0.7)
    exact = -factor_log_likelihood(x, mu, W, torch.full((6,), 0.49, dtype=torch.float64))
    torch.testing.assert_close(gae.laplace_nll(x).detach(), exact, **TOL)
    maximum = gae.loss(x).total.detach()
    assert (maximum - exact).abs().min() > 0.1
    # In other units of z the maximum moves, Laplace's value does not.
    scaled = GAE(linear(W / 3, mu), 3, steps=1, step_size=0.05, sigma=0.7)
    precision = W.mT @ W / 0.49 + torch.eye(3, dtype=W.dtype)
    code = (torch.linalg.inv(precision) @ W.mT @ (x - mu).mT / 0.49).mT
    torch.testing.assert_close(scaled.log_likelihood(x, 3 * code), gae.log_likelihood(x, code))
    torch.testing.assert_close(gae.encode(x).detach(), code, **TOL)


@pytest.mark.checks("eq-gae-factor-analysis", how="exact")
def test_the_posterior_of_factor_analysis_by_conditioning():
    W, _, _ = random_linear(1)
    psi = torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=W.dtype) + 0.1
    gain = torch.linalg.solve(W @ W.T + psi.diag(), W).T  # Cov(z, x) Cov(x)^-1
    ours = torch.linalg.solve((W.T / psi) @ W + torch.eye(3, dtype=W.dtype), W.T / psi)
    torch.testing.assert_close(ours, gain, **TOL)
    # Probabilistic PCA's form in the text.
    sigma2 = 0.3
    short = torch.linalg.solve(W.T @ W + sigma2 * torch.eye(3, dtype=W.dtype), W.T)
    torch.testing.assert_close(short, torch.linalg.solve(W @ W.T + sigma2 * torch.eye(6, dtype=W.dtype), W).T, **TOL)


@pytest.mark.checks("eq-gae-map-linear", how="exact")
def test_the_maximum_of_a_linear_model_rewards_large_weights():
    W, mu, x = random_linear(3)
    psi = torch.full((6,), 0.49, dtype=W.dtype)

    def formula(W):
        cov = W @ W.T + psi.diag()
        quadratic = ((x - mu) * torch.linalg.solve(cov, (x - mu).T).T).sum(1)
        return -0.5 * quadratic - 0.5 * (2 * math.pi * psi).log().sum() - 1.5 * math.log(2 * math.pi)

    def attained(W):
        code = torch.linalg.solve(W.T @ W / 0.49 + torch.eye(3, dtype=W.dtype), W.T @ (x - mu).T / 0.49).T
        gae = GAE(linear(W, mu), 3, steps=1, step_size=1e-9, sigma=0.7)
        return gae.log_likelihood(x, code) + gae.log_prior(code)

    torch.testing.assert_close(formula(W), attained(W).detach(), **TOL)
    assert (formula(2 * W) > formula(W)).all() and (formula(100 * W) > formula(2 * W)).all()
    marginal = [factor_log_likelihood(x, mu, a * W, psi).mean() for a in (1, 100)]
    assert marginal[1] < marginal[0]


@pytest.mark.checks("eq-gae-steps-bound", how="exact")
def test_any_number_of_steps_gives_a_lower_value_and_the_source_loses_the_logarithm():
    W, mu, x = random_linear(4)
    gae = GAE(linear(W, mu), 3, steps=1, step_size=0.05, sigma=0.7)
    W_ = W.T @ W / 0.49 + torch.eye(3, dtype=W.dtype)
    best = torch.linalg.solve(W_, W.T @ (x - mu).T / 0.49).T
    highest = gae.log_likelihood(x, best) + gae.log_prior(best)
    for steps in (0, 1, 5, 50):
        z = gae.infer(x, steps=steps)[0]
        assert (gae.log_likelihood(x, z) + gae.log_prior(z) <= highest + 1e-9).all()
    # The right form is tight at the maximum; the source's, without the logarithm, is off by 1 or more there as well.
    attained = gae.log_likelihood(x, best) + gae.log_prior(best)
    assert (highest - attained).abs().max() < 1e-12 and (highest.exp() - attained >= 1).all()


def test_the_code_depends_on_the_datum():
    """The source's z_t = f(z_0, t) does not: one code would serve all data."""
    W, mu, x = random_linear(4)
    z = GAE(linear(W, mu), 3, steps=5, step_size=0.05).encode(x)
    assert torch.cdist(z, z).add(torch.eye(5)).min() > 0.1


@pytest.mark.checks("eq-gae-ascent", how="exact")
@pytest.mark.checks("eq-gae-linear-error", how="exact")
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99, 1.01, 1.1])
@pytest.mark.parametrize("prior", ["normal", "flat"])
def test_the_ascent_converges_exactly_below_its_limit(share, prior):
    W, mu, x = random_linear(5)
    sigma = 0.7
    H = W.T @ W / sigma**2 + (torch.eye(3, dtype=W.dtype) if prior == "normal" else 0)
    L = float(torch.linalg.eigvalsh(H)[-1])
    eta = 2 * share / L
    gae = GAE(linear(W, mu), 3, steps=1, step_size=eta, sigma=sigma, prior=prior)
    best = torch.linalg.solve(H, W.T @ (x - mu).T / sigma**2).T
    step = torch.eye(3, dtype=W.dtype) - eta * H
    before = None
    for steps in range(6):
        z = gae.infer(x, steps=steps)[0].detach()
        torch.testing.assert_close(z - best, -best @ torch.linalg.matrix_power(step, steps), rtol=1e-8, atol=1e-10)
        value = gae.log_likelihood(x, z) + gae.log_prior(z)
        if before is not None:
            squared = ((before[1] - best) @ H).square().sum(1)
            assert (value - before[0] >= eta * (1 - share) * squared - 1e-9).all()
        before = value, z
    far = (gae.infer(x, steps=1000)[0] - best).norm() / best.norm()
    assert far < 1e-3 if share < 1 else far > 1e3
    if share > 1.05:
        with pytest.raises(FloatingPointError, match="step_size"):
            gae.infer(x, steps=4000)


def test_a_step_beyond_the_promise_may_rise_or_fall():
    """The source's ascent; "only below 2/L" would be as wrong. Start along the flattest and the steepest direction."""
    W, mu, _ = random_linear(5)
    values, vectors = torch.linalg.eigh(W.T @ W + torch.eye(3, dtype=W.dtype))
    gae = GAE(linear(W, mu), 3, steps=1, step_size=2.2 / float(values[-1]))
    rose = []
    for k in (0, 2):  # x is such that the best code lies along this eigenvector: the ascent from 0 stays on it
        x = (mu + W @ torch.linalg.solve(W.T @ W, values[k] * vectors[:, k]))[None]
        before, after = (
            gae.log_likelihood(x, z) + gae.log_prior(z) for z in (gae.infer(x, steps=t)[0] for t in (0, 1))
        )
        rose.append(bool(after > before))
    assert rose == [True, False]


@pytest.mark.checks("eq-gae-total-gradient", how="symbolic")
@pytest.mark.checks("eq-gae-second-order", how="symbolic")
def test_the_gradient_through_the_steps_in_one_dimension():
    w, x, eta = sp.symbols("w x eta", positive=True)
    rho = 1 - eta * w**2
    z = sp.Integer(0)
    for t in range(1, 5):
        z = z + eta * w * (x - w * z)
        assert sp.simplify(z - x / w * (1 - rho**t)) == 0
        value = -((x - w * z) ** 2) / 2
        assert sp.simplify(value + x**2 * rho ** (2 * t) / 2) == 0
        code = sp.Symbol("z")
        of_l = sp.diff(-((x - w * code) ** 2) / 2, w).subs(code, z)
        through = sp.diff(-((x - w * code) ** 2) / 2, code).subs(code, z) * sp.diff(z, w)
        assert sp.simplify(of_l - x**2 / w * rho**t * (1 - rho**t)) == 0
        assert sp.simplify(sp.diff(value, w) - 2 * t * eta * w * x**2 * rho ** (2 * t - 1)) == 0
        assert sp.simplify(sp.diff(value, w) - of_l - through) == 0
        if t == 1:
            assert sp.simplify(sp.diff(value, w) / of_l) == 2


@pytest.mark.checks("eq-gae-second-order", how="exact")
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("t", [1, 2, 3, 7])
def test_the_option_decides_whether_the_gradient_passes_the_steps(second_order, t):
    """All of them: a gradient through the last step alone is right for t = 1 and for no other."""
    w, x, eta = 0.8, 1.7, 0.3
    one = torch.ones(1, 1, dtype=torch.float64)
    gae = GAE(linear(w * one, 0 * one[0]), 1, steps=t, step_size=eta, prior="flat", second_order=second_order)
    gae.loss(x * one).total.sum().backward()
    rho = 1 - eta * w**2
    through_l, whole = x**2 / w * rho**t * (1 - rho**t), 2 * t * eta * w * x**2 * rho ** (2 * t - 1)
    assert float(gae.decoder.weight.grad) == pytest.approx(-(whole if second_order else through_l), rel=1e-12)
    assert t == 1 or abs(whole - through_l) > 0.02


@pytest.mark.checks("eq-gae-total-gradient", how="exact")
def test_the_gradient_through_many_steps_of_a_network_is_that_of_finite_differences():
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    gae = GAE(decoder, 2, steps=6, step_size=0.1, sigma=0.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    gae.loss(x).total.sum().backward()
    found = torch.cat([p.grad.flatten() for p in decoder.parameters()])
    flat = torch.nn.utils.parameters_to_vector(decoder.parameters()).detach()

    def value(vector):
        torch.nn.utils.vector_to_parameters(vector, decoder.parameters())
        with torch.no_grad():
            return float(gae.loss(x).total.sum())

    h = 1e-5
    expected = [(value(flat + h * e) - value(flat - h * e)) / (2 * h) for e in torch.eye(len(flat), dtype=flat.dtype)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=flat.dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.checks("eq-gae-starts", how="exact")
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8))
def test_the_mean_over_starts_is_never_above_the_best(values):
    with mp.workdps(40):
        mean = mp.log(mp.fsum(mp.exp(mp.mpf(v)) for v in values) / len(values))
        slack = mp.mpf(10) ** -35
        assert max(values) - mp.log(len(values)) - slack <= mean <= max(values) + slack


@pytest.mark.checks("eq-gae-distinct", how="exact")
def test_the_sum_over_different_codes_bounds_the_likelihood_and_over_starts_it_need_not():
    with mp.workdps(40):
        terms = [mp.mpf(v) / 100 for v in (31, 7, 2, 45, 1)]
        log_q = mp.log(mp.fsum(terms))
        for size in range(1, 6):
            for codes in itertools.combinations(range(5), size):
                found = mp.log(mp.fsum(terms[k] for k in codes))
                assert max(mp.log(terms[k]) for k in codes) <= found <= log_q
        starts = [3, 3, 3, 0]  # of four starts three end in one code
        assert mp.log(mp.fsum(terms[k] for k in starts)) > log_q
        assert mp.log(mp.fsum(terms[k] for k in [1, 1])) < log_q  # it can, and need not


def several(**options):
    """A GAE with a decoder whose ascent has several ends, and data; too few steps to reach them."""
    torch.manual_seed(3)
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6)).double()
    with torch.no_grad():
        decoder[0].weight.mul_(4)
    gae = GAE(decoder, 2, **{"steps": 3, "step_size": 0.02, "sigma": 0.5, "n_starts": 4, **options})
    return gae, torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_code_is_a_function_of_its_datum_alone():
    """In whatever batch and place: the starts are the same for every row."""
    gae, x = several()
    with torch.no_grad():
        batch = gae.encode(x)
        for other in (torch.cat([gae.encode(row[None]) for row in x]), gae.encode(x.flip(0)).flip(0)):
            torch.testing.assert_close(batch, other, rtol=1e-9, atol=1e-9)
        starts = gae.infer(x, steps=0, alike=True, generator=torch.Generator().manual_seed(0))
        assert (starts == starts[:, :1]).all() and (starts[0] == 0).all() and (starts[1:] != 0).all()
        # The codes are not all from one start, and training has starts of its own for each row.
        found = gae.infer(x, alike=True, generator=torch.Generator().manual_seed(0))
        assert len((found == batch).all(2).double().argmax(0).unique()) >= 3
        own = gae.infer(x, steps=0, generator=torch.Generator().manual_seed(0))
        assert (own[1:, 0] != own[1:, 1]).all()
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        gae.infer(x, steps=-1)


def test_the_best_start_is_the_best_in_likelihood_and_prior():
    gae, x = several(sigma=1.5)
    with torch.no_grad():
        z = gae.infer(x, alike=True, generator=torch.Generator().manual_seed(0))
        likelihood = torch.stack([-(x - gae.decoder(v)).square().sum(1) / 4.5 for v in z])
        value = likelihood - z.square().sum(2) / 2
        best = value.argmax(0)
        torch.testing.assert_close(gae.encode(x), z[best, torch.arange(50)])
        assert (best != likelihood.argmax(0)).sum() > 5, "else the prior would not matter here"


@pytest.mark.parametrize("combine", ["max", "logmeanexp"])
def test_the_terms_of_the_loss_are_those_of_the_best_start(combine):
    gae, x = several(combine=combine)
    with torch.no_grad():
        z = gae.infer(x, generator=torch.Generator().manual_seed(1))
        found = gae.loss(x, generator=torch.Generator().manual_seed(1))
    constant = 3 * math.log(2 * math.pi * 0.25)
    reconstruction = torch.stack([(x - gae.decoder(v)).square().sum(1) / 0.5 + constant for v in z]).detach()
    prior = z.square().sum(2) / 2 + math.log(2 * math.pi)
    best = (reconstruction + prior).argmin(0)
    assert (best > 0).sum() > 10, "else the first start would do"
    at = (best, torch.arange(50))
    torch.testing.assert_close(found.reconstruction, reconstruction[at])
    torch.testing.assert_close(found.prior, prior[at])
    mean = -((-reconstruction - prior).logsumexp(0) - math.log(4))
    torch.testing.assert_close(found.total, (reconstruction + prior)[at] if combine == "max" else mean)


def test_the_sum_over_equal_starts_exceeds_the_likelihood():
    W, mu, x = random_linear(6)
    options = {"steps": 400, "step_size": 0.05, "sigma": 0.7, "n_starts": 4}
    best, mean = (GAE(linear(W, mu), 3, combine=c, **options).loss(x).total for c in ("max", "logmeanexp"))
    torch.testing.assert_close(best, mean)  # all four starts end in the only maximum
    assert (mean - math.log(4) < best - 1).all()  # the sum would count it four times


@pytest.mark.checks("eq-gae-first-chain", how="exact")
def test_the_first_chain_and_its_constant():
    with mp.workdps(30):
        p, q = ([mp.mpf(v) / 10 for v in values] for values in ((1, 2, 7), (4, 5, 1)))
        pairs = [(x, y, p[x] if x == y else mp.mpf(0)) for x in range(3) for y in range(3)]
        joint = -mp.fsum(v * mp.log(v / (p[x] * q[y])) for x, y, v in pairs if v)
        log_q = mp.fsum(v * mp.log(w) for v, w in zip(p, q, strict=True))
        entropy = -mp.fsum(v * mp.log(v) for v in p)
        kl = mp.fsum(v * mp.log(v / w) for v, w in zip(p, q, strict=True))
        near = mp.mpf(10) ** -25
        assert abs(joint - log_q) < near and abs(joint - (-entropy - kl)) < near
        assert abs(joint - log_q) < near < abs(joint - (0 - kl)), "with the c = 0 of the first line, as in the source"

        # Continuous x on cells: N(0, 1) under the model N(0, 4), whose value falls by log 10 a tenfold finer cut.
        def value(width):
            edges = [mp.mpf(i) * width for i in range(-int(8 / width), int(8 / width) + 1)]
            cells = itertools.pairwise(edges)
            return mp.fsum((mp.ncdf(b) - mp.ncdf(a)) * mp.log(mp.ncdf(b / 2) - mp.ncdf(a / 2)) for a, b in cells)

        coarse, fine = value(mp.mpf("0.1")), value(mp.mpf("0.01"))
        assert abs(coarse - fine - mp.log(10)) < 1e-3


@pytest.mark.checks("eq-gae-self-map", how="exact")
def test_the_self_map_without_its_normaliser_says_nothing_of_the_decoder():
    generator = torch.Generator().manual_seed(0)
    encoder = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    encoder /= encoder.sum(1, keepdim=True)  # q_e(z | x) of 4 data and 3 codes
    likelihood = torch.rand(4, 3, generator=generator, dtype=torch.float64)  # q_r(x | z)
    joint = encoder * likelihood
    posterior = joint / joint.sum(1, keepdim=True)
    torch.testing.assert_close(joint.amax(1).log(), joint.sum(1).log() + posterior.amax(1).log())
    # The last lines: -log q(x), called a constant, changes with the decoder.
    assert (joint.sum(1).log() - (encoder * likelihood.square()).sum(1).log()).min() > 0.1
    # Inside a divergence over y the source has q_r(y = x | z), which does not depend on y and has no sum of 1.
    decoder = likelihood / likelihood.sum(0)  # q_r(y | z) is a distribution of y for each z
    over_y = torch.einsum("xz,yz->xy", encoder, decoder)
    torch.testing.assert_close(over_y.sum(1), torch.ones(4, dtype=torch.float64))
    assert (4 * (encoder * decoder).sum(1) - 1).abs().max() > 0.1
    # An encoder that gives each x one code, be it the same for all: what the source keeps is 0 for every decoder.
    for codes in ([0, 1, 2, 1], [0, 0, 0, 0]):
        joint = torch.eye(3, dtype=torch.float64)[codes] * likelihood
        posterior = joint / joint.sum(1, keepdim=True)
        assert posterior.amax(1).log().abs().max() == 0
        assert joint.amax(1).log().max() < -0.01
    # With an encoder that hesitates it is below 0, though the decoder has a mean of its own for each code.
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    joint = encoder[:3] * torch.distributions.Normal(x, 0.7).log_prob(x[:, None]).exp()
    assert (joint / joint.sum(1, keepdim=True)).amax(1).log().max() < -0.01


@pytest.mark.checks("eq-gae-soft-minimum", how="exact")
@given(st.lists(st.floats(0, 30), min_size=1, max_size=30), st.floats(0.1, 100))
def test_soft_minima_lie_where_they_should(losses, beta):
    values = -torch.tensor(losses, dtype=torch.float64)
    below, above = (float(soft_minimum(values, beta, mean=mean)) for mean in (False, True))
    low, slack = float(values.min()), 1e-9
    assert low - math.log(len(losses)) / beta - slack <= below <= low + slack
    assert low - slack <= above <= float(values.mean()) + slack
    with mp.workdps(30):
        total = mp.fsum(mp.exp(beta * mp.mpf(d)) for d in losses)
        assert below == pytest.approx(float(-mp.log(total) / beta), abs=1e-9)
        assert above == pytest.approx(float(-mp.log(total / len(losses)) / beta), abs=1e-9)


def test_without_the_factor_the_soft_minimum_is_none():
    values = -torch.linspace(0, 2.69, 100, dtype=torch.float64)
    source = -torch.logsumexp(-50 * values, 0)  # as printed there
    assert -139 < source < -130 and abs(soft_minimum(values, 50.0) + 2.69) < 0.1


@pytest.mark.checks("eq-gae-kmeans", how="exact")
@pytest.mark.checks("eq-gae-soft-hard", how="exact")
@pytest.mark.parametrize("sigma", [0.5, 0.1, 0.02])
def test_hard_and_soft_assignment_and_their_distance(digits, sigma):
    x = digits[0]
    mu = fit_local_linear(x, 10, 0, generator=torch.Generator().manual_seed(0)).model.mu
    model = LocalLinearGAE(mu, mu.new_zeros(10, 64, 0), sigma=sigma)
    squared = (x[:, None] - mu).square().sum(2)
    sse, n = float(squared.amin(1).sum()), len(x)
    value = -sse / (2 * sigma**2) - n * math.log(10) - n * 32 * math.log(2 * math.pi * sigma**2)
    assert float(model.log_joint(x).amax(1).sum()) == pytest.approx(value, rel=1e-10)
    soft = -2 * sigma**2 * float((-squared / (2 * sigma**2)).logsumexp(1).sum())
    assert soft - 1e-8 <= sse <= soft + 2 * sigma**2 * n * math.log(10) + 1e-8
    if sigma == 0.02:
        assert sse == pytest.approx(soft, rel=1e-4)  # the mixture has become k-means


def test_the_best_component_is_the_nearest_centre_for_equal_weights_and_deviations_alone(digits):
    x = digits[0]
    mu = fit_local_linear(x, 10, 0, generator=torch.Generator().manual_seed(0)).model.mu
    nearest = torch.cdist(x, mu).argmin(1)
    equal, uneven = (
        LocalLinearGAE(mu, mu.new_zeros(10, 64, 0), log_weights=weights, sigma=0.5).encode(x).component
        for weights in (None, torch.linspace(0, 6, 10, dtype=x.dtype))
    )
    assert torch.equal(equal, nearest) and (uneven != nearest).double().mean() > 0.1
    sigma = torch.linspace(0.3, 0.6, 10, dtype=x.dtype)
    own = -torch.cdist(x, mu).square() / (2 * sigma**2) - 64 * sigma.log()
    assert (own.argmax(1) != nearest).double().mean() > 0.1


def test_more_centres_than_data_have_no_best_sigma(digits):
    x = digits[0][:30]
    model = fit_local_linear(x, 30, 0, start=x.clone()).model
    assert float(model.squared_distances(x).amin(1).sum()) == 0
    values = [float(LocalLinearGAE(model.mu, model.W, sigma=s).log_joint(x).amax(1).mean()) for s in (1.0, 1e-2, 1e-4)]
    assert values[0] < -50 < 100 < values[1] < values[2]  # not 0, and without a bound


@pytest.mark.checks("eq-gae-mlr", how="exact")
def test_soft_assignment_is_a_multinomial_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    mu, x = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (4, 7))
    weights = torch.rand(4, generator=generator, dtype=torch.float64)
    model = LocalLinearGAE(mu, mu.new_zeros(4, 5, 0), log_weights=weights.log(), sigma=0.6)
    pi = weights / weights.sum()
    logits = x @ mu.T / 0.36 + pi.log() - mu.square().sum(1) / 0.72
    torch.testing.assert_close(model.log_joint(x).softmax(1), logits.softmax(1), **TOL)


def test_every_logistic_regression_is_the_posterior_of_a_mixture(digits):
    x, _ = digits
    labels = np.argmin(((x[:, None] - x[:4]) ** 2).sum(2).numpy(), 1)  # of four classes
    known = LogisticRegression(C=0.1, max_iter=500).fit(x.numpy(), labels)
    w, b = torch.from_numpy(known.coef_), torch.from_numpy(known.intercept_)
    sigma = 0.6
    mu = sigma**2 * w
    log_weights = b + mu.square().sum(1) / (2 * sigma**2)
    model = LocalLinearGAE(mu, mu.new_zeros(4, 64, 0), log_weights=log_weights, sigma=sigma)
    ours = model.log_joint(x).softmax(1)
    np.testing.assert_allclose(ours, known.predict_proba(x.numpy()), **TOL)
    without = LocalLinearGAE(mu, mu.new_zeros(4, 64, 0), log_weights=b, sigma=sigma).log_joint(x).softmax(1)
    assert (without - ours).abs().max() > 0.01, "the centres' lengths belong to the weights"


def test_soft_assignment_is_scikit_learns_mixture_of_gaussians(digits):
    """Density, responsibilities and one round of expectation maximisation from the same parameters."""
    x, sigma, K = digits[0], 0.25, 10
    generator = torch.Generator().manual_seed(0)
    mu = x[torch.randperm(len(x), generator=generator)[:K]]
    weights = torch.rand(K, generator=generator, dtype=x.dtype) + 0.1
    weights /= weights.sum()
    start = LocalLinearGAE(mu, mu.new_zeros(K, 64, 0), log_weights=weights.log(), sigma=sigma)
    known = GaussianMixture(
        K,
        covariance_type="spherical",
        weights_init=weights.numpy(),
        means_init=mu.numpy(),
        precisions_init=np.full(K, sigma**-2),
        max_iter=1,
    )
    with pytest.warns(ConvergenceWarning):
        known.fit(x.numpy())
    after = fit_local_linear(x, K, 0, start=start, hard=False, sigma=sigma, max_steps=1).model
    np.testing.assert_allclose(after.mu, known.means_, **TOL)
    np.testing.assert_allclose(after.log_weights.exp(), known.weights_, **TOL)
    known.means_, known.weights_ = mu.numpy(), weights.numpy()
    known.covariances_, known.precisions_cholesky_ = np.full(K, sigma**2), np.full(K, 1 / sigma)
    np.testing.assert_allclose(start.log_joint(x).logsumexp(1), known.score_samples(x.numpy()), **TOL)
    np.testing.assert_allclose(start.log_joint(x).softmax(1), known.predict_proba(x.numpy()), **TOL)


def test_a_gaussian_likelihood_is_no_multiple_of_the_squared_error(digits):
    """The source has a sign of proportion; it is minus a half of it over the variance, plus a constant."""
    x = digits[0][:50]
    model = LocalLinearGAE(x[:1] + 0.1, x.new_zeros(1, 64, 0), sigma=0.3)
    squared, value = model.squared_distances(x)[:, 0], model.log_joint(x)[:, 0]
    ratio = value / -squared
    assert ratio.max() > 1.5 * ratio.min()
    constant = value + squared / (2 * 0.09)
    assert constant.max() - constant.min() < 1e-9 < abs(float(constant[0]))


def test_weights_that_sum_to_one_may_be_negative_and_give_no_density():
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    components = torch.distributions.Normal(torch.tensor([-1.0, 1.0]).double(), 0.5).log_prob(x).exp()
    source = components @ torch.tensor([2.0, -1.0]).double()  # sum 1, all that the source asks
    right = components @ KernelMixture(2, 1, 1).double().log_weights(torch.zeros(1, 1).double())[0].exp().detach()
    for density in (source, right):
        assert float(torch.trapezoid(density, x[:, 0])) == pytest.approx(1, abs=1e-9)
    assert source.min() < -0.5 and right.min() >= 0


@pytest.mark.checks("eq-gae-kernel-gradient", how="exact")
def test_the_code_of_a_kernel_mixture_is_drawn_and_pushed():
    torch.manual_seed(0)
    decoder = KernelMixture(4, 2, 5).double()
    gae = GGAE(decoder, 2, steps=1, step_size=0.1, sigma=0.8, prior="flat")
    x, v = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gae.log_likelihood(x, v).sum(), v)
    u = decoder.log_weights(v).exp()
    torch.testing.assert_close(u.sum(1), torch.ones(6, dtype=torch.float64))
    r = (u.log() - (x[:, None] - decoder.means).square().sum(2) / (2 * 0.64)).softmax(1)
    torch.testing.assert_close(gradient, 2 * (r - u) @ decoder.centres, **TOL)
    lost = 2 * (r[..., None] * (decoder.centres - v[:, None])).sum(1)  # the numerator alone
    assert (gradient - lost).abs().max() > 0.1
    unnormalised = (-torch.cdist(v, decoder.centres).square()).exp()
    page = unnormalised / (v.square().sum(1, keepdim=True).exp() + unnormalised.sum(1, keepdim=True))
    assert (page.sum(1) < 1).all()
    # With one entry the density can be integrated: it is one.
    narrow = KernelMixture(3, 2, 1).double()
    box = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    at = v[:1].detach().expand(4001, 2)
    density = GGAE(narrow, 2, steps=1, step_size=0.1, sigma=0.5).log_likelihood(box, at).exp().detach()
    assert float(torch.trapezoid(density, box[:, 0])) == pytest.approx(1, abs=1e-9)


@pytest.mark.checks("eq-gae-normal-equations", how="exact")
@pytest.mark.checks("eq-gae-one-step", how="exact")
def test_the_linear_code_and_its_step():
    W, mu, x = random_linear(7)
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=W.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad((x - mu - z @ W.T).square().sum(), z)
    torch.testing.assert_close(-gradient / 2, (x - mu) @ W - z @ (W.T @ W), **TOL)
    best = torch.linalg.solve(W.T @ W, W.T @ (x - mu).T).T
    torch.testing.assert_close(best, torch.linalg.lstsq(W, (x - mu).T).solution.T, **TOL)
    Q = torch.linalg.qr(W).Q
    (gradient,) = torch.autograd.grad((x - mu - z @ Q.T).square().sum(), z)
    torch.testing.assert_close((z - gradient / 2).detach(), (x - mu) @ Q, **TOL)
    assert ((z + gradient / 2).detach() - (x - mu) @ Q).abs().max() > 1  # descent on the objective, as the source says
    gon = GAE(linear(Q, mu), 3, steps=1, step_size=1.0, prior="flat")  # -grad of half the squared error at 0
    torch.testing.assert_close(gon.encode(x).detach(), (x - mu) @ Q, **TOL)


@pytest.mark.checks("eq-gae-pca", how="exact")
def test_the_best_subspace_leaves_the_small_eigenvalues(digits):
    x = digits[0]
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    for q in (0, 3, 17, 64):
        model = fit_local_linear(x, 1, q).model
        error = model.squared_distances(x).mean()
        torch.testing.assert_close(error, values[: 64 - q].sum(), rtol=0, atol=1e-10)
        moved = LocalLinearGAE(model.mu + 0.01, model.W)
        assert moved.squared_distances(x).mean() >= error - 1e-12
        rotation = torch.linalg.qr(torch.randn(q, q, generator=torch.Generator().manual_seed(q), dtype=x.dtype)).Q
        turned = LocalLinearGAE(model.mu, model.W @ rotation)  # W is found up to a rotation
        torch.testing.assert_close(turned.squared_distances(x).mean(), error, rtol=0, atol=1e-10)
    other = torch.linalg.qr(torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=x.dtype)).Q
    assert LocalLinearGAE(x.mean(0)[None], other[None]).squared_distances(x).mean() > values[:61].sum()


@pytest.mark.checks("eq-gae-ista", how="exact")
def test_the_proximal_ascent_finds_the_lasso():
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(20, 40, generator=generator, dtype=torch.float64) / math.sqrt(20)
    truth = torch.zeros(40, dtype=torch.float64)
    truth[[3, 17, 31]] = torch.tensor([1.0, -2.0, 1.5], dtype=torch.float64)
    y, lam = B @ truth, 0.02
    limit = 2 / float(torch.linalg.matrix_norm(B, 2)) ** 2

    def step(z, eta):
        u = z + eta * B.T @ (y - B @ z)
        return u.sign() * (u.abs() - eta * lam).clamp_min(0)

    known = Lasso(alpha=lam / 20, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(B.numpy(), y.numpy())
    known = torch.from_numpy(known.coef_)
    for share in (0.98, 0.5):
        z = torch.zeros(40, dtype=torch.float64)
        for _ in range(20_000):
            z = step(z, share * limit)
        torch.testing.assert_close(z, known, rtol=0, atol=1e-7)
    # A fixed point for steps of any length, and beyond the limit none that the ascent finds.
    torch.testing.assert_close(step(z, 3 * limit), z, rtol=0, atol=1e-7)
    away = z + 10 * torch.linalg.svd(B).Vh[0]
    for _ in range(300):
        away = step(away, 1.5 * limit)
    assert (away - z).norm() > 1
    assert (z - truth).abs().max() < 0.1  # 20 measurements of 40 unknowns, three of them not 0


@pytest.mark.checks("eq-gae-local", how="exact")
def test_the_error_of_a_local_subspace_is_that_of_pythagoras(digits):
    x = digits[0][:100]
    fit = fit_local_linear(digits[0], 6, 3, generator=torch.Generator().manual_seed(0))
    model = fit.model
    direct = torch.stack(
        [((x - m) - (x - m) @ W @ W.T).square().sum(1) for m, W in zip(model.mu, model.W, strict=True)], 1
    )
    torch.testing.assert_close(model.squared_distances(x), direct, **TOL)
    expected = -direct.amin(1) / 2 - math.log(6) - 32 * math.log(2 * math.pi)
    torch.testing.assert_close(model.log_joint(x).amax(1), expected, **TOL)
    codes = model.encode(x)
    torch.testing.assert_close((x - model.decode(codes)).square().sum(1), direct.amin(1), **TOL)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize(("components", "q"), [(10, 0), (6, 2)])
def test_no_step_makes_it_worse(digits, hard, components, q):
    generator = torch.Generator().manual_seed(3)
    fit = fit_local_linear(digits[0], components, q, hard=hard, sigma=0.3, max_steps=60, generator=generator)
    assert (fit.objective.diff() > -1e-10).all() and fit.objective[-1] > fit.objective[0] and fit.steps > 2


def test_soft_planes_are_no_expectation_maximisation():
    """The likelihood at the best point of a plane is the same all along it: its integral over x is infinite."""
    W = torch.tensor([[[0.6], [0.8]]], dtype=torch.float64)
    model = LocalLinearGAE(torch.zeros(1, 2, dtype=torch.float64), W, sigma=0.5)
    along = torch.tensor([[0.3, -0.1]], dtype=torch.float64) + torch.arange(-500, 501)[:, None] * W[0, :, 0]
    value = model.log_joint(along)[:, 0]
    torch.testing.assert_close(value, value[500].expand(1001), rtol=0, atol=1e-8)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    two = fit_local_linear(x, 2, 1, hard=False, equal_weights=True, sigma=0.5, max_steps=1).model
    # The bound that a round maximises: minus squared residuals, weighted with the shares, touching at the old planes.
    share, squared = two.log_joint(x).softmax(1), two.squared_distances(x)
    new = LocalLinearGAE(*local_linear._principal(x, share, 1), sigma=0.5)

    def bound(model):
        return (share * (model.log_joint(x) - share.log())).sum(1)

    torch.testing.assert_close(bound(two), two.log_joint(x).logsumexp(1), rtol=0, atol=1e-10)
    assert (bound(new) <= new.log_joint(x).logsumexp(1) + 1e-12).all() and bound(new).sum() > bound(two).sum()
    assert (share * new.squared_distances(x)).sum() < (share * squared).sum()


def test_equally_near_components_need_a_rule_for_the_alternation_to_end():
    """Two lines cross in a datum: given to the other each time, it changes no subspace, and there is no end."""
    line = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    x = torch.cat([torch.stack([line, 0 * line], 1), torch.stack([0 * line, line], 1), torch.zeros(1, 2)])
    seen = []
    for last in (0, 1, 0, 1):
        assigned = torch.tensor([0] * 4 + [1] * 4 + [last])
        weights = torch.nn.functional.one_hot(assigned, 2).double()
        model = LocalLinearGAE(*local_linear._principal(x, weights, 1))
        squared = model.squared_distances(x)
        assert float(squared.amin(1).sum()) == pytest.approx(0, abs=1e-24) and torch.equal(
            squared[-1, 0], squared[-1, 1]
        )
        seen.append((model.W @ model.W.mT, model.mu))
    for subspace, mean in seen[1:]:
        torch.testing.assert_close(subspace, seen[0][0])
        torch.testing.assert_close(mean, seen[0][1])
    start = LocalLinearGAE(torch.zeros(2, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[:, :, None])
    fit = fit_local_linear(x, 2, 1, start=start)
    assert fit.steps == 1 and fit.model.encode(x).component[-1] == 0  # the first of the two, and the end


def test_soft_planes_lead_to_a_good_fit_of_a_swiss_roll():
    x, unseen = (torch.from_numpy(make_swiss_roll(n, noise=0.05, random_state=n)[0]) for n in (2000, 1000))
    hard, soft = [], []
    options = {"hard": False, "equal_weights": True, "max_steps": 8}
    for seed in range(20):
        model = fit_local_linear(x, 20, 0, generator=torch.Generator().manual_seed(seed)).model.mu
        hard.append(fit_local_linear(x, 20, 2, start=model).model)
        for sigma in (1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1):
            model = fit_local_linear(x, 20, 2, start=model, sigma=sigma, **options).model
        soft.append(fit_local_linear(x, 20, 2, start=model).model)

    def error(model, x):
        return float((x - model(x)).square().mean())

    def chosen(models):
        return error(min(models, key=lambda model: error(model, x)), unseen)

    # 0.05² / 3 = 0.0008 is the noise. In the chapter: 0.0036, 0.0048 and the medians 0.0055 and 0.0098.
    assert chosen(soft) <= 0.0039 < chosen(hard) < 0.0055
    medians = [sorted(error(model, unseen) for model in models)[10] for models in (soft, hard)]
    assert 0.005 < medians[0] < 0.0065 and 0.009 < medians[1] < 0.011 and medians[1] > 2 * chosen(hard)
    assert 0.0070 < sorted(error(model, x) for model in hard)[10] < 0.0085  # in training
    chapter = (Path(__file__).parents[1] / "book" / "gae.md").read_text(encoding="utf-8")
    assert "0.0036" in chapter and "0.0048" in chapter and "0.0055" in chapter and "0.0098" in chapter


@pytest.mark.checks("eq-gae-not-normalised", how="exact")
def test_weights_that_see_x_give_no_density():
    with mp.workdps(30):
        a, s = mp.mpf(1), mp.mpf(1) / 2

        def mean(x):  # the source's: weights proportional to exp(-(x - mu_k)^2), centres at -a and a
            u, v = mp.exp(-((x + a) ** 2)), mp.exp(-((x - a) ** 2))
            return (a * v - a * u) / (u + v)

        assert abs(mean(mp.mpf("0.37")) - a * mp.tanh(2 * a * mp.mpf("0.37"))) < mp.mpf(10) ** -25
        mass = mp.quad(lambda x: mp.npdf(x, mean(x), s), [-8, -2, -1, 0, 1, 2, 8])
        assert mp.nstr(mass, 3) == "2.48"
        hard = mp.quad(lambda x: (mp.npdf(x, a, s) + mp.npdf(x, -a, s)) / 2, [-8, -2, -1, 0, 1, 2, 8])
        assert abs(hard - 1) < mp.mpf(10) ** -15


def test_the_norm_without_its_square_is_not_above(digits):
    """The source: minus the squared residual of a code is at most the largest of minus the residuals."""
    x = digits[0][:200]
    model = fit_local_linear(digits[0], 6, 20, generator=torch.Generator().manual_seed(0)).model
    squared = model.squared_distances(x)
    assert (-squared <= (-squared).amax(1, keepdim=True)).all()
    broken = (-squared > (-squared.sqrt()).amax(1, keepdim=True)).any(1)
    assert 0.5 < broken.double().mean() and (squared.amin(1)[broken] < 1).all()


def test_the_subspace_of_a_datum_is_a_sum_over_components():
    """Where all components have one subspace, so has every mixture; the source's f_k W_k, without the sum, has not."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 2, generator=generator, dtype=torch.float64)).Q
    mu = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    f = (-torch.cdist(x, mu).square()).softmax(1)
    parts = f[..., None, None] * basis
    torch.testing.assert_close(parts.sum(1), basis.expand(4, 5, 2))
    assert (parts - basis).abs().amax((2, 3)).min() > 1e-3


@pytest.mark.checks("eq-gae-cost", how="exact")
def test_the_cost_of_a_round_grows_with_the_dimensions_and_the_steps():
    """The source's O(NKE) has neither: multiplications of the closed form, and calls of the decoder by ascent."""

    def of_axes(n, k, d):
        x, weights = torch.randn(n, d), torch.rand(n, k)
        with FlopCounterMode(display=False) as counter:
            local_linear._principal(x, weights, 1)
        return counter.get_total_flops()  # without the eigenvectors, of which K matrices (D, D) are to be found

    n, k, d = 200, 4, 64
    assert of_axes(n, k, d) == 2 * n * k * d**2 + 2 * n * k * d  # the covariances, and the means
    given = []
    eigh = torch.linalg.eigh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", lambda matrix: (given.append(tuple(matrix.shape)), eigh(matrix))[1])
        of_axes(n, k, d)
    assert given == k * [(d, d)]

    def flops(n, k, d, q):
        x, mu = torch.randn(n, d), torch.randn(k, d)
        model = LocalLinearGAE(mu, torch.linalg.qr(torch.randn(k, d, q)).Q)
        with FlopCounterMode(display=False) as counter:
            model.squared_distances(x)
        return counter.get_total_flops()

    few = flops(200, 4, 16, 2)
    for more in ((400, 4, 16, 2), (200, 8, 16, 2), (200, 4, 32, 2), (200, 4, 16, 4)):
        assert flops(*more) == pytest.approx(2 * few, rel=0.05)
    W, mu, x = random_linear()
    for steps in (3, 6):
        decoder, rows = linear(W, mu), []
        decoder.register_forward_hook(lambda module, z, out, rows=rows: rows.append(len(z[0])))
        GAE(decoder, 3, steps=steps, step_size=0.01, n_starts=2).infer(x)
        assert sum(rows) == steps * 2 * len(x)


@pytest.mark.checks("eq-gae-nmf", how="exact")
def test_each_non_negative_coordinate_goes_to_its_best_value():
    generator = torch.Generator().manual_seed(0)
    W, z, x = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((3, 7), (1, 3), (1, 7)))
    by_hand = z.clone()
    for j in range(3):
        grid = torch.linspace(0, 3, 300_001, dtype=torch.float64)
        tried = by_hand.repeat(len(grid), 1)
        tried[:, j] = grid
        by_hand[0, j] = grid[(x - tried @ W).square().sum(1).argmin()]
    torch.testing.assert_close(nmf_step(x, z, W), by_hand, rtol=0, atol=1e-5)
    for _ in range(2000):
        z = nmf_step(x, z, W)
    torch.testing.assert_close(z[0], torch.from_numpy(nnls(W.numpy().T, x[0].numpy())[0]), **TOL)


# Errors per pixel of known methods on the digits, held out.


def printed(row, q):
    """The chapter's figure for a row of its table, which begins with these words, and q numbers a code."""
    chapter = (Path(__file__).parents[1] / "book" / "gae.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split("|") for line in chapter.splitlines() if line.startswith("| ")]
    (heads,) = [line for line in lines if line[0].startswith("numbers a code")]
    (cells,) = [line for line in lines if line[0].startswith(row)]
    return float(cells[[head.strip() for head in heads].index(str(q))])


@pytest.mark.parametrize(
    ("q", "known"), [(0, 0.0734), (2, 0.0540), (5, 0.0347), (8, 0.0249), (10, 0.0201), (20, 0.0084)]
)
def test_error_of_pca(digits, q, known):
    x, unseen = digits
    model = fit_local_linear(x, 1, q).model
    error = float((unseen - model(unseen)).square().mean())
    assert error < 1.02 * known and error == pytest.approx(printed("one component", q), abs=6e-5)


def best_of(x, components, q, starts):
    """The fit with the least training error, started from k-means."""
    fits = []
    for seed in range(starts):
        generator = torch.Generator().manual_seed(seed)
        centres = fit_local_linear(x, components, 0, generator=generator).model.mu
        fits.append(fit_local_linear(x, components, q, start=centres))
    return max(fits, key=lambda fit: float(fit.objective[-1])).model


@pytest.mark.parametrize(
    ("components", "q", "known"), [(10, 0, 0.0415), (50, 0, 0.0279), (10, 2, 0.0261), (10, 5, 0.0165), (10, 8, 0.0118)]
)
def test_error_of_k_means_and_local_pca(digits, components, q, known):
    x, unseen = digits
    model = best_of(x, components, q, starts=5)
    error = float((unseen - model(unseen)).square().mean())
    assert error < 1.02 * known
    assert error == pytest.approx(printed({10: "ten", 50: "fifty"}[components], q), abs=1e-4)


def test_error_of_nmf(digits):
    x, unseen = digits
    known = NMF(10, init="nndsvda", solver="cd", max_iter=1, tol=0)
    z = torch.from_numpy(known.fit_transform(x.numpy()))
    W = torch.from_numpy(known.components_)
    for _ in range(400):
        z = nmf_step(x, z, W)
        W = nmf_step(x.mT, W.mT, z.mT).mT
    code = torch.zeros(len(unseen), 10, dtype=x.dtype)
    for _ in range(200):
        code = nmf_step(unseen, code, W)
    error = float((unseen - code @ W).square().mean())
    assert error < 1.02 * 0.0255 and error == pytest.approx(printed("NMF", 10), abs=1e-4)


# What goes wrong is said.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps and n_starts must be at least 1"),
        ({"step_size": 0.0}, "step_size and sigma must be positive"),
        ({"sigma": -1.0}, "step_size and sigma must be positive"),
        ({"prior": "uniform"}, 'prior must be "normal" or "flat"'),
        ({"combine": "sum"}, 'combine must be "max" or "logmeanexp"'),
    ],
)
def test_bad_arguments_of_the_gae_are_named(changes, message):
    W, mu, _ = random_linear()
    with pytest.raises(ValueError, match=message):
        GAE(linear(W, mu), 3, **{"steps": 1, "step_size": 0.1, **changes})


def test_what_cannot_be_done_with_a_code_is_said():
    W, mu, x = random_linear()
    flat = GAE(linear(W[:, [0, 0, 1]], mu), 3, steps=50, step_size=0.01, prior="flat")
    with pytest.raises(ValueError, match="strict maxima"):
        flat.laplace_nll(x)  # W is singular: the code is not unique
    assert torch.isfinite(flat.encode(x)).all()
    with pytest.raises(ValueError, match='prior must be "normal" to draw codes'):
        flat.sample(3)
    with pytest.raises(ValueError, match="decoder must give the shape of x"):
        flat.loss(x[:, :4])
    assert GAE(linear(W, mu), 3, steps=1, step_size=0.1).sample(4).shape == (4, 6)


def test_a_singular_subspace_has_the_shortest_code():
    W, mu, x = random_linear()
    W = W[:, [0, 0, 1]]
    flat = GAE(linear(W, mu), 3, steps=5000, step_size=0.05, prior="flat")
    torch.testing.assert_close(flat.encode(x).detach(), (x - mu) @ torch.linalg.pinv(W).T, **TOL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((11, 0), "components must be 1 to n"),
        ((0, 0), "components must be 1 to n"),
        ((2, 5), "dim 0 to D"),
    ],
)
def test_bad_numbers_of_components_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_local_linear(torch.randn(10, 4), *arguments)


def test_data_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="x must be finite"):
        fit_local_linear(torch.full((10, 4), math.nan), 2, 0)
    with pytest.raises(ValueError, match="start must have shape"):
        fit_local_linear(torch.randn(10, 4), 2, 0, start=torch.zeros(3, 4))


def test_an_empty_component_is_put_on_the_worst_datum_at_once():
    """After one step, before the alternation can make good a worse choice; and on no datum that is another's last."""
    start = torch.tensor([[100.1], [500.0]], dtype=torch.float64)
    x = 100 + torch.tensor([[0.0], [0.1], [0.2], [10.0]], dtype=torch.float64)
    fit = fit_local_linear(x, 2, 0, start=start, max_steps=1)
    assert fit.reseeded == 1
    torch.testing.assert_close(fit.model.mu[:, 0], torch.tensor([100.1, 110.0], dtype=torch.float64))
    # The worst datum, 150, is all that the second component has: the third takes the worst of the first's.
    start = torch.tensor([[100.1], [145.0], [500.0]], dtype=torch.float64)
    x = 100 + torch.tensor([[0.0], [0.1], [0.3], [50.0]], dtype=torch.float64)
    fit = fit_local_linear(x, 3, 0, start=start, max_steps=1)
    assert fit.reseeded == 1
    torch.testing.assert_close(fit.model.mu[:, 0], torch.tensor([100.05, 150.0, 100.3], dtype=torch.float64))
    # Two empty components do not land on one datum.
    start = torch.tensor([[100.1], [500.0], [600.0]], dtype=torch.float64)
    fit = fit_local_linear(x, 3, 0, start=start, max_steps=1)
    assert fit.reseeded == 2 and len(fit.model.mu.unique()) == 3
    torch.testing.assert_close(fit.model.mu[:, 0], torch.tensor([100.05, 150.0, 100.3], dtype=torch.float64))


def test_an_empty_component_goes_to_the_worst_datum():
    x = 100 + torch.tensor([[0.0], [0.1], [0.2], [10.0]], dtype=torch.float64)
    start = torch.tensor([[100.1], [500.0]], dtype=torch.float64)  # a mean over no points would be 0, far from all
    fit = fit_local_linear(x, 2, 0, start=start)
    assert fit.reseeded == 1
    torch.testing.assert_close(fit.model.mu.flatten().sort().values, torch.tensor([100.1, 110.0], dtype=torch.float64))
    copies = torch.ones(5, 2, dtype=torch.float64)
    assert float(fit_local_linear(copies, 3, 0).model.squared_distances(copies).amin(1).sum()) == 0


def test_ppca_is_the_maximum_of_its_likelihood(digits):
    x = digits[0][:, digits[0].std(0) > 0.05]
    mu, W, noise = ppca(x, 4)

    def likelihood(mu, W, noise):
        return float(factor_log_likelihood(x, mu, W, noise.expand(len(mu))).mean())

    best = likelihood(mu, W, noise)
    for changed in ((mu + 0.01, W, noise), (mu, 1.05 * W, noise), (mu, W, 1.05 * noise), (mu, W, 0.95 * noise)):
        assert likelihood(*changed) < best
    with pytest.raises(ValueError, match="dim must be 1 to"):
        ppca(x, 0)
    with pytest.raises(ValueError, match="must have variance"):
        ppca(torch.randn(50, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="psi must be positive"):
        factor_log_likelihood(x, mu, W, 0 * mu)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_or_not_floating_are_named(bad):
    x, whole = torch.rand(6, 3), torch.ones(6, 3, dtype=torch.int64)
    spoilt = x.clone()
    spoilt[1, 2] = bad
    z, W, mu, psi = torch.rand(6, 2), torch.rand(2, 3), torch.zeros(3), torch.ones(3)
    for call in (
        lambda x: ppca(x, 2),
        lambda x: plus_plus(x, 2),
        lambda x: nmf_step(x, z, W),
        lambda x: factor_log_likelihood(x, mu, W.T, psi),
    ):
        with pytest.raises(ValueError, match="x must be finite, got 1 entries that are not"):
            call(spoilt)
        with pytest.raises(ValueError, match=r"x must be floating point, got torch\.int64"):
            call(whole)
        call(x)
    with pytest.raises(ValueError, match="z must be finite"):
        nmf_step(x, z * bad, W)
    with pytest.raises(ValueError, match="W must be finite"):
        nmf_step(x, z, W * bad)
    with pytest.raises(ValueError, match="mu must be finite"):
        factor_log_likelihood(x, mu + bad, W.T, psi)
    with pytest.raises(ValueError, match="x must have rows"):
        ppca(x[:0], 2)
    for components in (0, 7):
        with pytest.raises(ValueError, match=f"components must be 1 to n, got components={components} for n=6"):
            plus_plus(x, components)


def test_the_steps_of_the_articles_code_end_at_a_ridge_regression():
    """Its term -z is the gradient of normal codes; the text has the flat prior, whose code is longer."""
    W, mu, x = random_linear(8)
    z = torch.zeros(5, 3, dtype=W.dtype)
    for _ in range(20_000):
        z = z + 0.01 * ((x - mu - z @ W.T) @ W - z)
    ridge, flat = (
        torch.linalg.solve(W.T @ W + extra * torch.eye(3, dtype=W.dtype), W.T @ (x - mu).T).T for extra in (1, 0)
    )
    torch.testing.assert_close(z, ridge, **TOL)
    normal = GAE(linear(W, mu), 3, steps=2000, step_size=0.05, sigma=1.0)
    torch.testing.assert_close(normal.encode(x).detach(), ridge, **TOL)
    assert (flat.norm(dim=1) > 1.02 * ridge.norm(dim=1)).all()


def test_a_code_determines_the_plane_of_a_curved_decoder():
    """The source says that z cannot, in principle: on a circle the tangent at z does, and finds the code."""
    circle = lambda z: torch.stack([z.cos(), z.sin()], -1)  # noqa: E731
    x, z = 1.3 * circle(torch.tensor(0.9, dtype=torch.float64)), torch.tensor(0.2, dtype=torch.float64)
    tangents = []
    for _ in range(60):
        W = torch.func.jacrev(circle)(z)
        tangents.append(W)
        z = z + 0.5 * (W @ (x - circle(z))) / (W @ W)
    assert float(z) == pytest.approx(0.9, abs=1e-8)
    assert (tangents[0] - tangents[-1]).norm() > 0.5


def test_bad_parts_of_local_models_are_named():
    mu = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="mu must be"):
        LocalLinearGAE(mu, torch.zeros(3, 3, 1))
    with pytest.raises(ValueError, match="orthonormal"):
        LocalLinearGAE(mu, torch.ones(2, 3, 1))
    with pytest.raises(ValueError, match="sigma must be positive"):
        LocalLinearGAE(mu, torch.zeros(2, 3, 0), sigma=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        nmf_step(torch.ones(2, 3), -torch.ones(2, 1), torch.ones(1, 3))
    with pytest.raises(ValueError, match="x, z, W must be"):
        nmf_step(torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3))
    with pytest.raises(ValueError, match="beta must be positive"):
        soft_minimum(torch.ones(3), 0.0)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="values must be finite, got 1 that are not"):
            soft_minimum(torch.tensor([1.0, bad]), 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        KernelMixture(0, 2, 3)
    with pytest.raises(ValueError, match="x must have shape"):
        GGAE(KernelMixture(2, 2, 3), 2, steps=1, step_size=0.1).loss(torch.zeros(4, 5))


def test_it_trains_in_the_common_loop():
    x = data.load("digits").x_train[:256]
    torch.manual_seed(0)
    _, decoder = nets.mlp_pair(x.shape[1:], 4, hidden=(32,))
    gae = GAE(decoder, 4, steps=5, step_size=0.05, sigma=0.3)
    history = train.fit(gae, x, epochs=20, batch_size=64, lr=5e-3, device="cpu", progress=False).history
    assert history["total"][-4:].mean() < history["total"][:4].mean() - 20
    with torch.no_grad():
        assert gae(x).shape == x.shape and not gae.encode(x).requires_grad
