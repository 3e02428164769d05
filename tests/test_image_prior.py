"""Image priors: early stopping, averages, the network and its records; maximal activation with and without log q(x)."""

import dataclasses
import functools
import importlib.metadata
import json
import math
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from helpers import assert_z, begun_states
from scipy import optimize

from gae_core import records, train
from gae_core.chains import mala
from gae_core.models.image_prior import Hourglass, ImagePrior, psnr
from gae_core.seeds import seed_of, stream
from gae_core.studies import image_prior as study
from gae_core.studies import recording


def prior(shape=(1, 16, 16), **options):
    torch.manual_seed(0)
    net = Hourglass(2, shape[0], widths=(4, 8), skips=(0, 2))
    z = 0.1 * torch.rand(1, 2, *shape[1:], generator=torch.Generator().manual_seed(1))
    return ImagePrior(net, z, **options)


@pytest.mark.parametrize(("widths", "skips"), [((4,), (0,)), ((4, 8), (0, 2)), ((3, 5, 7), (2, 0, 3))])
def test_the_network_gives_an_image_of_the_size_of_its_input(widths, skips):
    net = Hourglass(2, 3, widths=widths, skips=skips)
    image = net(torch.rand(1, 2, 16, 24))
    assert image.shape == (1, 3, 16, 24) and 0 < image.min() and image.max() < 1
    bypass = sum(any(p.requires_grad for p in m.parameters()) for m in net.skip)
    assert bypass == sum(s > 0 for s in skips)
    image.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_bad_shapes_and_numbers_are_named():
    with pytest.raises(ValueError, match="as long as each other"):
        Hourglass(2, 1, widths=(4, 8), skips=(0,))
    with pytest.raises(ValueError, match="sides divisible by 4"):
        Hourglass(2, 1, widths=(4, 8), skips=(0, 0))(torch.rand(1, 2, 10, 16))
    for options in ({"average": 1.0}, {"input_noise": -1.0}):
        with pytest.raises(ValueError, match="average must be in"):
            prior(**options)
    with pytest.raises(ValueError, match="must have the shape of x"):
        prior().loss(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="must have the shape of clean"):
        psnr(torch.zeros(3), torch.zeros(4))


