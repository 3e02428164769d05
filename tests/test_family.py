"""The family: one line for its models, the relatives' algorithms, densities to be compared, the map, the study."""

import dataclasses
import itertools
import math
import re
from pathlib import Path

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
from gae_core.models.local_linear import factor_log_likelihood, nmf_step
from gae_core.records import less
from gae_core.studies import family
from gae_core.studies.judge import classifier

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
        exact = family.linear_density(x, mu, W, variance)
        torch.testing.assert_close(exact, factor_log_likelihood(x, mu, W, variance))
        options = {"sigma": variance.sqrt(), "generator": generator}
        for draws in (1, 2, 20):
            found = family.decoder_density(decode, x, torch.zeros(5, 2).double(), draws=draws, **options)
            torch.testing.assert_close(found.values, exact)
            assert draws == 1 or found.doubled.abs().max() < 1e-10
    # one number is that number for all
    one = family.decoder_density(decode, x, torch.zeros(5, 2).double(), sigma=0.7, draws=1)
    torch.testing.assert_close(one.values, factor_log_likelihood(x, mu, W, torch.full((6,), 0.49).double()))


def test_a_linear_decoder_has_the_density_of_its_whole_covariances():
    _, mu, W, x, noise, _ = linear_model(entries=30)
    prior = two_components()
    weights, components = family.linear_mixture(mu, W, noise, prior)
    covariance = W @ W.T + noise.diag()
    parts = [torch.distributions.MultivariateNormal(mu + W @ mean, covariance).log_prob(x) for mean in prior.means]
    expected = (torch.stack(parts, 1) + prior.weights.log()).logsumexp(1)
    found = family.gaussian_mixture_density(x, weights, components)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    whole = [torch.distributions.MultivariateNormal(c.mean, covariance) for c in components]
    seen = torch.arange(30) % 3 > 0
    short, long = (family.gaussian_mixture_fill(x, seen, weights, given) for given in (components, whole))
    torch.testing.assert_close(short, long, rtol=1e-11, atol=1e-11)


def test_the_importance_estimate_is_never_above_on_average_and_says_what_doubling_changes():
    """With a mixture as prior the proposal is not the posterior: below on average, near with many draws."""
    decode, mu, W, x, noise, generator = linear_model()
    prior, start = two_components(), torch.zeros(1000, 2).double()
    options = {"sigma": (8 * noise).sqrt(), "prior": prior, "generator": generator}
    exact = family.linear_density(x[:1], mu, W, 8 * noise, prior)
    many = family.decoder_density(decode, x[:1], start[:1], draws=100_000, **options)
    torch.testing.assert_close(many.values, exact, atol=0.02, rtol=0)
    rows = x[:1].expand(1000, -1)
    by_draws = {draws: family.decoder_density(decode, rows, start, draws=draws, **options) for draws in (1, 2, 4)}
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
    found = family.decoder_density(
        lambda z, shift: decode(z) + shift, rows, torch.zeros(450, 2).double(), sigma=noise.sqrt(), rows=(given,)
    )
    torch.testing.assert_close(found.values, factor_log_likelihood(rows - given, mu, W, noise))


