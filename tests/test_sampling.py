"""Gaussian mixtures fitted to codes: densities against torch and SciPy, moments of samples, what EM must find."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_z
from scipy.stats import multivariate_normal
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from gae_core.sampling import GaussianMixture, fit_gaussian_mixture


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-10, atol=atol)


def mixture(components=3, d=2):
    weights = torch.arange(1, components + 1, dtype=torch.float64)
    factors = normal(components, d, d, seed=1).tril(-1) + torch.diag_embed(normal(components, d, seed=2).exp())
    return GaussianMixture(weights / weights.sum(), 3 * normal(components, d), factors)


@pytest.mark.parametrize(("components", "d"), [(1, 1), (1, 4), (3, 2), (5, 6)])
def test_log_prob_agrees_with_torch_and_scipy(components, d):
    q, z = mixture(components, d), 4 * normal(50, d, seed=3)
    reference = MixtureSameFamily(Categorical(q.weights), MultivariateNormal(q.means, scale_tril=q.factors))
    assert q.log_prob(z).shape == (50,)
    close(q.log_prob(z), reference.log_prob(z))
    density = sum(
        w * multivariate_normal(m, f @ f.T).pdf(z.numpy()) for w, m, f in zip(*map(np.asarray, parts(q)), strict=True)
    )
    close(q.log_prob(z).exp(), np.atleast_1d(density))


def parts(q):
    return q.weights, q.means, q.factors


def test_density_integrates_to_one():
    q = mixture(3, 2)
    step = 0.6 * float(torch.linalg.svdvals(q.factors).min())  # of the narrowest direction: exact to 1e-16
    axis = torch.arange(-25, 25, step, dtype=torch.float64)
    p = q.log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert float(p.sum()) * step**2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("d", [1, 3])
def test_sample_moments_are_those_of_the_mixture(d):
    q = mixture(3, d)
    z = q.sample(100_000, generator=generator(4))
    assert z.shape == (100_000, d) and z.dtype == torch.float64
    mean = q.weights @ q.means
    second = torch.einsum("c,cij->ij", q.weights, q.factors @ q.factors.mT + q.means[:, :, None] * q.means[:, None])
    for i in range(d):
        assert_z(z[:, i].numpy(), float(mean[i]))
        for j in range(i, d):
            assert_z((z[:, i] * z[:, j]).numpy(), float(second[i, j]))


def test_samples_follow_the_density():
    """E q(z) over samples is the integral of q squared, which is a sum of Gaussians at the differences of means."""
    q = mixture(3, 2)
    covariances = q.factors @ q.factors.mT
    expected = sum(
        float(q.weights[a] * q.weights[b])
        * multivariate_normal(q.means[b].numpy(), (covariances[a] + covariances[b]).numpy()).pdf(q.means[a].numpy())
        for a, b in itertools.product(range(3), repeat=2)
    )
    assert_z(q.log_prob(q.sample(50_000, generator=generator(5))).exp().numpy(), expected)


def test_components_are_drawn_by_their_weights():
    weights, means = torch.tensor([0.2, 0.8]), torch.tensor([[-9.0], [9.0]])
    far = GaussianMixture(weights, means, torch.ones(2, 1, 1))
    assert_z((far.sample(20_000, generator=generator(6)) > 0)[:, 0].double().numpy(), 0.8)


def test_sampling_repeats_with_its_generator_and_leaves_the_global_one():
    q, before = mixture(), torch.random.get_rng_state()
    torch.testing.assert_close(q.sample(9, generator=generator()), q.sample(9, generator=generator()), rtol=0, atol=0)
    assert not torch.equal(q.sample(9, generator=generator()), q.sample(9, generator=generator(1)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sample_and_log_prob_carry_gradients_where_they_should():
    means = normal(2, 2).requires_grad_()
    q = GaussianMixture(torch.tensor([0.5, 0.5]).double(), means, torch.eye(2).double().repeat(2, 1, 1))
    z = normal(4, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: q.log_prob(z), (z,))
    (gradient,) = torch.autograd.grad(q.sample(30, generator=generator()).sum(), means)
    assert float(gradient.sum()) == pytest.approx(60)  # d (m + eps) / d m = 1 for each of 30 points in 2 coordinates


@pytest.mark.parametrize("d", [1, 2, 7])
def test_one_component_has_the_mean_and_covariance_of_the_codes(d):
    z = normal(50, d) @ normal(d, d, seed=1) + 5
    q = fit_gaussian_mixture(z)
    close(q.weights, [1.0])
    close(q.means[0], z.mean(0))
    close(q.factors[0] @ q.factors[0].T, np.atleast_2d(np.cov(z.numpy().T, bias=True)))


def test_one_component_is_the_maximum_of_the_likelihood():
    """At it, the mean log-density is minus the entropy of the Gaussian; any other Gaussian has less."""
    z = normal(40, 3) @ normal(3, 3, seed=1)
    q = fit_gaussian_mixture(z)
    best = float(q.log_prob(z).mean())
    half_log_det = float(q.factors[0].diagonal().log().sum())
    assert best == pytest.approx(-half_log_det - 1.5 * math.log(2 * math.pi * math.e), abs=1e-10)
    for factor in (0.98, 1.02):
        assert float(GaussianMixture(q.weights, q.means, factor * q.factors).log_prob(z).mean()) < best
        assert float(GaussianMixture(q.weights, factor * q.means, q.factors).log_prob(z).mean()) < best


def clusters(n=400):
    z = torch.cat([normal(n, 2) * torch.tensor([1.0, 0.3]) - 6, normal(3 * n, 2, seed=1) + 6])
    return z[torch.randperm(4 * n, generator=generator())], n


def test_em_finds_two_separated_clusters():
    z, n = clusters()
    q = fit_gaussian_mixture(z, 2)
    left, right = z[z[:, 0] < 0], z[z[:, 0] > 0]  # 12 standard deviations apart: the responsibilities are 0 or 1
    assert len(left) == n
    for k, part in zip(q.means[:, 0].argsort(), (left, right), strict=True):
        close(q.weights[k], len(part) / len(z), atol=1e-6)
        close(q.means[k], part.mean(0), atol=1e-6)
        expected = torch.cov(part.T, correction=0) + 1e-6 * z.var(0).mean() * torch.eye(2)
        close(q.factors[k] @ q.factors[k].T, expected, atol=1e-6)


@pytest.mark.parametrize("a", [1e-4, 1e4])
@pytest.mark.parametrize("components", [1, 2])
def test_units_of_the_codes_do_not_matter(a, components):
    """Fitted to a z, log q(a z) is log q(z) - d log a."""
    z, _ = clusters(50)
    close(
        fit_gaussian_mixture(a * z, components).log_prob(a * z) + 2 * math.log(a),
        fit_gaussian_mixture(z, components).log_prob(z),
        atol=1e-6,
    )


def test_more_components_fit_clusters_better_and_weights_sum_to_one():
    z, _ = clusters()
    one, two, five = (fit_gaussian_mixture(z, c) for c in (1, 2, 5))
    assert one.log_prob(z).mean() + 0.5 < two.log_prob(z).mean() <= five.log_prob(z).mean() + 1e-3
    close(five.weights.sum(), 1.0)


def test_the_seed_decides_em_alone():
    z, before = clusters(50)[0], torch.random.get_rng_state()
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global one is what must not change
    a, b = fit_gaussian_mixture(z, 4, seed=1), fit_gaussian_mixture(z, 4, seed=1)
    assert all(torch.equal(u, v) for u, v in zip(parts(a), parts(b), strict=True))
    assert not torch.equal(a.means, fit_gaussian_mixture(z, 4, seed=2).means)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


@pytest.mark.parametrize("components", [1, 2])
def test_the_fit_has_the_type_of_the_codes_and_no_gradient(components):
    z = clusters(50)[0].float().requires_grad_()
    q = fit_gaussian_mixture(z, components)
    assert all(part.dtype == torch.float32 and not part.requires_grad for part in parts(q))
    assert q.sample(3, generator=generator()).dtype == q.log_prob(z).dtype == torch.float32


BAD = {
    "1-D": (dict(z=normal(9)), r"shape \(n, d\), got shape \(9,\)"),
    "NaN": (dict(z=torch.full((9, 2), math.nan)), "finite"),
    "infinite": (dict(z=torch.full((9, 2), math.inf)), "finite"),
    "no component": (dict(z=normal(9, 2), n_components=0), "n_components must be at least 1"),
    "n = d": (dict(z=normal(3, 3)), "more than 3 rows.*got n_components=1 and 3 rows"),
    "n = components": (dict(z=normal(4, 2), n_components=4), "more than 4 rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fit_gaussian_mixture(**arguments)


@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(8))
def test_codes_on_a_subspace_are_refused_whatever_the_rounding(components, dtype, seed):
    plane = (normal(100, 2, seed=seed) @ normal(2, 3, seed=seed + 100)).to(dtype)
    constant = torch.cat([normal(100, 1, seed=seed), torch.full((100, 1), 0.1)], 1).to(dtype)
    for z in (plane, 1e-3 * plane, constant):
        with pytest.raises(ValueError, match=r"span all its dimensions.*drop dependent coordinates"):
            fit_gaussian_mixture(z, components)


def test_strongly_correlated_codes_are_accepted():
    z = normal(200, 1) + 0.01 * normal(200, 5, seed=1)
    assert torch.isfinite(fit_gaussian_mixture(z.float()).log_prob(z.float())).all()