def test_psnr_of_a_known_error():
    assert psnr(torch.full((5,), 0.3), torch.full((5,), 0.3)) == math.inf
    with pytest.raises(ValueError, match="floating point"):
        psnr(torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
    assert psnr(torch.full((5,), 0.6), torch.full((5,), 0.5)) == pytest.approx(20, abs=1e-4)


def test_the_loss_is_the_squared_error_of_what_is_seen_and_the_average_runs():
    mask = (torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    model, x = prior(degrade=lambda image: mask * image, average=0.9), torch.rand(1, 1, 16, 16)
    losses, outputs = [], []
    for seed in range(3):
        losses.append(model.loss(x, generator=torch.Generator().manual_seed(seed)).total)
        outputs.append(model.output)
    for loss, output in zip(losses, outputs, strict=True):
        torch.testing.assert_close(loss[0], (mask * output - x).square().sum())
    expected = 0.9 * (0.9 * outputs[0] + 0.1 * outputs[1]) + 0.1 * outputs[2]
    torch.testing.assert_close(model.averaged, expected)
    assert (outputs[0] - outputs[1]).abs().max() > 0  # the input's noise is drawn anew


def test_it_learns_the_image_before_the_noise():
    across = torch.linspace(0, 3 * math.pi, 32)
    clean = (0.5 + 0.4 * torch.sin(across)[:, None] * torch.cos(across))[None, None]
    noisy = clean + 0.15 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    model, curve = prior((1, 32, 32)), []
    fit = {"epochs": 700, "batch_size": 1, "lr": 0.02, "device": "cpu", "progress": False}
    train.fit(
        model, noisy, callback=lambda m, step: curve.append((psnr(m.output, clean), psnr(m.output, noisy))), **fit
    )
    to_clean, to_noisy = zip(*curve, strict=True)
    best = max(to_clean)
    assert best > psnr(noisy, clean) + 3  # it denoises
    assert to_noisy[-1] > to_noisy[100] + 0.5  # and goes on towards the noise
    assert psnr(model.averaged, clean) > to_clean[-1]


def linear(seed=0, pixels=5, weights=8):
    """Jacobian J (pixels, weights), eigenvalues and eigenvectors of J J', start f0 and clean image c."""
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(pixels, weights))
    return J, *np.linalg.eigh(J @ J.T), rng.normal(size=pixels), 2 * rng.normal(size=pixels)


def descend(J, f0, x, eta, steps, *, A=None):
    """Outputs f0 + J theta after gradient steps on |A f - x|^2 / 2 in the weights theta, from 0; x (..., seen)."""
    A = np.eye(len(J)) if A is None else A
    theta = np.zeros((*x.shape[:-1], J.shape[1]))
    for _ in range(steps):
        theta -= eta * ((f0 + theta @ J.T) @ A.T - x) @ A @ J
    return f0 + theta @ J.T


@pytest.mark.checks("eq-image_prior-maximum", how="exact")
def test_the_maximum_over_the_weights_fits_noise_and_finite_steps_denoise():
    """The source's loss, the maximum over the weights, is 0 for an image and for noise; its output is no estimate."""
    J, values, vectors, f0, _ = linear()
    rng = np.random.default_rng(1)
    for x in (np.ones(5), rng.normal(size=5)):
        theta = np.linalg.lstsq(J, x - f0, rcond=None)[0]
        assert -np.square(f0 + J @ theta - x).sum() == pytest.approx(0, abs=1e-24)
    # An image on the leading eigenvector, and noise: at the maximum the error is all of the noise, before it is less.
    clean, eta = f0 + 3 * vectors[:, -1], 1 / values[-1]
    noisy = clean + 0.5 * rng.normal(size=(4000, 5))
    at_maximum = np.square(descend(J, f0, noisy, eta, 3000) - clean).sum(1)
    early = np.square(descend(J, f0, noisy, eta, 1) - clean).sum(1)
    assert_z(at_maximum, 5 * 0.25)
    assert early.mean() < 0.7 * at_maximum.mean()


@pytest.mark.checks("eq-image_prior-residual", how="exact")
@pytest.mark.parametrize("seed", range(3))
def test_the_residual_of_descent_in_the_weights(seed):
    J, values, vectors, f0, x = linear(seed)
    K = J @ J.T
    np.testing.assert_allclose((vectors * values) @ vectors.T, K, atol=1e-12)
    eta = 0.9 / values[-1]
    for t in (0, 1, 7, 50):
        expected = np.linalg.matrix_power(np.eye(5) - eta * K, t) @ (f0 - x)
        residual = descend(J, f0, x, eta, t) - x
        np.testing.assert_allclose(residual, expected, atol=1e-11)
        np.testing.assert_allclose(vectors.T @ residual, (1 - eta * values) ** t * (vectors.T @ (f0 - x)), atol=1e-11)
    start = np.linalg.norm(f0 - x)
    assert np.linalg.norm(descend(J, f0, x, 1.99 / values[-1], 3000) - x) < start / 100
    assert np.linalg.norm(descend(J, f0, x, 2.01 / values[-1], 3000) - x) > 1e6 * start


@pytest.mark.checks("eq-image_prior-error", how="statistical")
@pytest.mark.checks("eq-image_prior-best-time", how="symbolic")
def test_the_expected_error_of_early_stopping():
    J, values, vectors, f0, clean = linear(2)
    eta, sigma = 0.8 / values[-1], 0.7
    rho, b = 1 - eta * values, vectors.T @ (clean - f0)
    noisy = clean + sigma * np.random.default_rng(3).normal(size=(20_000, 5))

    def parts(t):
        return np.square(rho**t * b).sum(), sigma**2 * np.square(1 - rho**t).sum()

    for t in (1, 5, 40):
        assert_z(np.square(descend(J, f0, noisy, eta, t) - clean).sum(1), sum(parts(t)))
    bias, variance = np.array([parts(t) for t in range(400)]).T
    assert (np.diff(bias) < 0).all() and (np.diff(variance) > 0).all()
    assert bias[0] == pytest.approx(np.square(clean - f0).sum()) and variance[0] == 0
    assert sum(parts(10**6)) == pytest.approx(5 * sigma**2)

    left, beta, sd = sp.symbols("s b sigma", positive=True)
    error = left**2 * beta**2 + sd**2 * (1 - left) ** 2
    (best,) = sp.solve(sp.diff(error, left), left)
    assert sp.simplify(best - sd**2 / (beta**2 + sd**2)) == 0 and sp.diff(error, left, 2).is_positive
    assert sp.simplify(1 - best - beta**2 / (beta**2 + sd**2)) == 0


@pytest.mark.checks("eq-image_prior-ridge", how="exact")
def test_stopping_against_ridge():
    rng = np.random.default_rng(4)
    with mp.workdps(40):
        for _ in range(200):
            rate, t = mp.mpf(rng.random()), int(rng.integers(1, 500))
            shares = (1 - rate) ** t, mp.exp(-rate * t), 1 / (1 + rate * t)
            assert shares[0] <= shares[1] <= shares[2]
        rate = mp.mpf(10) ** -12
        assert abs((1 - rate) ** 5 - 1 / (1 + 5 * rate)) < 100 * rate**2  # agree to first order
    J, values, vectors, f0, x = linear(5)
    eta, t = 0.9 / values[-1], 6
    alpha = 1 / (eta * t)
    theta = np.linalg.solve(J.T @ J + alpha * np.eye(8), J.T @ (x - f0))  # the end of descent with the penalty
    share = (vectors.T @ (f0 + J @ theta - x)) / (vectors.T @ (f0 - x))
    np.testing.assert_allclose(share, alpha / (values + alpha), rtol=1e-9)
    np.testing.assert_allclose(share, 1 / (1 + eta * values * t), rtol=1e-9)


@pytest.mark.checks("eq-image_prior-kernel", how="exact")
def test_missing_pixels_come_through_shared_weights():
    J, values, _, f0, clean = linear(6, pixels=6, weights=9)
    K = J @ J.T
    averages = np.kron(np.eye(3), np.full((1, 2), 0.5))
    for A in (np.eye(6)[[0, 2, 3]], averages):
        found = descend(J, f0, A @ clean, 1 / values[-1], 20_000, A=A)
        gain = K @ A.T @ np.linalg.inv(A @ K @ A.T)
        np.testing.assert_allclose(found, f0 + gain @ (A @ clean - A @ f0), atol=1e-8)
        np.testing.assert_allclose(A @ found, A @ clean, atol=1e-8)
    A, apart = np.eye(6)[[0, 2, 3]], np.diag([1.0, 2, 3, 1, 2, 3])  # no weight is shared: K is diagonal
    found = descend(apart, f0, A @ clean, 0.1, 5000, A=A)
    np.testing.assert_allclose(found[[1, 4, 5]], f0[[1, 4, 5]])


@pytest.mark.checks("eq-image_prior-average", how="exact")
def test_a_mean_is_better_than_its_parts_by_their_spread():
    rng = np.random.default_rng(7)
    draw = lambda *shape: np.vectorize(Fraction)(rng.integers(-50, 50, shape))  # noqa: E731
    clean, images = draw(6), draw(4, 6)
    weights = np.array([Fraction(k, 10) for k in (1, 2, 3, 4)])
    for w in (weights, np.full(4, Fraction(1, 4))):
        mean = w @ images
        error, spread = w @ ((images - clean) ** 2).sum(1), w @ ((images - mean) ** 2).sum(1)
        assert ((mean - clean) ** 2).sum() == error - spread and spread > 0


@pytest.mark.checks("eq-image_prior-ema", how="symbolic")
@pytest.mark.checks("eq-image_prior-age", how="symbolic")
def test_what_an_exponential_average_leaves_of_fluctuations():
    a, r, v = sp.symbols("alpha rho v", positive=True)
    # v is stationary under g' = a g + (1 - a) f', where f' = r f + noise: Cov(g, f) = c solves its own equation.
    c = sp.Symbol("c")
    (c,) = sp.solve(sp.Eq(c, a * r * c + (1 - a)), c)  # Cov(g', f') = a r Cov(g, f) + (1 - a) Var f
    (v,) = sp.solve(sp.Eq(v, a**2 * v + (1 - a) ** 2 + 2 * a * (1 - a) * r * c), v)
    assert sp.simplify(v - (1 - a) / (1 + a) * (1 + a * r) / (1 - a * r)) == 0
    k = sp.Symbol("k", integer=True, nonnegative=True)
    alpha = sp.Rational(99, 100)
    assert sp.summation(k * (1 - alpha) * alpha**k, (k, 0, sp.oo)) == 99 == alpha / (1 - alpha)
    assert v.subs({r: 0, a: alpha}) == sp.Rational(1, 199)
    rng = np.random.default_rng(8)
    f, g = rng.normal(size=4000), np.zeros(4000)
    for _ in range(600):  # 0.9^600 is nothing
        f = 0.5 * f + math.sqrt(0.75) * rng.normal(size=4000)
        g = 0.9 * g + 0.1 * f
    assert_z(g**2, (0.1 / 1.9) * (1.45 / 0.55))


@pytest.mark.checks("eq-image_prior-hindsight", how="statistical")
def test_the_best_in_hindsight_is_biased_upwards():
    known = {1: 0.0, 2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi)}
    rng = np.random.default_rng(9)
    for m, expected in known.items():
        density = lambda x, m=m: x * m * mp.npdf(x) * mp.ncdf(x) ** (m - 1)  # noqa: E731
        assert float(mp.quad(density, [-12, 0, 12])) == pytest.approx(expected, abs=1e-12)
        assert_z((26 + 0.3 * rng.normal(size=(40_000, m))).max(1), 26 + 0.3 * expected)