def test_missing_entries_are_their_conditional_means():
    decode, mu, W, x, noise, generator = linear_model()
    seen = torch.tensor([True, False, True, True, False, False])
    C = W @ W.T + noise.diag()
    gain = torch.linalg.solve(C[seen][:, seen], C[seen])
    exact = mu + (x - mu)[:, seen] @ gain  # of Gaussians, by the textbook
    one = family.linear_mixture(mu, W, noise)
    hidden = torch.where(seen, x, torch.full_like(x, math.nan))  # what is hidden is not looked at
    torch.testing.assert_close(family.gaussian_mixture_fill(hidden, seen, *one)[:, ~seen], exact[:, ~seen])
    # for a linear decoder the likeliest code is the mean, from wherever one starts, and with a shift by a row
    starts, shift = (
        3 * torch.randn(5, 4, 2, generator=generator).double(),
        torch.randn(5, 6, generator=generator).double(),
    )
    found = family.decoder_fill(
        lambda z, rows: decode(z) + rows, hidden + shift, seen, starts, sigma=noise.sqrt(), rows=(shift,)
    )
    torch.testing.assert_close((found - shift)[:, ~seen], exact[:, ~seen])
    # a mixture: the mean over what Bayes' rule says of the components, by sampling it
    prior = two_components()
    z = prior.sample(400_000, generator=generator)
    weights = (-0.5 * ((x[0, seen] - decode(z)[:, seen]).square() / noise[seen]).sum(1)).softmax(0)
    assert 1 / weights.square().sum() > 1000
    found = family.gaussian_mixture_fill(hidden[:1], seen, *family.linear_mixture(mu, W, noise, prior))[0]
    torch.testing.assert_close(found[~seen], (weights @ decode(z))[~seen], atol=0.1, rtol=0)


def test_of_several_searches_the_best_is_taken():
    """g(z) = (z², z): of the square alone, with a prior that leans to one side, the other root is a local maximum."""
    x, seen = torch.tensor([[4.0, math.nan]]).double(), torch.tensor([True, False])
    lean = GaussianMixture(torch.ones(1).double(), torch.tensor([[1.0]]).double(), torch.ones(1, 1, 1).double())
    starts = torch.tensor([[[-2.5], [-1.5], [2.5], [-2.0]]]).double()
    options = {"sigma": torch.full((2,), 0.1).double(), "prior": lean, "steps": 30}

    def fill(starts):
        return family.decoder_fill(lambda z: torch.cat([z * z, z], 1), x, seen, starts, **options)[0, 1]

    assert fill(starts) == pytest.approx(2, abs=0.01)
    assert fill(starts[:, :2]) == pytest.approx(-2, abs=0.01)


def test_odd_images_are_odd_as_a_whole():
    images = family.images_of("digits", "short")
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
    member = family.fit(name, x, torch.arange(300) % 10, family.SIZES["short"], 0)
    # importance weights of a wide Gaussian have the mean 1
    proposal = torch.distributions.MultivariateNormal(
        x.mean(0).double(), 1.5 * torch.cov(x.T.double()) + 0.03 * torch.eye(12)
    )
    torch.manual_seed(0)
    draws = proposal.sample((20_000,))
    for density in filter(None, (member.log_density, member.plain_density)):
        weights = (density(draws, draws, None, 1).values - proposal.log_prob(draws)).exp()
        assert_z(weights.numpy(), 1.0)


@pytest.mark.parametrize("name", family.MEMBERS)
def test_a_member_measures_what_it_can_and_nothing_else(name):
    size = dataclasses.replace(family.SIZES["short"], epochs=1)
    images = family.images_of("digits", "short")
    member = family.fit(name, images.x_train.flatten(1), images.y_train, size, 0)
    found, shown = family.measure(member, images, size, 0)
    assert ("squared error a pixel" in found) == (member.reconstruct is not None)
    assert ("trustworthiness" in found) == (member.codes is not None)
    assert all(math.isfinite(v) for v in found.values())
    assert all(v.shape[1:] == (1, 8, 8) for v in shown.values())
    assert (name in ("lle", "t_sne")) == (not any(key.startswith("Fréchet") for key in found))


