"""The family: one line for its models, the relatives' algorithms, densities to be compared, the map, the study."""

import dataclasses
import html
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from helpers import assert_z
from scipy.spatial.distance import pdist, squareform
from torch import nn

from gae_core import data, metrics, records
from gae_core.densities import GaussianMixture, fit_gaussian_mixture
from gae_core.gaussian import standard_normal_log_prob
from gae_core.models.likelihoods import NAMES
from gae_core.models.local_linear import factor_log_likelihood, nmf_step
from gae_core.seeds import seed_of, stream
from gae_core.studies import family, family_map, family_members, family_networks
from gae_core.studies.judge import classifier
from gae_core.studies.study import Trained

ROOT = Path(__file__).parents[1]
CHAPTER = (ROOT / "book" / "family.md").read_text(encoding="utf-8")


# ---- one line for most of them -----------------------------------------------------------------------------------


def finite(seed, codes=6):
    """Log q(z) q(x | z) at one x for each code, and another distribution r of codes."""
    rng = np.random.default_rng(seed)
    joint = np.log(rng.dirichlet(np.ones(codes))) + rng.normal(-5, 3, codes)
    return joint, rng.dirichlet(np.ones(codes))


def free_energy(joint, r):
    return (r * joint).sum() - (r * np.log(r)).sum()


@pytest.mark.checks("eq-family-free-energy", how="exact")
def test_the_gap_of_the_free_energy_is_a_divergence():
    mp.mp.dps = 40
    for seed in range(5):
        joint, r = ([mp.mpf(float(v)) for v in values] for values in finite(seed))
        total = mp.fsum(r)
        r = [v / total for v in r]
        evidence = mp.log(mp.fsum(mp.exp(v) for v in joint))
        posterior = [mp.exp(v) / mp.fsum(mp.exp(u) for u in joint) for v in joint]
        bound = mp.fsum(a * b for a, b in zip(r, joint, strict=True)) - mp.fsum(v * mp.log(v) for v in r)
        gap = mp.fsum(a * mp.log(a / b) for a, b in zip(r, posterior, strict=True))
        assert abs(bound + gap - evidence) < mp.mpf(10) ** -35
        assert gap > 0


@pytest.mark.checks("eq-family-chain", how="exact")
def test_the_point_is_below_the_cloud_and_that_below_all():
    for seed in range(20):
        joint, _ = finite(seed)
        best, evidence = joint.max(), np.logaddexp.reduce(joint)
        point = np.where(np.arange(6) == joint.argmax(), 1, 0)
        assert (point[point > 0] * (joint[point > 0] - np.log(point[point > 0]))).sum() == best  # 0 log 0 = 0
        # R: point masses, and everything on the three likeliest codes
        top = np.sort(joint)[-3:]
        restricted = np.logaddexp.reduce(top)  # the maximum of F on a subset of codes is the log-sum over it
        r = np.exp(top - restricted)
        assert free_energy(top, r) == pytest.approx(restricted, abs=1e-12)
        rng = np.random.default_rng(seed)
        assert all(free_energy(top, other) <= restricted for other in rng.dirichlet(np.ones(3), 50))
        assert best < restricted < evidence < best + math.log(6)


@pytest.mark.checks("eq-family-point-mass", how="symbolic")
def test_a_point_is_a_narrow_gaussian_without_its_entropy():
    s, z, t = sp.symbols("s z t", positive=True)
    u = sp.symbols("u", real=True)
    value = -(z**2) / 2 - sp.cos(z) - z**4 / 7  # any smooth l; its mean under N(t, s^2)
    density = sp.exp(-(u**2) / 2) / sp.sqrt(2 * sp.pi)
    mean = sp.integrate(sp.expand((-((t + s * u) ** 2) / 2 - (t + s * u) ** 4 / 7) * density), (u, -sp.oo, sp.oo))
    mean -= sp.cos(t) * sp.exp(-(s**2) / 2)  # the characteristic function of the Gaussian
    assert sp.simplify(sp.limit(mean, s, 0) - value.subs(z, t)) == 0
    entropy = sp.log(2 * sp.pi * sp.E * s**2) / 2
    assert sp.limit(mean + entropy, s, 0, "+") == -sp.oo  # with the entropy nothing is left


@pytest.mark.checks("eq-family-laplace", how="exact")
def test_the_best_gaussian_gives_the_likelihood_where_it_is_quadratic():
    generator = torch.Generator().manual_seed(0)
    W, mu, sigma = torch.randn(5, 3, generator=generator).double(), torch.zeros(5).double(), 0.7
    x = torch.randn(1, 5, generator=generator).double()
    H = W.T @ W / sigma**2 + torch.eye(3).double()
    z = torch.linalg.solve(H, W.T @ (x - mu)[0] / sigma**2)
    residual = ((x - mu)[0] - W @ z) / sigma
    value = float(standard_normal_log_prob(z[None]) + standard_normal_log_prob(residual[None])) - 5 * math.log(sigma)
    exact = float(factor_log_likelihood(x, mu, W, torch.full((5,), sigma**2, dtype=torch.float64)))

    def bound(S):
        entropy = 0.5 * torch.logdet(2 * math.pi * math.e * S)
        return float(value - 0.5 * (H @ S).trace() + entropy)

    best = torch.linalg.inv(H)
    assert bound(best) == pytest.approx(exact, abs=1e-12)
    assert value + 1.5 * math.log(2 * math.pi) - 0.5 * float(torch.logdet(H)) == pytest.approx(exact, abs=1e-12)
    for i in range(20):
        A = torch.randn(3, 3, generator=generator).double()
        assert bound(best + 0.01 * (i + 1) * A @ A.T) < exact


# ---- the relatives -----------------------------------------------------------------------------------------------


def non_negative(seed, entries=7, codes=4):
    rng = np.random.default_rng(seed)
    return rng.random((entries, codes)), rng.random(entries), rng.random(codes) + 0.01


def multiplied(W, x, z):
    return z * (W.T @ x) / (W.T @ W @ z)