@pytest.mark.checks("eq-image_prior-bayes", how="exact")
def test_without_log_q_the_belief_finds_another_image():
    """Sixteen images, a joint distribution: the source's maximum is not that of the images of the class."""
    rng = np.random.default_rng(10)
    q_x, belief = rng.dirichlet(np.full(16, 0.3)), rng.random(16)
    marginal = (q_x * belief).sum()
    of_class = q_x * belief / marginal
    assert of_class.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.log(of_class), np.log(belief) + np.log(q_x) - np.log(marginal), rtol=1e-12)
    assert belief.argmax() != of_class.argmax()


@pytest.mark.checks("eq-image_prior-linear", how="exact")
@pytest.mark.checks("eq-image_prior-mean", how="statistical")
@pytest.mark.parametrize("seed", range(3))
def test_with_log_q_an_image_of_the_class_lies_along_the_covariance(seed):
    rng = np.random.default_rng(seed)
    root, w, m, offset = rng.normal(size=(4, 4)), rng.normal(size=4), rng.normal(size=4), rng.normal()
    S = root @ root.T
    sigmoid = lambda u: 1 / (1 + np.exp(-u))  # noqa: E731

    def objective(x):
        return np.logaddexp(0, -w @ x - offset) + 0.5 * (x - m) @ np.linalg.solve(S, x - m)

    found = optimize.minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    s = optimize.brentq(lambda s: s - sigmoid(-offset - w @ m - s * w @ S @ w), 0, 1, xtol=1e-14)
    np.testing.assert_allclose(found, m + s * S @ w, atol=1e-5)
    # The belief alone rises along w for ever; and w is not the direction in which the maximum lies.
    beliefs = [np.logaddexp(0, -w @ (m + k * w) - offset) for k in (0, 1, 10, 20)]
    assert (np.diff(beliefs) < 0).all()
    move = found - m
    assert abs(w @ move) / np.linalg.norm(w) / np.linalg.norm(move) < 0.99
    # The mean of the class, by keeping draws with the probability that the classifier gives them.
    x = m + rng.normal(size=(200_000, 4)) @ root.T
    kept = x[rng.random(len(x)) < sigmoid(x @ w + offset)]
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    u = w @ m + offset + math.sqrt(w @ S @ w) * nodes
    factor = (weights * sigmoid(u) * sigmoid(-u)).sum() / (weights * sigmoid(u)).sum()
    for coordinate in range(4):
        assert_z(kept[:, coordinate], (m + factor * S @ w)[coordinate])