def test_members_are_the_methods_that_they_are_named_after():
    from sklearn.decomposition import PCA

    images, size = family.images_of("digits", "short"), family.SIZES["short"]
    x, test = images.x_train.flatten(1), images.x_test.flatten(1)
    known = PCA(family.DIM, svd_solver="full").fit(x.numpy())
    member = family.fit("pca", x, images.y_train, size, 0)
    back = known.inverse_transform(known.transform(test.numpy()))
    torch.testing.assert_close(member.reconstruct(test, None), torch.from_numpy(back), rtol=0, atol=1e-5)
    left = (x - torch.from_numpy(known.inverse_transform(known.transform(x.numpy())))).square().mean(0)
    prior = fit_gaussian_mixture(member.codes(x, None).double(), 10, seed=0)
    W, mu = (torch.from_numpy(v).double() for v in (known.components_.T.copy(), known.mean_))
    W = W * (W * (member.decode(torch.eye(10)).double() - mu).T).sum(0).sign()  # the signs of the axes are free
    for density, variance in ((member.log_density, left), (member.plain_density, left.mean())):
        expected = family.linear_density(test.double(), mu, W, variance + family.NOISE**2, prior)
        torch.testing.assert_close(density(test, test, None, 1).values, expected, rtol=0, atol=2e-3)

    ppca = family.fit("ppca", x, images.y_train, size, 0)
    noisy = PCA(family.DIM, svd_solver="full").fit(x.double().numpy())
    covariance = torch.from_numpy(noisy.get_covariance()) * (len(x) - 1) / len(x) + family.NOISE**2 * torch.eye(64)
    normal = torch.distributions.MultivariateNormal(x.double().mean(0), covariance)
    found = ppca.log_density(test, test, None, 1).values
    assert ppca.plain_density is None  # one noise for all is what it is
    torch.testing.assert_close(found, normal.log_prob(test.double()), rtol=0, atol=1e-4)
    axes, values, noise = noisy.components_, noisy.explained_variance_, noisy.noise_variance_
    centred = test.double().numpy() - noisy.mean_
    shrunk = noisy.mean_ + centred @ axes.T @ np.diag(1 - noise / values) @ axes
    torch.testing.assert_close(ppca.reconstruct(test, None).double(), torch.from_numpy(shrunk), rtol=0, atol=1e-5)


def as_sets(*parts):
    return [{tuple(row.tolist()) for row in data.to_unit(x).flatten(1)} for x in parts]


@pytest.mark.parametrize("size", ["short", "medium"])
def test_test_images_are_not_among_the_training_images(size):
    whole, images = data.load("digits"), family.images_of("digits", size)
    train, test, all_train, all_test = as_sets(images.x_train, images.x_test, whole.x_train, whole.x_test)
    assert not all_train & all_test  # so that sets tell
    assert train <= all_train and test <= all_test
    limits = family.SIZES[size]
    assert len(train) == min(limits.rows, len(whole.x_train)) and len(test) == min(limits.test, len(whole.x_test))
    again = {tuple(x.tolist()): int(y) for x, y in zip(whole.x_train.flatten(1), whole.y_train, strict=True)}
    assert all(again[tuple(x.tolist())] == y for x, y in zip(images.x_train.flatten(1), images.y_train, strict=True))


@pytest.fixture
def linear_nets(monkeypatch):
    """Encoders and decoders that are linear, so that all densities have a closed form."""

    def pair(shape, dim, *, heads=1, **_):
        return nn.Linear(shape[0], heads * dim), nn.Linear(dim, shape[0])

    monkeypatch.setattr(family.nets, "mlp_pair", pair)
    monkeypatch.setattr(family.nets, "mlp", lambda sizes, **_: nn.Linear(sizes[0], sizes[-1]))
    monkeypatch.setattr(family.nn, "Sigmoid", nn.Identity)  # behind the decoder of the CVAE