@pytest.mark.checks("eq-family-nmf", how="exact")
def test_multiplying_never_increases_the_error_and_is_what_scikit_learn_does():
    from sklearn.decomposition import non_negative_factorization

    for seed in range(20):
        W, x, z = non_negative(seed)
        errors = []
        for _ in range(200):
            errors.append(((x - W @ z) ** 2).sum())
            z = multiplied(W, x, z)
        assert (np.diff(errors) <= 1e-14).all()
        assert errors[-1] < errors[0]
    # the conditions: a column of zeros has no update, and data below 0 lead to codes below 0, with an error that falls
    W, x, z = non_negative(0)
    with np.errstate(invalid="ignore"):
        assert np.isnan(multiplied(W * [1, 1, 1, 0], x, z)[3])
    z_next = multiplied(W, -x, z)
    assert (z_next < 0).any() and ((-x - W @ z_next) ** 2).sum() <= ((-x - W @ z) ** 2).sum()
    W, x, _ = non_negative(0)
    options = {"n_components": 4, "update_H": False, "solver": "mu", "max_iter": 1, "tol": 0, "init": "custom"}
    theirs, _, _ = non_negative_factorization(x[None], None, W.T.copy(), **options)
    start = np.full(4, math.sqrt(x.mean() / 4))  # where scikit-learn begins for a given W
    np.testing.assert_allclose(theirs[0], multiplied(W, x, start), rtol=1e-6)


@pytest.mark.checks("eq-family-nmf-majorise", how="exact")
def test_the_quadratic_lies_above_the_error_touches_it_and_is_least_at_the_update():
    for seed in range(20):
        W, x, z = non_negative(seed)
        A = W.T @ W
        gradient, K = A @ z - W.T @ x, np.diag(A @ z / z)

        def error(z, W=W, x=x):
            return 0.5 * ((x - W @ z) ** 2).sum()

        def above(other, z=z, gradient=gradient, K=K, error=error):
            return error(z) + (other - z) @ gradient + 0.5 * (other - z) @ K @ (other - z)

        rng = np.random.default_rng(seed)
        assert above(z) == pytest.approx(error(z), abs=1e-14)
        for other in rng.normal(0, 3, (50, 4)):
            assert above(other) >= error(other) - 1e-12
        update = multiplied(W, x, z)
        assert all(above(update) <= above(update + d) for d in rng.normal(0, 0.1, (20, 4)))
        assert np.linalg.eigvalsh(K - A).min() >= -1e-10
        with pytest.raises(AssertionError):  # half of K is not enough
            assert np.linalg.eigvalsh(K / 2 - A).min() >= -1e-10


def test_a_zero_stays_zero_and_the_coordinate_step_leaves_it():
    W, x, z = np.array([[1, 0.5], [0.5, 1]]), np.array([1.5, 1.5]), np.array([1.0, 0.0])
    for _ in range(100):
        z = multiplied(W, x, z)
    np.testing.assert_allclose(z, [1.8, 0])  # as in the exercise
    assert ((x - W @ z) ** 2).sum() == pytest.approx(0.45)
    code = torch.from_numpy(z)[None]
    for _ in range(200):
        code = nmf_step(torch.from_numpy(x)[None], code, torch.from_numpy(W).T)
    torch.testing.assert_close(code, torch.ones(1, 2, dtype=torch.float64))


def lle_weights(x, near, share=0.0):
    C = (x - near) @ (x - near).T
    C = C + share * np.trace(C) * np.eye(len(C))
    w = np.linalg.solve(C, np.ones(len(C)))
    return w / w.sum()


@pytest.mark.checks("eq-family-lle-weights", how="exact")
def test_the_weights_are_scikit_learns_and_the_constrained_minimum():
    from sklearn.manifold._locally_linear import barycenter_weights

    rng = np.random.default_rng(0)
    x, near = rng.normal(size=6), rng.normal(size=(4, 6))
    data, neighbours = np.vstack([x, near]), np.array([[1, 2, 3, 4]])
    for share in (0, 1e-3):  # scikit-learn adds a share of the trace
        theirs = barycenter_weights(data[:1], data, neighbours, reg=share)[0]
        np.testing.assert_allclose(lle_weights(x, near, share), theirs, rtol=1e-7)
    w = lle_weights(x, near)
    # an independent method: eliminate the constraint and solve ordinary least squares
    free = np.linalg.lstsq((near[:-1] - near[-1]).T, x - near[-1], rcond=None)[0]
    np.testing.assert_allclose(w, [*free, 1 - free.sum()], rtol=1e-8)


@pytest.mark.checks("eq-family-lle-invariance", how="exact")
@pytest.mark.parametrize("share", [0.0, 1e-3])
def test_the_weights_do_not_see_turns_scales_and_shifts(share):
    rng = np.random.default_rng(1)
    x, near = rng.normal(size=6), rng.normal(size=(4, 6))
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    moved = [-1.7 * v @ Q.T + np.arange(6) for v in (x, near)]
    w = lle_weights(x, near, share)
    np.testing.assert_allclose(lle_weights(*moved, share), w, atol=1e-11)
    shear = np.eye(6) + np.triu(np.ones((6, 6)), 1)
    assert np.abs(lle_weights(x @ shear, near @ shear, share) - w).max() > 0.01


@pytest.mark.checks("eq-family-tsne", how="exact")
def test_the_gradient_of_t_sne_is_autograds_and_scikit_learns():
    from sklearn.manifold._t_sne import _kl_divergence

    rng = np.random.default_rng(0)
    n = 8
    p = rng.random((n, n)) * (1 - np.eye(n))
    p = (p + p.T) / (p + p.T).sum()
    y = torch.from_numpy(rng.normal(size=(n, 2))).requires_grad_()
    off = ~torch.eye(n, dtype=torch.bool)
    w = 1 / (1 + (y[:, None] - y).square().sum(2))
    q = w / w[off].sum()
    P = torch.from_numpy(p)
    loss = (P[off] * (P[off] / q[off]).log()).sum()
    (slope,) = torch.autograd.grad(loss, y)
    with torch.no_grad():
        ours = 4 * (((P - q) * w * off)[..., None] * (y[:, None] - y)).sum(1)
    torch.testing.assert_close(ours, slope, rtol=1e-10, atol=1e-14)
    divergence, theirs = _kl_divergence(y.detach().numpy().ravel(), squareform(p, checks=False), 1, n, 2)
    assert divergence == pytest.approx(loss.item(), rel=1e-10)
    np.testing.assert_allclose(theirs.reshape(n, 2), ours.numpy(), rtol=1e-8, atol=1e-12)


# ---- how to compare ----------------------------------------------------------------------------------------------


@pytest.mark.checks("eq-family-units", how="exact")
def test_a_density_has_units():
    generator = torch.Generator().manual_seed(0)
    D, c = 6, 255.0
    A = torch.randn(D, D, generator=generator).double()
    covariance = A @ A.T + torch.eye(D).double()
    x = torch.randn(4, D, generator=generator).double()
    q = torch.distributions.MultivariateNormal(torch.ones(D).double(), covariance)
    scaled = torch.distributions.MultivariateNormal(c * torch.ones(D).double(), c**2 * covariance)
    torch.testing.assert_close(scaled.log_prob(c * x), q.log_prob(x) - D * math.log(c), rtol=1e-12, atol=0)
    assert f"{784 * math.log(255):,.0f} nats" in CHAPTER