@pytest.mark.checks("eq-image_prior-typical", how="statistical")
def test_a_maximum_is_no_sample():
    """The maximum of N(0, I) is 0. Samples, by Langevin steps with acceptance from there, have length sqrt d."""
    d = 50
    x = np.random.default_rng(11).normal(size=(20_000, d))
    assert_z(0.5 * np.square(x).sum(1), d / 2)  # log q(0) - log q(x)
    assert_z(np.square(x).sum(1), d)
    options = {"step_size": 0.3, "n_steps": 1, "warmup": 300, "generator": torch.Generator().manual_seed(0)}
    chains = mala(lambda z: 0.5 * z.square().sum(1), torch.zeros(400, d, dtype=torch.float64), **options)
    assert_z(chains.samples[-1].square().sum(1).numpy(), d)


@pytest.mark.checks("eq-image_prior-coordinates", how="exact")
def test_the_most_likely_image_depends_on_the_coordinates_of_the_code_and_samples_do_not():
    """A belief sigmoid(3 y - 2) on codes y from N(0, 1), and the same codes as y = sinh(u)."""
    with mp.workdps(30):
        belief = lambda y: -mp.log(1 + mp.exp(2 - 3 * y))  # noqa: E731
        in_y = lambda y: belief(y) + mp.log(mp.npdf(y))  # noqa: E731
        in_u = lambda u: in_y(mp.sinh(u)) + mp.log(mp.cosh(u))  # noqa: E731
        mass = [
            mp.quad(lambda v, f=f: mp.exp(f(v)), span) for f, span in ((in_y, [-20, 0, 1, 20]), (in_u, [-5, 0, 1, 5]))
        ]
        assert abs(mass[0] - mass[1]) < mp.mpf(10) ** -12
        part = mp.quad(lambda v: mp.exp(in_y(v)), [-20, 0, mp.sinh(1)]), mp.quad(lambda v: mp.exp(in_u(v)), [-5, 0, 1])
        assert abs(part[0] - part[1]) < mp.mpf(10) ** -12  # the probability of a set of images
        best = [mp.findroot(lambda v, f=f: mp.diff(f, v), mp.mpf("0.8")) for f in (in_y, in_u)]
        assert mp.sinh(best[1]) - best[0] > 0.1  # another image