@pytest.mark.parametrize("name", ["autoencoder", "gae", "eae", "vae", "vae_fixed", "bn_vae", "cvae", "gan"])
def test_fitted_and_measured_a_linear_decoder_has_its_exact_density(name, linear_nets):
    """The whole way, with what is added on it: the noise of the test, for each pixel; log 10 for a label."""
    images = family.images_of("digits", "short")
    size = dataclasses.replace(family.SIZES["short"], epochs=5, density=40, draws=4000, probe=40)
    x, y = images.x_train.flatten(1), images.y_train
    member = family.fit(name, x, y, size, 0)
    found, _ = family.measure(dataclasses.replace(member, fill=None, plain_density=None, told=True), images, size, 0)

    # the decoder from what it does, by least squares
    told = name == "cvae"
    z = torch.cat([member.codes(x, y), nn.functional.one_hot(y, 10) if told else torch.ones(len(x), 1)], 1).double()
    back = member.reconstruct(x, y).double()
    table = torch.linalg.lstsq(z, back).solution
    torch.testing.assert_close(z @ table, back, rtol=0, atol=1e-4)
    W = table[:10].T
    seen = 2000 if name == "gan" else 5000
    variance = (x - back)[:seen].square().mean(0) + 0.1**2  # of the pixels, and of the test
    prior = fit_gaussian_mixture(z[:, :10], 10, seed=0) if name == "autoencoder" else None
    clean, labels = images.x_test[:40].flatten(1), images.y_test[:40]
    noise = torch.randn(images.x_test.flatten(1).shape, generator=torch.Generator().manual_seed(0))[:40]
    noisy = (clean + 0.1 * noise).double()
    centres = table[10 + labels] if told else table[10].expand(40, -1)
    zero = torch.zeros(64).double()
    exact = family.linear_density(noisy - centres, zero, W, variance, prior) - (math.log(10) if told else 0)
    # for N(0, I) the proposal is the posterior; for a mixture it is not
    tolerance = 0.3 if name == "autoencoder" else 5e-3
    assert found["log-density, nats"] == pytest.approx(float(exact.mean()), abs=tolerance)
    error = float(exact.std()) / 40**0.5
    assert found["log-density, standard error over images"] == pytest.approx(error, rel=0.05)
    assert abs(found["log-density, rise at the last doubling of draws"]) < tolerance


def test_a_label_costs_its_logarithm_and_bounds_what_all_labels_give():
    decode, mu, W, x, noise, _ = linear_model()
    shifts = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.tensor([0, 2, 1, 1, 0])
    does = family._by_search(
        lambda z, hot: decode(z) + hot.double() @ shifts, noise, mu, 0, lambda x, y: torch.zeros(len(x), 2).double(),
        classes=3,
    )  # fmt: skip
    by_label = torch.stack([factor_log_likelihood(x - shift, mu, W, noise) for shift in shifts]) - math.log(3)
    found = does["log_density"](x, x, labels, 2).values
    torch.testing.assert_close(found, by_label.gather(0, labels[None])[0])
    assert (found < by_label.logsumexp(0)).all()


def test_samples_of_local_pca_have_the_moments_of_its_reconstructions():
    """In each component the codes' covariance is diagonal: the principal axes'."""
    images = family.images_of("digits", "medium")
    x = images.x_train.flatten(1)
    member = family.fit("local_pca", x, images.y_train, family.SIZES["short"], 0)
    back = member.reconstruct(x, None).double()
    drawn = member.fitted(50_000, torch.Generator().manual_seed(0)).double()
    spread, found = (torch.cov(v.T) for v in (back, drawn))
    assert float(found.trace() / spread.trace()) == pytest.approx(1, abs=0.02)
    assert float(torch.linalg.matrix_norm(found - spread) / torch.linalg.matrix_norm(spread)) < 0.03
    torch.testing.assert_close(drawn.mean(0), back.mean(0), rtol=0, atol=0.01)


# ---- measures of members that are known --------------------------------------------------------------------------


def short():
    images = family.images_of("digits", "short")
    return images, images.x_test.flatten(1), family.SIZES["short"]