def brute_trustworthiness(x, z, k):
    """By the definition, with loops."""
    n = len(x)
    near, far = squareform(pdist(z)), squareform(pdist(x))
    total = 0
    for i in range(n):
        ranks = {j: r for r, j in enumerate(sorted(set(range(n)) - {i}, key=lambda j: far[i, j]), start=1)}
        chosen = sorted(set(range(n)) - {i}, key=lambda j: near[i, j])[:k]
        total += sum(max(0, ranks[j] - k) for j in chosen)
    return 1 - 2 * total / (n * k * (2 * n - 3 * k - 1))


def test_trustworthiness_is_its_definition():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5))
    for z in (x[:, :2], rng.normal(size=(60, 3)), 7 * x):
        found = metrics.trustworthiness(*(torch.from_numpy(np.ascontiguousarray(v)) for v in (x, z)), 12)
        assert found == pytest.approx(brute_trustworthiness(x, z, 12), abs=1e-12)
    assert metrics.trustworthiness(torch.from_numpy(x), torch.from_numpy(7 * x)) == 1


@pytest.mark.parametrize(
    ("x", "z", "k", "match"),
    [
        (torch.rand(30, 2), torch.rand(29, 2), 12, "29 and 30 rows"),
        (torch.rand(20, 2), torch.rand(20, 2), 10, "k=10"),
        (torch.rand(30, 2), torch.full((30, 2), math.nan), 12, "finite"),
    ],
)
def test_trustworthiness_refuses(x, z, k, match):
    with pytest.raises(ValueError, match=match):
        metrics.trustworthiness(x, z, k)


@pytest.mark.checks("eq-family-chance", how="statistical")
def test_codes_that_know_nothing_have_half_the_trustworthiness():
    n, k = 50, 12
    expected = 1 - (n - k) * (n - k - 1) / ((n - 1) * (2 * n - 3 * k - 1))
    rng = np.random.default_rng(0)
    values = []
    for _ in range(200):
        x, z = (torch.from_numpy(rng.normal(size=(n, 3))) for _ in range(2))
        values.append(metrics.trustworthiness(x, z, k))
    assert_z(values, expected)
    assert expected == pytest.approx(0.545, abs=5e-4)  # as in the exercise
    assert np.mean(values) > 0.52  # not one half at this n


# ---- the study ---------------------------------------------------------------------------------------------------


def short(name="pca"):
    """Images of a short run, the test images flat, and the recipe of one member."""
    recipe = family.recipe(name, "digits", "short")
    images = family.images_of("digits", recipe.rows, recipe.test)
    return images, images.x_test.flatten(1), recipe


def linear_model(seed=0, entries=6):
    """A linear decoder, its parameters, data, and a variance of the noise for each entry."""
    generator = torch.Generator().manual_seed(seed)
    W, mu = torch.randn(entries, 2, generator=generator).double(), torch.randn(entries, generator=generator).double()
    x = torch.randn(5, entries, generator=generator).double()
    noise = 0.05 + torch.rand(entries, generator=generator).double()
    return (lambda z: mu + z @ W.T), mu, W, x, noise, generator


def two_components():
    means = torch.tensor([[3.0, 0], [-3, 1]], dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.3, 0.7]).double(), means, torch.eye(2).double().expand(2, 2, 2))


def test_the_importance_estimate_is_exact_for_a_linear_decoder_with_a_noise_for_each_entry():
    decode, mu, W, x, noise, generator = linear_model()
    for variance in (torch.full((6,), 0.3).double(), noise):
        exact = metrics.linear_density(x, mu, W, variance)
        torch.testing.assert_close(exact, factor_log_likelihood(x, mu, W, variance))
        options = {"sigma": variance.sqrt(), "generator": generator}
        for draws in (1, 2, 20):
            found = metrics.decoder_density(decode, x, torch.zeros(5, 2).double(), draws=draws, **options)
            torch.testing.assert_close(found.values, exact)
            assert draws == 1 or found.doubled.abs().max() < 1e-10
    # one number is that number for all
    one = metrics.decoder_density(decode, x, torch.zeros(5, 2).double(), sigma=0.7, draws=1)
    torch.testing.assert_close(one.values, factor_log_likelihood(x, mu, W, torch.full((6,), 0.49).double()))


def test_a_linear_decoder_has_the_density_of_its_whole_covariances():
    _, mu, W, x, noise, _ = linear_model(entries=30)
    prior = two_components()
    weights, components = metrics.linear_mixture(mu, W, noise, prior)
    covariance = W @ W.T + noise.diag()
    parts = [torch.distributions.MultivariateNormal(mu + W @ mean, covariance).log_prob(x) for mean in prior.means]
    expected = (torch.stack(parts, 1) + prior.weights.log()).logsumexp(1)
    density = metrics.gaussian_mixture_density(x, weights, components)
    torch.testing.assert_close(density, expected, rtol=1e-12, atol=1e-12)
    whole = [torch.distributions.MultivariateNormal(c.mean, covariance) for c in components]
    known = torch.arange(30) % 3 > 0
    short, long = (metrics.gaussian_mixture_fill(x, known, weights, form) for form in (components, whole))
    torch.testing.assert_close(short, long, rtol=1e-11, atol=1e-11)