def test_a_network_that_ends_in_a_sigmoid_comes_near_the_observation_cut_off():
    """The largest value is minus the squared distance to the cut-off observation, and that still holds most noise."""
    clean = study.photograph("flower", 128)
    noisy, _ = study.observe("denoising", clean, generator=stream(0, "data"))
    cut = noisy.clamp(0, 1)
    logits = torch.zeros_like(noisy).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        error = (logits.sigmoid() - noisy).square().sum()
        error.backward()
        optimizer.step()
    least = float((cut - noisy).square().sum())
    assert 0 < least < float(error.detach()) < 1.05 * least + 1e-3
    assert 0.8 < float((cut - clean).square().sum() / (noisy - clean).square().sum()) < 0.85
    assert psnr(cut, clean) - psnr(noisy, clean) == pytest.approx(0.8, abs=0.05)


def test_the_fixed_input_is_uniform_between_0_and_a_tenth():
    """The source says Gaussian noise, which is neither positive nor bounded."""
    recipe = study.recipe("superresolution", "flower", "medium")
    z = study.build(recipe, (1, 3, 32, 32), 0).z.double().flatten()
    assert 0 <= z.min() < 0.001 and 0.099 < z.max() <= 0.1
    assert_z(z, 0.05)
    assert_z(z.square(), 0.01 / 3)


def test_without_the_variance_the_likelihood_is_none():
    """The source's log q(x | theta), minus the squared error, is no density of x unless 2 sigma² = 1 / pi."""
    with mp.workdps(30):
        assert abs(mp.quad(lambda x: mp.exp(-((x - 1) ** 2)), [-12, 0, 1, 2, 14]) - 1) > 0.7
        sigma = mp.mpf("0.1")
        right = lambda x: mp.exp(-((x - 1) ** 2) / (2 * sigma**2) - mp.log(2 * mp.pi * sigma**2) / 2)  # noqa: E731
        assert abs(mp.quad(right, [0, 0.8, 1, 1.2, 2]) - 1) < mp.mpf(10) ** -15