def test_measures_of_what_is_known():
    images, x, size = short()
    given = []

    def log_density(noisy, clean, labels, draws):
        assert torch.equal(labels, images.y_test[: len(labels)])
        given.append((len(noisy), draws))
        return family.Density((noisy - clean).square().sum(1), doubled=torch.arange(len(noisy)).double())

    member = family.Member(
        0,
        codes=lambda x, y: 3 * x,
        reconstruct=lambda x, y: x + 0.2,
        sample=lambda n, g: images.x_train.flatten(1)[:n],
        log_density=log_density,
        plain_density=lambda *args: family.Density(log_density(*args).values - 7),
        fill=lambda hidden, seen, labels: torch.where(seen, math.inf, 0.25).expand_as(hidden),
    )
    found, _ = family.measure(member, images, size, 0)
    assert found["squared error a pixel"] == pytest.approx(0.04)
    judge = classifier(data.load("digits")).features
    features = [metrics.in_batches(judge, v) for v in (images.x_train[: len(x)], images.x_test)]
    assert found["Fréchet, own"] == pytest.approx(metrics.frechet_distance(*features))
    assert found["trustworthiness"] == 1
    noise = found["log-density, nats"] / 64 / 0.1**2  # chi-squared of 640 degrees of freedom
    assert abs(noise - 1) < 4 * math.sqrt(2 / 640)
    assert found["log-density, rise at the last doubling of draws"] == 4.5
    assert found["log-density, gain of a noise a pixel"] == pytest.approx(7, abs=1e-4)
    assert given[:2] == [(10, 10), (10, 10)] and {draws for _, draws in given[2:]} == {2}
    right = images.x_test[:40, :, :, 4:]
    assert found["squared error of a missing pixel"] == pytest.approx(float((right - 0.25).square().mean()))
    # an error that is the same for all images tells nothing; nor does noise
    assert found["AUROC of the error, halves"] == pytest.approx(0.5, abs=0.1)  # rounding decides
    assert found["AUROC of the density, turned"] == pytest.approx(0.5, abs=0.01)  # odd image i has the noise of image i


def test_scores_of_what_is_odd_point_the_right_way():
    """Trained on the images that are to be told from odd ones, a nearest neighbour knows them all."""
    images, x, size = short()
    known = family.Member(
        0,
        reconstruct=lambda flat, y: x[torch.cdist(flat, x).argmin(1)],
        log_density=lambda noisy, clean, labels, draws: family.Density(-torch.cdist(noisy, x).amin(1)),
    )
    found, _ = family.measure(known, images, size, 0)
    for kind in ("halves", "turned"):
        assert found[f"AUROC of the error, {kind}"] > 0.95 and found[f"AUROC of the density, {kind}"] > 0.95


def test_leaks_are_noticed():
    """What has seen training images alone is asked about test images; what is hidden stays hidden."""
    images, x, size = short()
    train = {tuple(row.tolist()) for row in images.x_train.flatten(1)}
    cheat = family.Member(
        0,
        reconstruct=lambda x, y: torch.stack([row if tuple(row.tolist()) in train else 0 * row for row in x]),
        fill=lambda hidden, seen, labels: hidden,  # it "fills in" what it was not to see
    )
    found, shown = family.measure(cheat, images, size, 0)
    assert found["squared error a pixel"] == pytest.approx(float(x.square().mean()))
    assert math.isnan(found["squared error of a missing pixel"])
    assert torch.equal(shown["test images"].flatten(1), x[:32])


def test_densities_are_fitted_to_codes_of_training_images():
    """Train on digits below 5, test on the others: samples are of the former, and far from the latter."""
    whole, size = data.load("digits"), family.SIZES["short"]
    small, large = whole.y_train < 5, whole.y_train >= 5
    parts = (whole.x_train[small], whole.y_train[small], whole.x_train[large], whole.y_train[large])
    images = data.Images("digits", *parts)
    x = whole.x_train.flatten(1)
    mean, axes = x.mean(0), torch.pca_lowrank(x, 10)[2]
    project = lambda x, y: (x - mean) @ axes  # noqa: E731
    member = family.Member(0, codes=project, decode=lambda z: mean + z @ axes.T)
    found, _ = family.measure(member, images, size, 0)
    judge = classifier(whole).features

    def distance(a, b):
        return metrics.frechet_distance(*(metrics.in_batches(judge, v) for v in (a, b)))

    back = [(mean + project(v.flatten(1), None) @ axes.T).clamp(0, 1).view_as(v) for v in (parts[0], parts[2])]
    assert 0.5 * distance(back[0], parts[2]) < found["Fréchet, fitted"] < 1.5 * distance(back[0], parts[2])
    assert found["Fréchet, fitted"] > 5 * distance(back[1], parts[2])  # which is what a leak would give