def test_the_importance_estimate_is_never_above_on_average_and_says_what_doubling_changes():
    """With a mixture as prior the proposal is not the posterior: below on average, near with many draws."""
    decode, mu, W, x, noise, generator = linear_model()
    prior, start = two_components(), torch.zeros(1000, 2).double()
    options = {"sigma": (8 * noise).sqrt(), "prior": prior, "generator": generator}
    exact = metrics.linear_density(x[:1], mu, W, 8 * noise, prior)
    many = metrics.decoder_density(decode, x[:1], start[:1], draws=100_000, **options)
    torch.testing.assert_close(many.values, exact, atol=0.02, rtol=0)
    rows = x[:1].expand(1000, -1)
    by_draws = {draws: metrics.decoder_density(decode, rows, start, draws=draws, **options) for draws in (1, 2, 4)}
    means = {draws: found.values.mean() for draws, found in by_draws.items()}
    assert means[1] + 4 * by_draws[1].values.std() / 1000**0.5 < exact[0]
    assert means[1] < means[2] < means[4] < exact[0]
    for draws in (2, 4):  # the halves of these draws against as many fresh ones
        assert_z((by_draws[draws].doubled - (by_draws[draws].values - by_draws[draws // 2].values)).numpy(), 0.0)
        assert by_draws[draws].doubled.mean() > 0


def test_a_large_batch_has_the_density_of_its_images():
    """Images are taken some at a time: none is lost, none sees another's code, label or noise."""
    decode, mu, W, _, noise, generator = linear_model()
    rows = torch.randn(450, 6, generator=generator).double()
    given = torch.randn(450, 6, generator=generator).double()
    found = metrics.decoder_density(
        lambda z, shift: decode(z) + shift, rows, torch.zeros(450, 2).double(), sigma=noise.sqrt(), rows=(given,)
    )
    torch.testing.assert_close(found.values, factor_log_likelihood(rows - given, mu, W, noise))


def test_missing_entries_are_their_conditional_means():
    decode, mu, W, x, noise, generator = linear_model()
    seen = torch.tensor([True, False, True, True, False, False])
    C = W @ W.T + noise.diag()
    gain = torch.linalg.solve(C[seen][:, seen], C[seen])
    exact = mu + (x - mu)[:, seen] @ gain  # of Gaussians, by the textbook
    one = metrics.linear_mixture(mu, W, noise)
    hidden = torch.where(seen, x, torch.full_like(x, math.nan))  # what is hidden is not looked at
    torch.testing.assert_close(metrics.gaussian_mixture_fill(hidden, seen, *one)[:, ~seen], exact[:, ~seen])
    # for a linear decoder the likeliest code is the mean, from wherever one starts, and with a shift by a row
    starts, shift = (
        3 * torch.randn(5, 4, 2, generator=generator).double(),
        torch.randn(5, 6, generator=generator).double(),
    )
    found = metrics.decoder_fill(
        lambda z, rows: decode(z) + rows, hidden + shift, seen, starts, sigma=noise.sqrt(), rows=(shift,)
    )
    torch.testing.assert_close((found - shift)[:, ~seen], exact[:, ~seen])
    # a mixture: the mean over what Bayes' rule says of the components, by sampling it
    prior = two_components()
    z = prior.sample(400_000, generator=generator)
    weights = (-0.5 * ((x[0, seen] - decode(z)[:, seen]).square() / noise[seen]).sum(1)).softmax(0)
    assert 1 / weights.square().sum() > 1000
    found = metrics.gaussian_mixture_fill(hidden[:1], seen, *metrics.linear_mixture(mu, W, noise, prior))[0]
    torch.testing.assert_close(found[~seen], (weights @ decode(z))[~seen], atol=0.1, rtol=0)


def test_of_several_searches_the_best_is_taken():
    """g(z) = (z², z): of the square alone, with a prior that leans to one side, the other root is a local maximum."""
    x, seen = torch.tensor([[4.0, math.nan]]).double(), torch.tensor([True, False])
    lean = GaussianMixture(torch.ones(1).double(), torch.tensor([[1.0]]).double(), torch.ones(1, 1, 1).double())
    starts = torch.tensor([[[-2.5], [-1.5], [2.5], [-2.0]]]).double()
    options = {"sigma": torch.full((2,), 0.1).double(), "prior": lean, "steps": 30}

    def fill(starts):
        return metrics.decoder_fill(lambda z: torch.cat([z * z, z], 1), x, seen, starts, **options)[0, 1]

    assert fill(starts) == pytest.approx(2, abs=0.01)
    assert fill(starts[:, :2]) == pytest.approx(-2, abs=0.01)


def test_densities_of_decoders_refuse():
    decode, _, _, x, noise, _ = linear_model()
    z, sigma = torch.zeros(5, 2).double(), noise.sqrt()
    for arguments, match in (
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive and finite"),
        ({"sigma": sigma - sigma[0]}, "sigma must be positive and finite"),
        ({"z": z[:4]}, "z must have a row for each row of x, got 4 and 5"),
    ):
        with pytest.raises(ValueError, match=match):
            metrics.decoder_density(decode, x, **{"z": z, "sigma": sigma, **arguments})


def test_odd_images_are_odd_as_a_whole():
    images, _, _ = short()
    x, y = images.x_test, images.y_test
    odd = family.odd_images(x, y, torch.Generator().manual_seed(0))
    assert torch.equal(odd["turned"], x.transpose(2, 3).flip(2))
    left, right = odd["halves"][..., :4], odd["halves"][..., 4:]
    assert torch.equal(left, x[..., :4])
    origin = (right[:, None] == x[None, ..., 4:]).flatten(2).all(2)  # of which images it is the right half
    assert all((origin[i] & (y != y[i])).any() for i in range(len(x)))
    assert len(torch.unique(right.flatten(1), dim=0)) > len(x) / 4  # not a few for all


@pytest.mark.parametrize("name", ["pca", "ppca", "k_means", "mixture", "local_pca"])
def test_exact_densities_integrate_to_one(name):
    """In the plane of two pixels, on a grid."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 12, generator=generator)
    x[:, 1] = 0.3 * x[:, 0] + 0.1
    member, _ = family.fit(family.recipe(name, "digits", "short"), x, torch.arange(300) % 10, 0)
    # importance weights of a wide Gaussian have the mean 1
    proposal = torch.distributions.MultivariateNormal(
        x.mean(0).double(), 1.5 * torch.cov(x.T.double()) + 0.03 * torch.eye(12)
    )
    torch.manual_seed(0)
    draws = proposal.sample((20_000,))
    for density in filter(None, (member.log_density, member.plain_density)):
        weights = (density(draws, draws, None, 1, None).values - proposal.log_prob(draws)).exp()
        assert_z(weights.numpy(), 1.0)


@pytest.mark.parametrize("name", family.MEMBERS)
def test_a_member_measures_what_it_can_and_nothing_else(name):
    images, _, recipe = short(name)
    member, training = family.fit(recipe, images.x_train.flatten(1), images.y_train, 0)
    values, pictures = family.measure(member, images, recipe, 0)
    assert ("squared error a pixel" in values) == (member.reconstruct is not None)
    assert ("trustworthiness" in values) == (member.codes is not None)
    assert all(math.isfinite(v) for v in values.values())
    assert all(v.shape[1:] == (1, 8, 8) for v in pictures.values())
    assert (name in ("lle", "t_sne")) == (not any(key.startswith("Fréchet") for key in values))
    # what is not fitted saw no rows, and has no time of a fit
    assert (training.rows == 0) == (name in ("training_images", "t_sne"))
    assert training.rows % 400 == 0 and (training.parameters == 0) == (name in ("training_images", "lle", "t_sne"))


def test_members_are_the_methods_that_they_are_named_after():
    from sklearn.decomposition import PCA

    images, test, recipe = short("pca")
    x = images.x_train.flatten(1)
    known = PCA(10, svd_solver="full").fit(x.numpy())
    member, training = family.fit(recipe, x, images.y_train, 0)
    assert training.parameters == 11 * 64
    back = known.inverse_transform(known.transform(test.numpy()))
    torch.testing.assert_close(member.reconstruct(test, None), torch.from_numpy(back), rtol=0, atol=1e-5)
    left = (x - torch.from_numpy(known.inverse_transform(known.transform(x.numpy())))).square().mean(0)
    prior = fit_gaussian_mixture(member.codes(x, None).double(), 10, seed=seed_of(0, "density", family_members.PRIOR))
    W, mu = (torch.from_numpy(v).double() for v in (known.components_.T.copy(), known.mean_))
    W = W * (W * (member.decode(torch.eye(10)).double() - mu).T).sum(0).sign()  # the signs of the axes are free
    for density, variance in ((member.log_density, left), (member.plain_density, left.mean())):
        expected = metrics.linear_density(test.double(), mu, W, variance + 0.1**2, prior)
        torch.testing.assert_close(density(test, test, None, 1, None).values, expected, rtol=0, atol=2e-3)

    ppca, _ = family.fit(family.recipe("ppca", "digits", "short"), x, images.y_train, 0)
    noisy = PCA(10, svd_solver="full").fit(x.double().numpy())
    covariance = torch.from_numpy(noisy.get_covariance()) * (len(x) - 1) / len(x) + 0.1**2 * torch.eye(64)
    normal = torch.distributions.MultivariateNormal(x.double().mean(0), covariance)
    density = ppca.log_density(test, test, None, 1, None).values
    assert ppca.plain_density is None  # one noise for all is what it is
    torch.testing.assert_close(density, normal.log_prob(test.double()), rtol=0, atol=1e-4)
    axes, values, noise = noisy.components_, noisy.explained_variance_, noisy.noise_variance_
    centred = test.double().numpy() - noisy.mean_
    shrunk = noisy.mean_ + centred @ axes.T @ np.diag(1 - noise / values) @ axes
    torch.testing.assert_close(ppca.reconstruct(test, None).double(), torch.from_numpy(shrunk), rtol=0, atol=1e-5)


def as_sets(*parts):
    return [{tuple(row.tolist()) for row in data.to_unit(x).flatten(1)} for x in parts]


@pytest.mark.parametrize("size", ["short", "medium"])
def test_test_images_are_not_among_the_training_images(size):
    limits = family.recipe("pca", "digits", size)
    whole, images = data.load("digits"), family.images_of("digits", limits.rows, limits.test)
    train, test, all_train, all_test = as_sets(images.x_train, images.x_test, whole.x_train, whole.x_test)
    assert not all_train & all_test  # so that sets tell
    assert train <= all_train and test <= all_test
    assert len(train) == min(limits.rows, len(whole.x_train)) and len(test) == min(limits.test, len(whole.x_test))
    again = {tuple(x.tolist()): int(y) for x, y in zip(whole.x_train.flatten(1), whole.y_train, strict=True)}
    assert all(again[tuple(x.tolist())] == y for x, y in zip(images.x_train.flatten(1), images.y_train, strict=True))


@pytest.fixture
def linear_nets(monkeypatch):
    """Encoders and decoders that are linear, so that all densities have a closed form."""

    def pair(shape, dim, *, heads=1, **_):
        return nn.Linear(shape[0], heads * dim), nn.Linear(dim, shape[0])

    monkeypatch.setattr(family_networks.nets, "mlp_pair", pair)
    monkeypatch.setattr(family_networks.nets, "mlp", lambda sizes, **_: nn.Linear(sizes[0], sizes[-1]))
    monkeypatch.setattr(family_networks.nn, "Sigmoid", nn.Identity)  # behind the decoder of the CVAE


@pytest.mark.parametrize("name", ["autoencoder", "gae", "eae", "vae", "vae_fixed", "bn_vae", "cvae", "gan"])
def test_fitted_and_measured_a_linear_decoder_has_its_exact_density(name, linear_nets):
    """The whole way, with what is added on it: the noise of the test, for each pixel; log 10 for a label."""
    images, _, recipe = short(name)
    passes = 10 if name == "gan" else 5
    recipe = dataclasses.replace(recipe, epochs=passes, density=40, draws=4000, probe=40)
    x, y = images.x_train.flatten(1), images.y_train
    member, _ = family.fit(recipe, x, y, 0)
    asked = dataclasses.replace(member, fill=None, plain_density=None, conditional=True)
    values, _ = family.measure(asked, images, recipe, 0)

    # the decoder from what it does, by least squares
    conditional = name == "cvae"
    z = torch.cat(
        [member.codes(x, y), nn.functional.one_hot(y, 10) if conditional else torch.ones(len(x), 1)], 1
    ).double()
    back = member.reconstruct(x, y).double()
    table = torch.linalg.lstsq(z, back).solution
    torch.testing.assert_close(z @ table, back, rtol=0, atol=1e-4)
    W = table[:10].T
    variance = (x - back).square().mean(0) + 0.1**2  # of the pixels, and of the test
    fitted = seed_of(0, "density", family_members.PRIOR)
    prior = fit_gaussian_mixture(z[:, :10], 10, seed=fitted) if name == "autoencoder" else None
    clean, labels = images.x_test[:40].flatten(1), images.y_test[:40]
    noise = torch.randn(images.x_test.flatten(1).shape, generator=stream(0, "data", family_members.TEST_NOISE))
    noise = noise[:40]
    noisy = (clean + 0.1 * noise).double()
    centres = table[10 + labels] if conditional else table[10].expand(40, -1)
    zero = torch.zeros(64).double()
    exact = metrics.linear_density(noisy - centres, zero, W, variance, prior) - (math.log(10) if conditional else 0)
    # for N(0, I) the proposal is the posterior; for a mixture it is not
    tolerance = 0.3 if name == "autoencoder" else 5e-3
    assert values["log-density, nats"] == pytest.approx(float(exact.mean()), abs=tolerance)
    error = float(exact.std()) / 40**0.5
    assert values["log-density, standard error over images"] == pytest.approx(error, rel=0.05)
    assert abs(values["log-density, rise at the last doubling of draws"]) < tolerance


def test_a_label_costs_its_logarithm_and_bounds_what_all_labels_give():
    decode, mu, W, x, noise, _ = linear_model()
    shifts = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.tensor([0, 2, 1, 1, 0])
    member = family_members.with_searched_density(
        family_members.Member(codes=lambda x, y: torch.zeros(len(x), 2).double()),
        lambda z, hot: decode(z) + hot.double() @ shifts,
        noise,
        mu,
        family.recipe("cvae", "digits", "short"),
        0,
        classes=3,
    )
    by_label = torch.stack([factor_log_likelihood(x - shift, mu, W, noise) for shift in shifts]) - math.log(3)
    density = member.log_density(x, x, labels, 2, torch.Generator().manual_seed(0)).values
    torch.testing.assert_close(density, by_label.gather(0, labels[None])[0])
    assert (density < by_label.logsumexp(0)).all()


def test_samples_of_local_pca_have_the_moments_of_its_reconstructions():
    """In each component the codes' covariance is diagonal: the principal axes'."""
    recipe = family.recipe("local_pca", "digits", "medium")
    images = family.images_of("digits", recipe.rows, recipe.test)
    x = images.x_train.flatten(1)
    member, _ = family.fit(recipe, x, images.y_train, 0)
    back = member.reconstruct(x, None).double()
    drawn = member.fitted(50_000, torch.Generator().manual_seed(0)).double()
    spread, sampled = (torch.cov(v.T) for v in (back, drawn))
    assert float(sampled.trace() / spread.trace()) == pytest.approx(1, abs=0.02)
    assert float(torch.linalg.matrix_norm(sampled - spread) / torch.linalg.matrix_norm(spread)) < 0.03
    torch.testing.assert_close(drawn.mean(0), back.mean(0), rtol=0, atol=0.01)


# ---- measures of members that are known --------------------------------------------------------------------------


def test_measures_of_what_is_known():
    images, x, recipe = short()
    x = 0.999 * x + 0.001 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))  # no neighbours are tied
    images = dataclasses.replace(images, x_test=x.view_as(images.x_test))
    calls = []

    def log_density(noisy, clean, labels, draws, generator):
        assert torch.equal(labels, images.y_test[: len(labels)])
        calls.append((len(noisy), draws))
        return metrics.Density((noisy - clean).square().sum(1), doubled=torch.arange(len(noisy)).double())

    member = family_members.Member(
        codes=lambda x, y: 3 * x,
        reconstruct=lambda x, y: x + 0.2,
        sample=lambda n, g: images.x_train.flatten(1)[:n],
        log_density=log_density,
        plain_density=lambda *args: metrics.Density(log_density(*args).values - 7),
        fill=lambda hidden, known, labels: torch.where(known, math.inf, 0.25).expand_as(hidden),
    )
    values, _ = family.measure(member, images, recipe, 0)
    assert values["squared error a pixel"] == pytest.approx(0.04)
    judge = classifier(data.load("digits")).features
    features = [metrics.in_batches(judge, v) for v in (images.x_train[: len(x)], images.x_test)]
    assert values["Fréchet, own"] == pytest.approx(metrics.frechet_distance(*features))
    assert values["trustworthiness"] == 1
    noise = values["log-density, nats"] / 64 / 0.1**2  # chi-squared of 640 degrees of freedom
    assert abs(noise - 1) < 4 * math.sqrt(2 / 640)
    assert values["log-density, rise at the last doubling of draws"] == 4.5
    assert values["log-density, gain of a noise a pixel"] == pytest.approx(7, abs=1e-4)
    assert calls[:2] == [(10, 10), (10, 10)] and {draws for _, draws in calls[2:]} == {2}
    right = images.x_test[:40, :, :, 4:]
    assert values["squared error of a missing pixel"] == pytest.approx(float((right - 0.25).square().mean()))
    # an error that is the same for all images tells nothing; nor does noise
    assert values["AUROC of the error, halves"] == pytest.approx(0.5, abs=0.1)  # rounding decides
    # odd image i has the noise of image i
    assert values["AUROC of the density, turned"] == pytest.approx(0.5, abs=0.01)


def test_scores_of_what_is_odd_point_the_right_way():
    """Trained on the images that are to be told from odd ones, a nearest neighbour knows them all."""
    images, x, recipe = short()
    known = family_members.Member(
        reconstruct=lambda flat, y: x[torch.cdist(flat, x).argmin(1)],
        log_density=lambda noisy, clean, labels, draws, generator: metrics.Density(-torch.cdist(noisy, x).amin(1)),
    )
    values, _ = family.measure(known, images, recipe, 0)
    for kind in ("halves", "turned"):
        assert values[f"AUROC of the error, {kind}"] > 0.95 and values[f"AUROC of the density, {kind}"] > 0.95


def test_leaks_are_noticed():
    """What has seen training images alone is asked about test images; what is hidden stays hidden."""
    images, x, recipe = short()
    train = {tuple(row.tolist()) for row in images.x_train.flatten(1)}
    cheat = family_members.Member(
        reconstruct=lambda x, y: torch.stack([row if tuple(row.tolist()) in train else 0 * row for row in x]),
        fill=lambda hidden, known, labels: hidden,  # it "fills in" what it was not to see
    )
    values, pictures = family.measure(cheat, images, recipe, 0)
    assert values["squared error a pixel"] == pytest.approx(float(x.square().mean()))
    assert math.isnan(values["squared error of a missing pixel"])
    assert torch.equal(pictures["test images"].flatten(1), x[:32])


def test_densities_are_fitted_to_codes_of_training_images():
    """Train on digits below 5, test on the others: samples are of the former, and far from the latter."""
    whole, recipe = data.load("digits"), family.recipe("pca", "digits", "short")
    small, large = whole.y_train < 5, whole.y_train >= 5
    parts = (whole.x_train[small], whole.y_train[small], whole.x_train[large], whole.y_train[large])
    images = data.Images("digits", *parts)
    x = whole.x_train.flatten(1)
    mean, axes = x.mean(0), torch.pca_lowrank(x, 10)[2]
    project = lambda x, y: (x - mean) @ axes  # noqa: E731
    member = family_members.Member(codes=project, decode=lambda z: mean + z @ axes.T)
    values, _ = family.measure(member, images, recipe, 0)
    judge = classifier(whole).features

    def distance(a, b):
        return metrics.frechet_distance(*(metrics.in_batches(judge, v) for v in (a, b)))

    back = [(mean + project(v.flatten(1), None) @ axes.T).clamp(0, 1).view_as(v) for v in (parts[0], parts[2])]
    assert 0.5 * distance(back[0], parts[2]) < values["Fréchet, fitted"] < 1.5 * distance(back[0], parts[2])
    assert values["Fréchet, fitted"] > 5 * distance(back[1], parts[2])  # which is what a leak would give


# ---- recipes -----------------------------------------------------------------------------------------------------


def test_a_recipe_has_its_members_settings_and_no_others():
    recipes = {name: family.recipe(name, "mnist", "medium") for name in family.MEMBERS}
    for name, recipe in recipes.items():
        trained = isinstance(recipe, Trained)
        assert recipe.member == name and (recipe.rows, recipe.test, recipe.noise) == (10_000, 2_000, 0.1)
        assert recipe.epochs == (0 if not trained else 40 if name in ("gan", "meg") else 20)
        assert ("lr" in recipe.settings()) == trained
        assert recipe.dim == (2 if name == "t_sne" else 10)
    assert recipes["bn_vae"].settings()["gamma"] == 0.7 and recipes["vae"].gamma is None
    assert (recipes["eae"].lam, recipes["batch_norm"].lam, recipes["meg"].surrogate) == (1, 0, "jsd")
    assert not {"gamma", "lam", "sigma", "lr"} & recipes["pca"].settings().keys()
    assert family.recipe("vae", "digits", "medium").epochs == 7 * 20
    for arguments in (("pcb", "mnist", "medium"), ("pca", "mnist", "large")):
        with pytest.raises(ValueError, match="must be one of"):
            family.recipe(*arguments)


TRAINED = [name for name in family.MEMBERS if isinstance(family.recipe(name, "digits", "short"), Trained)]


@pytest.mark.parametrize("name", TRAINED)
def test_models_are_made_with_what_the_recipe_says(name):
    recipe = family.recipe(name, "digits", "medium")
    model = family_networks.build(recipe, 64, 0)
    own = {field.name for field in dataclasses.fields(recipe)}
    own -= {field.name for field in dataclasses.fields(family_networks.Network)}
    for key in own - {"chain", "search_sigma"}:  # of samples and codes, not of the model
        value = getattr(recipe, key)
        if key == "gamma":
            assert getattr(model.norm, "gamma", None) == value
        elif key == "corruption":
            noise = model.corruption(torch.zeros(10_000, 1), generator=torch.Generator().manual_seed(0))
            assert float(noise.std()) == pytest.approx(value, rel=0.05)
        elif key == "samples":
            assert getattr(model, "samples", None) == value
        elif key == "likelihood":
            assert type(model.likelihood) is NAMES[value]
        elif key == "sigma_start":
            assert isinstance(getattr(model.likelihood, "log_sigma", None), nn.Parameter) == (value is not None)
            assert value is None or model.likelihood.log_sigma.exp().item() == pytest.approx(value)
        elif key == "sigma" and isinstance(recipe, family_networks.Variational | family_networks.Denoising):
            assert value is None or model.likelihood.log_sigma.exp().item() == pytest.approx(value)
        else:
            assert getattr(model, key) == value, key
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert {256, 128} <= set(widths)
    torch.manual_seed(7)  # weights come from the seed alone
    again, other = (family_networks.build(recipe, 64, seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(v, again[key]) for key, v in model.state_dict().items())
    assert any(not torch.equal(v, other[key]) for key, v in model.state_dict().items())


def test_a_size_of_the_noise_that_nobody_learns_is_refused():
    recipe = family.recipe("vae_fixed", "digits", "short")
    with pytest.raises(ValueError, match="sigma_start must be None where sigma is not learned"):
        family_networks.build(dataclasses.replace(recipe, sigma_start=0.3), 64, 0)
    with pytest.raises(ValueError, match="sigma must be left out"):
        family_networks.build(dataclasses.replace(recipe, likelihood="bernoulli"), 64, 0)


FEW = {"rows": 200, "test": 40, "density": 6, "draws": 8, "probe": 16, "coded": 150}
MEASURED = {  # fields that all have, and another value
    **{"rows": 180, "test": 38, "density": 5, "draws": 6, "probe": 8, "dim": 9, "noise": 0.2, "coded": 140},
    **{"components": 3, "starts": 2, "search_steps": 1, "neighbours": 5},
}
FITTED = {  # fields of one member, or that show best in it
    "autoencoder": {"epochs": 1, "batch_size": 50, "lr": 1e-3, "schedule": "constant", "optimizer": "sgd"}
    | {"betas": (0.5, 0.9), "clip": 0.01, "hidden": (32,)},
    "gae": {"steps": 3, "step_size": 0.05, "sigma": 0.5, "second_order": True},
    "eae": {"lam": 0.5, "k": 3},
    "denoising": {"corruption": 0.1, "sigma": 0.3, "walkback": 1, "chain": 2},
    "vae": {"sigma_start": 0.6},
    "vae_fixed": {"sigma": 0.7},
    "vae_bernoulli": {"likelihood": "gaussian"},
    "iwae": {"samples": 2},
    "bn_vae": {"gamma": 0.5},
    "cvae": {"classes": 11, "sigma_start": 0.6},
    "gan": {"lam": 0.1, "surrogate": "jsd", "search_sigma": 0.5, "candidates": 50},
    "factor_analysis": {"max_iter": 2, "tol": 1000.0},
    "mixture": {"max_iter": 1, "tol": 1e-9},
    "k_means": {"restarts": 9},
    "local_pca": {"max_steps": 1},
    "nmf": {"steps": 2, "code_steps": 2},
    "lle": {"n_neighbors": 12},
    "t_sne": {"dim": 3},
}


def numbers(recipe):
    """What is measured, but for times."""
    images = family.images_of("digits", recipe.rows, recipe.test)
    member, _ = family.fit(recipe, images.x_train.flatten(1), images.y_train, 0)
    values, _ = family.measure(member, images, recipe, 0)
    return {name: value for name, value in values.items() if "seconds" not in name}


def made(recipe):
    """What a fitted member makes of a few images."""
    images = family.images_of("digits", recipe.rows, recipe.test)
    member, _ = family.fit(recipe, images.x_train.flatten(1), images.y_train, 0)
    rows = images.x_test.flatten(1), images.y_test
    own = [member.sample(5, torch.Generator().manual_seed(0))] if member.sample else []
    return [does(*rows) for does in (member.codes, member.reconstruct) if does] + own


@pytest.mark.parametrize("name", ["training_images", "lle", "eae"])
def test_a_run_is_a_fit_and_its_measures(name):
    recipe = dataclasses.replace(family.recipe(name, "digits", "short"), **FEW)
    study = family.STUDIES[f"family_{name}"]
    torch.manual_seed(7)  # which is not to matter
    outcome = study.run(recipe, "digits", 0, torch.device("cpu"))
    plt.close(outcome.figure)
    assert numbers(recipe).items() <= outcome.metrics.items()
    time = None if name == "training_images" else outcome.training.processor_seconds
    assert outcome.metrics.get("seconds, fit") == time
    assert outcome.training.rows == {"training_images": 0, "lle": 200, "eae": 7 * 200}[name]
    assert outcome.training.seconds > 0  # rows are divided by it
    assert outcome.classifier["data"] == "digits"
    assert (study.topic, study.data) == ("family", ("mnist", "digits"))
    assert study.recipe("digits", "short") == family.recipe(name, "digits", "short")


def test_each_field_that_all_have_changes_the_record_and_the_run():
    recipe = dataclasses.replace(family.recipe("autoencoder", "digits", "short"), **FEW)
    before = numbers(recipe)
    assert numbers(recipe) == before
    for field, value in MEASURED.items():
        other = dataclasses.replace(recipe, **{field: value})
        assert other.settings() != recipe.settings() and numbers(other) != before, field


@pytest.mark.filterwarnings("ignore:FactorAnalysis did not converge")
@pytest.mark.parametrize("name", FITTED)
def test_each_field_of_a_member_changes_the_record_and_the_run(name):
    recipe = family.recipe(name, "digits", "short")
    before = made(recipe)
    for field, value in FITTED[name].items():
        other = dataclasses.replace(recipe, **{field: value})
        assert other.settings() != recipe.settings()
        after = made(other)
        same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not same, field


def test_no_field_is_left_out_of_the_two_tests_above():
    for name in family.MEMBERS:
        recipe = family.recipe(name, "digits", "short")
        alike = [other for other in FITTED if type(family.recipe(other, "digits", "short")) is type(recipe)]
        tried = MEASURED.keys() | {"member", "candidates", *FITTED["autoencoder"]}
        tried |= {field for other in alike for field in FITTED[other]}
        assert {field.name for field in dataclasses.fields(recipe)} <= tried, name


def test_the_map_of_the_chapter_is_the_map_of_the_code():
    for place in family_map.MAP:
        assert place.found in family_map.FOUND
        assert place.known in family_map.KNOWN
        assert place.goal in family_map.GOALS
        assert (place.known == "no decoder") == (place.goal == "neighbours")
        begins = {  # the colour says what the table says
            "minus the squared error": "fit at one code",
            "$\\log q(z)\\,q(x \\mid z)$ at the code": "fit at one code",
            "the likelihood": "likelihood",
            "a lower bound of the likelihood": "a bound of it",
            "what a critic says": "a critic",
            "minus a learned energy": "a critic",
            "minus the error of the neighbours' weights": "neighbours",
            "minus a divergence of neighbourhoods": "neighbours",
        }
        assert [place.goal] == [goal for words, goal in begins.items() if place.maximised.startswith(words)]
        assert (ROOT / "book" / f"{place.chapter}.md").exists()


def test_the_chapter_prints_the_map_of_the_code(tmp_path):
    pytest.importorskip("myst_parser", reason="where GPU runs are made the book need not be built")
    assert "\n```{family-map}\n```\n" in CHAPTER and "| it is found by |" not in CHAPTER
    (tmp_path / "index.md").write_text("# Map\n\n```{family-map}\n```\n", encoding="utf-8")
    for chapter in {place.chapter for place in family_map.MAP} - {"family"}:
        (tmp_path / f"{chapter}.md").write_text(f"---\norphan: true\n---\n# {chapter}\n", encoding="utf-8")
    (tmp_path / "conf.py").write_text(
        'extensions = ["myst_parser", "family_map"]\nmyst_enable_extensions = ["dollarmath"]\n'
    )
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ".", "out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    rows = re.findall("<tr.*?</tr>", page, re.DOTALL)[1:]
    assert len(rows) == len(family_map.MAP)
    for row, place in zip(rows, family_map.MAP, strict=True):
        cells = [re.sub("<.*?>", "", cell).strip() for cell in re.findall("<td>(.*?)</td>", row, re.DOTALL)]
        assert html.unescape(cells[0]) == place.model
        assert (f'href="{place.chapter}.html"' in row) == (place.chapter != "family")
        written = [place.latent, place.inference, place.assumed, place.maximised, place.sampled]
        for cell, words in zip(cells[1:], written, strict=True):
            assert html.unescape(cell).replace("’", "'") == re.sub(r"\$(.*?)\$", r"\\(\1\\)", words)


def test_a_dash_of_the_recorded_tables_is_what_the_chapter_says_that_a_member_cannot_do():
    has = {}
    for path in records.RESULTS.glob("family_*/mnist-medium.json"):
        has[path.parent.name.removeprefix("family_")] = set(records.check(path)["metrics"])
    no = {
        "Fréchet, own": {"pca", "nmf", "k_means", "local_pca", "autoencoder", "lle", "t_sne"},
        "Fréchet, fitted": {"mixture", "gan", "meg", "cvae", "lle", "t_sne", "training_images"},
        "trustworthiness": {"k_means", "local_pca", "training_images"},
        "squared error a pixel": {"lle", "t_sne", "training_images"},
        "seconds, fit": {"t_sne", "training_images"},
    }
    assert {key: {name for name, metrics in has.items() if key not in metrics} for key in no} == no


def test_the_settings_of_the_chapter_are_those_of_the_code():
    of, text = {name: family.recipe(name, "mnist", "medium") for name in family.MEMBERS}, " ".join(CHAPTER.split())
    gae, denoising, vae = of["gae"], of["denoising"], of["vae"]
    assert not gae.second_order
    for sentence in (
        f"Batches of {vae.batch_size}, Adam with a rate of ${vae.lr}$ (${of['gan'].lr}$ for GAN and MEG)",
        f"GAE: {gae.steps} steps of ${gae.step_size}$ with $\\sigma = {gae.sigma}$",
        f"noise of ${denoising.corruption}$, $\\sigma = {denoising.sigma}$, walkback of {denoising.walkback}",
        f"EAE: $\\lambda = {of['eae'].lam:g}$, and {of['batch_norm'].lam:g} where only",
        f"IWAE with {of['iwae'].samples} samples, BN-VAE with $\\gamma = {of['bn_vae'].gamma}$",
        f"Gaussian noise of a learned size, from ${vae.sigma_start}$ on",
        f"standard deviation ${of['vae_fixed'].sigma}$, and with a cross-entropy",
        f"MEG: $\\lambda = {of['meg'].lam:g}$",
        f"Mixture of Gaussians: {of['mixture'].max_iter} steps",
        f"the best of {of['k_means'].restarts} starts; local PCA: one start, at most {of['local_pca'].max_steps}",
        f"LLE: {of['lle'].n_neighbors} neighbours",
        f"noise of standard deviation {vae.noise} was added",
        f"$S = {vae.draws}$",
        f"among {vae.candidates:,} of the prior or {vae.coded:,} of training images",
        f"Here $k = {vae.neighbours}$",
    ):
        assert sentence in text, sentence
    learned = [of[name].sigma_start for name in ("iwae", "bn_vae", "cvae")]
    assert learned == 3 * [vae.sigma_start] and of["meg"].lr == of["gan"].lr
    assert all(recipe.schedule == "1 - t" for recipe in of.values() if isinstance(recipe, Trained))
    assert (vae.starts, vae.components, vae.epochs, of["gan"].epochs) == (4, 10, 20, 40)
    assert (vae.rows, vae.test, vae.density, vae.probe) == (10_000, 2_000, 2_000, 500)