def test_exercises():
    decay = np.array([0.5, 0.99])
    error = lambda t: 100 * 0.5 ** (2 * t) + np.square(1 - decay**t).sum()  # noqa: E731
    assert error(0) == 100 and error(10) == pytest.approx(1.007, abs=6e-4) and error(10**5) == pytest.approx(2)
    two = 10**-2.6 - 0.0012 / 4
    assert two == pytest.approx(0.00221, abs=5e-6) and -10 * math.log10(two) == pytest.approx(26.55, abs=0.01)
    s = optimize.brentq(lambda s: s - 1 / (1 + math.exp(s)), 0, 1)
    assert s == pytest.approx(0.401, abs=5e-4)
    assert s / 10_001 * math.hypot(1, 100) == pytest.approx(0.004, abs=5e-5)


def test_the_photographs_and_what_is_seen_of_them():
    clean = study.photograph("flower", 32)
    assert clean.shape == (1, 3, 32, 32) and 0 <= clean.min() < clean.max() <= 1
    with pytest.raises(ValueError, match="side must be at most 147 for the crop 'tuning'"):
        study.photograph("tuning", 256)
    noisy, _ = study.observe("denoising", study.photograph("flower", 128), generator=stream(0, "data"))
    assert psnr(noisy, study.photograph("flower", 128)) == pytest.approx(20.17, abs=0.05)
    half, mask = study.observe("inpainting", clean, generator=stream(1, "data"))
    assert torch.equal(mask(clean), half) and 0.4 < float((half == 0).all(1).float().mean()) < 0.6
    fewer, _ = study.observe("inpainting", clean, strength=0.8, generator=stream(1, "data"))
    assert 0.7 < float((fewer == 0).all(1).float().mean()) < 0.9
    few, blocks = study.observe("superresolution", clean, generator=stream(2, "data"))
    assert few.shape == (1, 3, 8, 8) and torch.equal(blocks(clean), few)
    assert float(few[0, 0, 0, 0]) == pytest.approx(float(clean[0, 0, :4, :4].mean()), abs=1e-6)
    # The crops of figures and of settings do not overlap.
    (_, top, left), (_, other, aside) = study.CROPS["flower"], study.CROPS["tuning"]
    side = study.recipe("denoising", "flower", "medium").side
    assert abs(top - other) >= side or abs(left - aside) >= side


@pytest.mark.parametrize("name", study.STUDIES)
def test_each_study_runs_short(name, monkeypatch):
    monkeypatch.setattr(study, "tuned", lambda crop, side, sigma: (0.8, 3, 6))
    chosen = study.STUDIES[name]
    recipe = dataclasses.replace(chosen.recipe("flower", "short"), every=10)
    outcome, settings = chosen.run(recipe, "flower", 0, torch.device("cpu")), recipe.settings()
    runs = 2 if "two" in name else 1
    assert outcome.training.rows == settings["epochs"] * runs and json.dumps(settings)
    model = study.build(recipe, (1, 3, 32, 32), 0)
    assert outcome.training.parameters == sum(p.numel() for p in model.parameters()), "those of one network"
    assert len(outcome.curves["PSNR of the average, dB"]) == settings["epochs"] // 10
    read = [value for key, value in outcome.metrics.items() if "PSNR of average" in key]
    if name == "image_prior_denoising":
        assert read[0] == outcome.curves["PSNR of the average, dB"][settings["read off at step"] // 10 - 1]
        assert outcome.metrics["highest PSNR in hindsight, dB"] == max(outcome.curves["PSNR of the average, dB"])
    if name == "image_prior_inpainting":  # what was seen is put back, which the curve has not
        assert outcome.metrics["PSNR of output, dB"] > outcome.curves["PSNR of the output, dB"][-1]
    if name == "image_prior_two_runs":
        assert outcome.metrics["PSNR of mean of the averages, dB"] > min(read)
        alone = dataclasses.replace(study.recipe("denoising", "flower", "short"), every=10)
        first = study.run(alone, "flower", 0, torch.device("cpu")).metrics["PSNR of average, dB"]
        assert read[0] == first != read[1], "the first of two runs is that of the study with one"


def box_muller(z, noise):
    """Normal numbers in the shape of ``noise``, as torch makes them of uniform ones."""
    first, second = z.flatten()[: noise.numel()].view(-1, 2, 8).double().unbind(1)
    radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * math.pi * second
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).view(noise.shape)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]).flatten(1))[0, 1])