def test_records_say_what_members_were_made_with(monkeypatch):
    """What stands under "options" is what the models have."""
    made = []
    monkeypatch.setattr(family, "_fit", lambda model, *args, **options: made.append((model, options)) or model.eval())
    images, size = family.images_of("digits", "short"), family.SIZES["short"]
    for name, (_, _, trained) in family.MEMBERS.items():
        if not trained:
            continue
        family.fit(name, images.x_train.flatten(1), images.y_train, size, 0)
        model, how = made.pop()
        told = family._settings(name, "digits", "medium")
        assert (told["batch"], told["lr"]) == (family.BATCH, how.get("lr", family.LR))
        assert told["epochs"] == 7 * 20 * how.get("times", 1)
        for key, value in told["options"].items():
            if key == "gamma":
                assert model.norm.gamma == value
            elif key == "betas":
                assert list(how["betas"]) == value
            elif key == "corruption":
                x = torch.zeros(10_000, 1)
                noise = model.corruption(x, generator=torch.Generator().manual_seed(0))
                assert float(noise.std()) == pytest.approx(value, rel=0.05)
            elif key == "sigma" and name in ("vae", "iwae", "bn_vae", "cvae"):
                assert value is None and isinstance(model.log_sigma, nn.Parameter)
            elif key == "sigma" and name == "vae_fixed":
                assert model.log_sigma.exp().item() == pytest.approx(value)
            else:
                assert getattr(model, key) == value, (name, key)
        assert ("gamma" in told["options"]) == (getattr(model, "norm", None) is not None)
    assert family._settings("bn_vae", "mnist", "medium")["options"]["gamma"] == 0.7


def test_the_map_of_the_chapter_is_the_map_of_the_code():
    assert family.map_table() in CHAPTER
    for place in family.MAP:
        assert place.found in family.FOUND
        assert place.known in family.KNOWN
        assert place.goal in family.GOALS
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


def test_the_chapters_reading_of_the_recorded_runs():
    """Each sentence under the table, from the records that the table is drawn from."""
    tables = re.findall(r"```{results-table} (.*)\n:record: mnist-medium", CHAPTER)
    names, alike = tables[0].split(), [name.removeprefix("family_") for name in tables[1].split()]
    found = {name.removeprefix("family_"): records.RESULTS / name / "mnist-medium.json" for name in names}
    found = {name: records.check(path) for name, path in found.items()}
    assert all(r["rows"] == 10_000 and r["test"] == 2_000 and r["dim"] == 10 for r in found.values())
    assert found["vae"]["epochs"] == 20
    assert found["gan"]["epochs"] == found["meg"]["epochs"] == 40

    def row(key):
        return {name: r["metrics"][key]["mean"] for name, r in found.items() if key in r["metrics"]}

    def clear(a, b, key):
        """Whether a is clearly below b: the paired test of five seeds."""
        return less(*(found[n]["metrics"][key]["by seed"] for n in (a, b)))

    error, own, fitted = row("squared error a pixel"), row("Fréchet, own"), row("Fréchet, fitted")
    trust = row("trustworthiness")
    density = {name: value for name, value in row("log-density, nats").items() if name in alike}
    assert all(len(found[n]["seeds"]) == 5 for n in alike if n != "factor_analysis")
    assert all("log-density, standard error over images" in found[n]["metrics"] for n in density)
    fit, codes = row("seconds, fit"), row("seconds, codes")

    trained = ("gae", "autoencoder", "batch_norm", "eae", "vae", "iwae", "bn_vae", "cvae")
    assert all(0.45 < error[name] / error["pca"] < 0.6 for name in trained)
    assert max(error[name] for name in trained) < error["denoising"] < error["pca"]
    assert all(error[name] > error["pca"] for name in ("gan", "meg"))
    share = (error["pca"] - error["local_pca"]) / (error["pca"] - error["autoencoder"])
    assert 0.6 < share < 0.9 and fit["local_pca"] > max(fit["vae"], fit["autoencoder"])

    assert max(error, key=error.get) in ("k_means", "mixture") and error["k_means"] > 1.2 * error["nmf"]

    yardstick = own.pop("training_images")
    assert min(own.values()) > 10 * yardstick
    assert set(sorted(own, key=own.get)[:2]) == {"bn_vae", "eae"}
    assert own["batch_norm"] < own["vae"] / 2 and 0.75 < own["eae"] / own["batch_norm"] < 0.85
    assert max(own[n] for n in own if found[n]["epochs"]) == own["vae"] > 1.8 * own["gan"]
    assert all(clear(n, "vae", "Fréchet, own") and own[n] < 1.3 * own["gan"] for n in ("vae_fixed", "vae_bernoulli"))
    order = ["iwae", "vae", "autoencoder", "vae_bernoulli"]
    assert all(clear(a, b, "Fréchet, fitted") for a, b in itertools.pairwise(order))
    assert clear("autoencoder", "vae_fixed", "Fréchet, fitted")
    assert own["vae"] > 6 * fitted["vae"]
    assert "Fréchet, own" not in found["autoencoder"]["metrics"] and "Fréchet, fitted" not in found["gan"]["metrics"]

    steps = ["mixture", "iwae", "vae", "autoencoder"]
    assert all(clear(b, a, "log-density, nats") for a, b in itertools.pairwise(steps))
    assert [density[a] - density[b] for a, b in itertools.pairwise(steps)] == pytest.approx([55, 6, 7], abs=1)
    assert max(density, key=density.get) == "mixture" and density["autoencoder"] > max(
        density[n] for n in ("vae_fixed", "vae_bernoulli", "pca", "ppca", "factor_analysis")
    )
    gain = row("log-density, gain of a noise a pixel")
    assert gain["iwae"] == pytest.approx(80, abs=5) and gain["pca"] == pytest.approx(166, abs=1)
    assert abs(density["pca"] - density["factor_analysis"]) < 2
    behind = [(density["mixture"] - density[n] + gain[n]) / (density["mixture"] - density[n]) for n in steps[1:]]
    assert all(2 < times < 3 for times in behind)
    assert max(row("log-density, rise at the last doubling of draws")[n] for n in steps[1:]) < 0.1
    assert all(row("log-density, standard error over images")[n] < 2.3 for n in density)
    assert 3e6 < found["mixture"]["parameters"] < 3.2e6
    assert all(0.85 < own[name] / own["ppca"] < 1 for name in ("vae", "iwae"))

    three, linear = ("autoencoder", "vae", "iwae"), ("pca", "ppca", "factor_analysis")
    odd = {
        f"{of}, {kind}": row(f"AUROC of the {of}, {kind}")
        for of in ("density", "error")
        for kind in ("turned", "halves")
    }
    for name in three:
        assert odd["error, turned"][name] > max(odd["density, turned"].values())
        assert 0.925 < odd["error, halves"][name] < 0.945
    assert all(0.88 < odd["density, halves"][name] < 0.905 for name in (*three, "mixture"))
    assert max(odd[key][n] for key in odd for n in linear if key.endswith("halves")) < 0.8
    assert max(odd[key][n] for key in odd for n in linear if key.endswith("turned")) < 0.93
    missing = row("squared error of a missing pixel")
    variational = ("vae", "vae_fixed", "vae_bernoulli", "iwae")
    assert all(clear("mixture", n, "squared error of a missing pixel") for n in (*variational, "autoencoder"))
    assert max(missing[n] for n in variational) < missing["autoencoder"] < missing["bn_vae"]
    assert missing["bn_vae"] < min(missing[n] for n in linear)
    assert max(v for n, v in missing.items() if n != "training_images") < missing["training_images"]

    low = ("lle", "nmf", "mixture", "gan", "meg")
    assert max(trust[name] for name in low) < 0.94 < trust["t_sne"]
    assert min(v for name, v in trust.items() if name not in (*low, "t_sne")) > 0.975
    assert max(trust.values()) - trust["pca"] < 0.01 and max(trust.values()) - trust["t_sne"] < 0.03

    assert fit["pca"] < 2
    encoders = ("autoencoder", "eae", "vae", "bn_vae", "cvae")
    assert all(8 < fit[name] < 20 for name in encoders)
    assert min(fit["gae"], fit["iwae"]) > max(fit[n] for n in encoders)
    assert all(40 < fit[name] < 100 for name in ("mixture", "lle"))
    assert "t_sne" not in fit and "training_images" not in fit
    assert codes["gae"] > 10 * codes["autoencoder"] and codes["gan"] > 100 * codes["autoencoder"]
    for key in ("Fréchet, own", "squared error a pixel"):  # two seeds each: no order
        gan, meg = (found[n]["metrics"][key] for n in ("gan", "meg"))
        assert abs(gan["mean"] - meg["mean"]) < 2 * math.hypot(gan["standard error"], meg["standard error"])