def test_the_networks_input_does_not_show_the_noise(monkeypatch):
    """From one state torch's normal and uniform numbers are functions of the same draws; a study has several states."""
    clean, recipe = torch.zeros(1, 3, 32, 32), study.recipe("two_runs", "flower", "short")
    noise = study.observe("denoising", clean, generator=stream(0, "data"))[0] / study.SIGMA
    same = torch.rand(1, 4, 32, 32, generator=stream(0, "data"))
    assert correlation(box_muller(same, noise), noise) == pytest.approx(1, abs=1e-3)  # the trap
    inputs, build = [], study.build

    def watched(*arguments):
        inputs.append(build(*arguments).z / recipe.input_scale)
        return build(*arguments)

    monkeypatch.setattr(study, "tuned", lambda crop, side, sigma: (0.8, 3, 6))
    monkeypatch.setattr(study, "build", watched)
    study.run(recipe, "flower", 0, torch.device("cpu"))
    assert len(inputs) == 2
    for z in inputs:
        assert abs(correlation(box_muller(z, noise), noise)) < 4 / math.sqrt(noise.numel())
    assert abs(correlation(*inputs)) < 4 / math.sqrt(inputs[0].numel())


def test_no_two_uses_of_a_seed_share_a_state(monkeypatch):
    study.tuned.cache_clear()
    recipe = dataclasses.replace(study.recipe("two_runs", "flower", "short"), side=8, epochs=1, read_off=1)
    monkeypatch.setattr(study, "nonlocal_means", lambda noisy, *setting, sigma: noisy)
    begun = begun_states(monkeypatch, study)
    for seed in (0, 1):
        study.run(recipe, "flower", seed, torch.device("cpu"))
    study.tuned.cache_clear()
    # For a seed the observation, and for each of two networks its own seed, weights, order and noise; once the tuning.
    assert len(begun) == len(set(begun)) == 2 * 9 + 1 and seed_of(0, "data", 1) in begun


BASE = dataclasses.replace(
    study.recipe("denoising", "flower", "short"),
    side=16,
    epochs=6,
    inputs=2,
    widths=(4,),
    skips=(2,),
    read_off=4,
    every=2,
)
TRAINS = {
    "epochs": 8,
    "lr": 0.02,
    "schedule": "1 - t",
    "optimizer": "sgd",
    "betas": (0.5, 0.9),
    "clip": 0.01,
    "task": "inpainting",
    "strength": 0.2,
    "networks": 2,
    "side": 8,
    "inputs": 3,
    "input_scale": 0.2,
    "input_noise": 0.1,
    "widths": (5,),
    "skips": (3,),
}
MEASURES = {"average": 0.5, "read_off": 2, "every": 3}


@functools.cache
def numbers_of_run(recipe):
    losses, fit = [], train.fit

    def watched(*arguments, **options):
        training = fit(*arguments, **options)
        losses.append(training.history["total"].tolist())
        return training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "tuned", lambda crop, side, sigma: (0.8, 3, 2))
        patch.setattr(train, "fit", watched)
        outcome = study.run(recipe, "flower", 0, torch.device("cpu"))
    return outcome.metrics, outcome.curves, losses


# There is one image, so that it is the batch; and the version of scikit-image is that of what is installed.
@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(BASE) if f.name not in ("batch_size", "scikit_image")]
)
def test_what_a_recipe_says_is_what_is_run_and_recorded(field):
    changed = dataclasses.replace(BASE, **{field: (TRAINS | MEASURES)[field]})
    before, after = BASE.settings(), changed.settings()
    assert len([key for key in before if before[key] != after[key]]) == 1
    (measured, curves, losses), (other, its_curves, its_losses) = numbers_of_run(BASE), numbers_of_run(changed)
    assert (measured, curves) != (other, its_curves) and (losses != its_losses) == (field in TRAINS)