def test_the_settings_of_the_chapter_are_those_of_the_code():
    how, text = family.SETTINGS, " ".join(CHAPTER.split())
    gae, denoising = how["gae"], how["denoising"]
    assert not gae["second_order"]
    for told in (
        f"Batches of {family.BATCH}, Adam with a rate of {family.LR} ({how['gan']['lr']} for GAN and MEG)",
        f"GAE: {gae['steps']} steps of {gae['step_size']} with $\\sigma = {gae['sigma']}$",
        f"noise of {denoising['corruption']}, $\\sigma = {denoising['sigma']}$, walkback of {denoising['walkback']}",
        f"EAE: $\\lambda = {how['eae']['lam']:g}$, and {how['batch_norm']['lam']:g} where only",
        f"IWAE with {how['iwae']['samples']} samples, BN-VAE with $\\gamma = {how['bn_vae']['gamma']}$",
        f"standard deviation {how['vae_fixed']['sigma']}, and with a cross-entropy",
        f"MEG: $\\lambda = {how['meg']['lam']:g}$",
        f"Mixture of Gaussians: {how['mixture']['max_iter']} steps",
        f"the best of {how['k_means']['starts']} starts; local PCA: one start, at most {how['local_pca']['max_steps']}",
        f"LLE: {how['lle']['n_neighbors']} neighbours",
        f"noise of standard deviation {family.NOISE} was added",
        f"$S = {family.SIZES['medium'].draws}$",
    ):
        assert told in text, told
    assert how["meg"]["lr"] == how["gan"]["lr"] and family.STARTS == 4
    size = family.SIZES["medium"]
    assert (size.rows, size.test, size.density, size.probe) == (10_000, 2_000, 2_000, 500)
    gains = {}
    for path in records.RESULTS.glob("family_*/mnist-medium.json"):
        record = records.check(path)
        if "log-density, gain of a noise a pixel" in record["metrics"]:
            gains[record["model"]] = record["metrics"]["log-density, gain of a noise a pixel"]["mean"]
            assert (record["density"], record["draws"], record["probe"]) == (2000, 100, 500)
    table = [name for name in re.findall(r"```{results-table} (.*)", CHAPTER)[1].split() if name in gains]
    networks = [gains[name] for name in table if name != "family_pca"]
    assert len(networks) >= 6 and 80 < min(networks) and max(networks) < 125
    assert gains["family_pca"] == pytest.approx(166, abs=0.5)