def test_a_record_is_not_begun_without_scikit_image(monkeypatch, tmp_path):
    """Else it would lack a row, after the training."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    assert study.recipe("denoising", "flower", "short").settings()["scikit-image"].count(".") >= 1
    monkeypatch.setattr(study.importlib.metadata, "version", missing)
    monkeypatch.setattr(train, "fit", lambda *args, **options: pytest.fail("it was trained"))
    for name in ("denoising", "two_runs", "inpainting"):
        chosen = study.STUDIES[f"image_prior_{name}"]
        with pytest.raises(ModuleNotFoundError, match="pip install scikit-image"):
            recording.record(f"image_prior_{name}", chosen, size="short", device="cpu", out=tmp_path)
    assert study.recipe("superresolution", "flower", "short").settings()["scikit-image"] is None
    clean = study.photograph("flower", 16)
    beside = study.beside("superresolution", clean[..., ::4, ::4], clean, name="flower", strength=4)
    assert set(beside) == {"bicubic", "blocks"}


def test_unknown_studies_are_named():
    with pytest.raises(ValueError, match=r"name must be one of denoising, .* got 'noise'"):
        study.recipe("noise", "flower", "short")
    with pytest.raises(ValueError, match=r"size must be one of short, .* got 'tiny'"):
        study.recipe("denoising", "flower", "tiny")


@pytest.mark.parametrize("name", ["flower", "china"])
@pytest.mark.parametrize("size", ["short", "medium", "full"])
def test_non_local_means_are_tuned_on_another_crop_than_the_measured_one(monkeypatch, name, size):
    side = study.recipe("denoising", name, size).side
    clean = study.photograph(name, side)
    seen, _ = study.observe("denoising", clean, generator=stream(1, "data"))
    looked_at, tried, used = [], [], []
    photograph = study.photograph
    monkeypatch.setattr(study, "photograph", lambda *args: (looked_at.append(args), photograph(*args))[1])

    def stub(noisy, *setting, sigma):
        assert sigma == study.SIGMA
        (used if noisy is seen else tried).append((noisy, setting))
        assert noisy is seen or not torch.equal(noisy, seen)
        if setting == (0.7, 5, 11):  # the best of the grid on whatever it is tuned on
            return photograph(*looked_at[-1]) if noisy is not seen else seen
        return noisy

    monkeypatch.setattr(study, "nonlocal_means", stub)
    study.tuned.cache_clear()
    try:
        study.beside("denoising", seen, clean, name=name, strength=study.SIGMA)
    finally:
        study.tuned.cache_clear()
    ((crop, at),) = looked_at
    assert crop != name and at == side and len(tried) == 42
    (file, top, left), (other, above, aside) = study.CROPS[name], study.CROPS[crop]
    assert file != other or abs(top - above) >= side or abs(left - aside) >= side, "no pixel in both"
    assert [setting for _, setting in used] == [(0.7, 5, 11)]


def test_non_local_means_denoises():
    clean = study.photograph("flower", 32)
    noisy, _ = study.observe("denoising", clean, generator=stream(0, "data"))
    assert psnr(study.nonlocal_means(noisy, 0.8, 3, 6), clean) > psnr(noisy, clean) + 4


def values(name, metric, stem="flower-medium"):
    """A metric of a record, seed by seed."""
    record = records.check(records.RESULTS / f"image_prior_{name}" / f"{stem}.json")
    return np.array(record["metrics"][metric]["by seed"])


def test_the_steps_are_those_of_the_record_on_the_other_crop():
    recipe = study.recipe("denoising", "flower", "medium")
    assert (recipe.read_off, recipe.epochs) == (values("denoising", "its step", "tuning-medium").item(), 3000)
    record = records.read(records.RESULTS / "image_prior_denoising" / "flower-medium.json")
    assert record["read off at step"] == recipe.read_off


def test_the_records_of_the_noisy_photograph_agree():
    average, gain, rival = (
        values("denoising", key)
        for key in ("PSNR of average, dB", "gain of the average, dB", "PSNR of non-local means, dB")
    )
    np.testing.assert_allclose(gain, average - values("denoising", "PSNR of noisy, dB"), atol=1e-9)
    # The first of two runs is the run above: the same network on the same noise.
    np.testing.assert_array_equal(values("two_runs", "PSNR of average of run 1, dB"), average[:3])
    np.testing.assert_array_equal(values("two_runs", "PSNR of non-local means, dB"), rival[:3])
