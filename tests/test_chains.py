"""Mixtures fitted to codes against torch and SciPy; Langevin and MALA chains against closed forms and quadrature."""

import itertools
import math

import numpy as np
import pytest
import sympy as sp
import torch
from helpers import assert_z
from scipy.stats import multivariate_normal, norm, rankdata
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from gae_core.chains import effective_sample_size, langevin, mala, rank_rhat, split_rhat
from gae_core.densities import GaussianMixture, fit_gaussian_mixture
from gae_core.energy import latent_energy, log_normalizer_2d


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
    "whole numbers": (dict(z=torch.ones(9, 2, dtype=torch.long)), "z must be float32 or float64.*int64"),
    "half precision": (dict(z=normal(9, 2).half()), "z must be float32 or float64.*float16"),
    "no columns": (dict(z=normal(9, 0)), r"z must be float32 or float64 of shape \(n, d\), got shape \(9, 0\)"),
    "half a component": (dict(z=normal(9, 2), n_components=2.5), "n_components must be at least 1, a whole number"),
    "copies": (dict(z=normal(3, 2).repeat(5, 1), n_components=4), "must not exceed the 3 different rows of z, got 4"),
    "squares overflow": (dict(z=1e25 * normal(9, 2).float()), "variances that torch.float32 can hold"),
    "squares underflow": (dict(z=1e-25 * normal(9, 2).float()), "variances that torch.float32 can hold"),
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


WRONG_MIXTURES = {
    "weights of sum 2": (dict(weights=torch.ones(2)), "weights must not be negative and sum to 1"),
    "a negative weight": (dict(weights=torch.tensor([1.5, -0.5])), "weights must not be negative"),
    "NaN": (dict(weights=torch.tensor([math.nan, 0.5])), "weights must not be negative"),
    "three weights": (dict(weights=torch.ones(3) / 3), r"shapes \(c,\), \(c, d\) and \(c, d, d\), got \[\(3,\)"),
    "one mean": (dict(means=torch.zeros(3)), r"shapes \(c,\), \(c, d\) and \(c, d, d\)"),
    "variances": (dict(factors=torch.ones(2, 3)), r"shapes \(c,\), \(c, d\) and \(c, d, d\)"),
}


@pytest.mark.parametrize("name", WRONG_MIXTURES)
def test_a_mixture_that_is_no_density_is_refused(name):
    change, message = WRONG_MIXTURES[name]
    right = dict(weights=torch.tensor([0.5, 0.5]), means=torch.zeros(2, 3), factors=torch.eye(3).repeat(2, 1, 1))
    assert GaussianMixture(**right).sample(1).shape == (1, 3)
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{**right, **change})


@pytest.mark.parametrize("n", [0, -1, 2.0])
def test_a_mixture_gives_one_sample_or_more(n):
    with pytest.raises(ValueError, match="n must be a whole number, at least 1"):
        mixture().sample(n)


@pytest.mark.parametrize("z", [normal(4, 1), normal(2), torch.full((3, 2), math.nan).double()])
def test_points_that_a_mixture_does_not_know_are_refused(z):
    with pytest.raises(ValueError, match=r"z must be finite, of shape \(n, 2\)"):
        mixture().log_prob(z)


def test_strongly_correlated_codes_are_accepted():
    z = normal(200, 1) + 0.01 * normal(200, 5, seed=1)
    assert torch.isfinite(fit_gaussian_mixture(z.float()).log_prob(z.float())).all()


def quadratic(z):
    return 0.5 * z.square().sum(1)


def double_well(z):
    return (z[:, 0] ** 2 - 1) ** 2 + (z[:, 1] - 0.5 * z[:, 0]) ** 2


def grid(spacing=1.6, std=0.5):
    """Minus the log-density of 25 Gaussians on a grid, of unequal weights: 1 to 25 over their sum."""
    axis = spacing * torch.arange(-2, 3, dtype=torch.float64)
    means = torch.cartesian_prod(axis, axis)
    log_weights = (torch.arange(1, 26, dtype=torch.float64) / 325).log()

    def energy(z):
        return quadratic(z) / std**2 - torch.logsumexp(log_weights + (z @ means.T - quadratic(means)) / std**2, dim=1)

    return energy


@pytest.mark.parametrize("d", [2, 16])
@pytest.mark.parametrize("eps", [0.2, 0.5, 1.0])
def test_mala_samples_the_standard_normal_for_every_step(d, eps):
    """Chains start too narrow and forget it in the warm-up; each gives one replicate."""
    run = mala(
        quadratic,
        0.3 * normal(400, d, seed=1),
        step_size=eps,
        n_steps=400,
        warmup=int(40 / eps),
        target_acceptance=None,
        generator=generator(2),
    )
    assert run.step_size == pytest.approx(eps)
    assert_z(run.samples.square().mean((0, 2)).numpy(), 1.0, bound=3.0)
    assert_z(run.samples.mean((0, 2)).numpy(), 0.0, bound=3.0)


@pytest.mark.parametrize(("energy", "spread", "eps"), [(double_well, 0.5, 0.35), (grid(), 3.0, 0.3)])
def test_mala_in_the_plane_has_the_moments_of_quadrature(energy, spread, eps):
    """In the double well chains start near the middle: from |x| > 2.5 they would freeze (eq-latent_mcmc-frozen)."""
    density = log_normalizer_2d(energy, -7, 7, 420)  # 1 is an edge of cells
    weights = density.log_density.exp() * density.area
    assert density.edge < 1e-12 and float(weights.sum()) == pytest.approx(1, abs=1e-10)
    run = mala(
        energy,
        spread * normal(300, 2, seed=3),
        step_size=eps,
        n_steps=1000,
        warmup=500,
        target_acceptance=None,
        thin=5,
        generator=generator(4),
    )
    for moment in (
        lambda z: z[..., 0],
        lambda z: z[..., 1],
        lambda z: z[..., 0] ** 2,
        lambda z: z[..., 1] ** 2,
        lambda z: z[..., 0] * z[..., 1],
        lambda z: z[..., 0] ** 4,
        lambda z: (z[..., 0] > 1).double(),
    ):
        assert_z(moment(run.samples).mean(0).numpy(), float((weights * moment(density.x)).sum()))
    assert_z(run.energy.mean(0).numpy(), float((weights * energy(density.x)).sum()))


def test_an_energy_of_infinity_is_a_wall():
    """A half normal: chains stay on their side, with mean sqrt(2 / pi) and second moment 1."""

    def wall(z):
        return torch.where(z[:, 0] > 0, quadratic(z), math.inf)

    run = mala(wall, normal(500, 1).abs(), step_size=0.7, n_steps=500, warmup=100, generator=generator(5))
    assert (run.samples > 0).all()
    assert_z(run.samples[..., 0].mean(0).numpy(), math.sqrt(2 / math.pi))
    assert_z(run.samples[..., 0].square().mean(0).numpy(), 1.0)


@pytest.mark.parametrize("start", [0.003, 60.0])
def test_the_warm_up_finds_the_wanted_acceptance(start):
    run = mala(quadratic, normal(256, 16), step_size=start, n_steps=200, warmup=300, generator=generator(6))
    assert float(run.acceptance.mean()) == pytest.approx(0.574, abs=0.02)
    assert run.step_size == pytest.approx(1.08, abs=0.05)  # 2.72 / 16 ** (1 / 3), eq-latent_mcmc-optimum
    lower = mala(
        quadratic,
        normal(256, 16),
        step_size=start,
        n_steps=200,
        warmup=300,
        target_acceptance=0.9,
        generator=generator(6),
    )
    assert float(lower.acceptance.mean()) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("warmup", [10, 11])
def test_the_warm_up_ends_at_the_geometric_mean_over_its_second_half(warmup):
    """On a flat energy all is accepted, so that the recursion of the logarithm is a sum known beforehand."""
    run = mala(
        lambda z: 0 * z.sum(1),
        normal(3, 2),
        step_size=0.3,
        n_steps=4,
        warmup=warmup,
        limit=math.inf,
        generator=generator(9),
    )
    logs = math.log(0.3) + np.cumsum([t**-0.6 * (1 - 0.574) / (0.574 * (1 - 0.574)) for t in range(1, warmup + 1)])
    assert run.step_size == pytest.approx(math.exp(logs[-(warmup // 2) :].mean()), rel=1e-12)
    assert run.step_size < 0.9 * math.exp(logs[-1])  # the last step is another


def test_the_step_is_fixed_after_the_warm_up():
    """The chain goes on as one without any adaptation does from its place, with the noise that follows."""
    options = dict(step_size=0.01, warmup=60)
    run = mala(double_well, 0.3 * normal(5, 2), n_steps=200, generator=generator(10), **options)
    source = generator(10)
    first = mala(double_well, 0.3 * normal(5, 2), n_steps=1, generator=source, **options)
    assert first.step_size == run.step_size
    rest = mala(
        double_well,
        first.samples[0],
        n_steps=199,
        step_size=first.step_size,
        target_acceptance=None,
        generator=source,
    )
    torch.testing.assert_close(rest.samples, run.samples[1:], rtol=0, atol=0)
    assert 0 < float(run.acceptance.mean()) < 1


def test_what_an_offset_of_the_energy_costs_in_float32():
    """As the docstring says: nothing to speak of at 1e5, everything at 1e7, where float32 numbers are 1 apart."""

    def variances(offset, dtype):
        start = normal(1500, 2).to(dtype)
        options = dict(step_size=1.0, n_steps=150, target_acceptance=None, generator=generator(11))
        return mala(lambda z: quadratic(z) + offset, start, **options).samples.square().mean((0, 2)).numpy()

    assert_z(variances(1e5, torch.float32), 1.0)
    assert_z(variances(1e7, torch.float64), 1.0)
    with pytest.raises(AssertionError, match="z ="):
        assert_z(variances(1e7, torch.float32), 1.0)


def test_one_gradient_a_step():
    calls = []

    def counted(z):
        calls.append(len(z))
        return quadratic(z)

    for sampler in (langevin, mala):
        calls.clear()
        sampler(counted, normal(7, 3), step_size=0.1, n_steps=20, warmup=10)
        assert calls == [7] * 31  # and one at the start


@pytest.mark.parametrize("sampler", [langevin, mala])
def test_chains_have_the_promised_shapes_and_repeat(sampler):
    def run(seed):
        return sampler(quadratic, normal(6, 3), step_size=0.2, n_steps=95, warmup=4, thin=10, generator=generator(seed))

    before = torch.random.get_rng_state()
    a, b = run(0), run(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert a.samples.shape == (9, 6, 3) and a.energy.shape == (9, 6) and a.acceptance.shape == (6,)
    assert a.ess.shape == a.r_hat.shape == a.rank_r_hat.shape == (3,)
    torch.testing.assert_close(a.samples, b.samples, rtol=0, atol=0)
    torch.testing.assert_close(a.energy, quadratic(a.samples.flatten(0, 1)).reshape(9, 6))
    assert not torch.equal(a.samples, run(1).samples)
    assert not a.samples.requires_grad


def test_thinning_and_warm_up_leave_out_states_and_change_none():
    def run(**options):
        return mala(quadratic, normal(4, 2), step_size=0.3, target_acceptance=None, generator=generator(7), **options)

    every = run(n_steps=30).samples
    torch.testing.assert_close(run(n_steps=30, thin=3).samples, every[2::3], rtol=0, atol=0)
    torch.testing.assert_close(run(n_steps=20, warmup=10).samples, every[10:], rtol=0, atol=0)


def test_chains_do_not_touch_each_other():
    """Two chains with the noise of one batch: changing where the second starts leaves the first."""
    starts = normal(2, 3)
    other = torch.stack([starts[0], starts[1] + 2])
    first = [
        mala(double_well, z, step_size=0.3, n_steps=50, generator=generator(8)).samples[:, 0] for z in (starts, other)
    ]
    torch.testing.assert_close(*first, rtol=0, atol=0)


def test_energies_with_parameters_keep_their_gradients_clean():
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    run = mala(lambda z: quadratic(z) + net(z)[:, 0], normal(5, 3), step_size=0.2, n_steps=10, generator=generator())
    assert run.samples.shape == (10, 5, 3)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("sampler", [langevin, mala])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size must be"),
        ({"step_size": -1.0}, "step_size must be"),
        ({"step_size": math.nan}, "step_size must be"),
        ({"n_steps": 0}, "n_steps at least thin"),
        ({"thin": 0}, "thin must be"),
        ({"warmup": -1}, "warmup not negative"),
        ({"n_steps": 20.0}, "whole numbers"),
        ({"energy": lambda z: torch.zeros(len(z))}, "energy must depend on z"),
        ({"energy": lambda z: quadratic(z.detach())}, "energy must depend on z"),
        ({"energy": torch.no_grad()(quadratic)}, "energy must depend on z"),
        ({"energy": lambda z: torch.ones(len(z), requires_grad=True)}, "energy must depend on z"),  # parameters alone
        ({"z0": torch.zeros(3)}, "z0 must be"),
        ({"z0": torch.zeros(0, 2)}, "z0 must be"),
        ({"z0": torch.zeros(3, 2, dtype=torch.long)}, "z0 must be"),
        ({"z0": torch.full((3, 2), math.nan)}, "z0 must be finite"),
        ({"energy": lambda z: z.square()}, "energy must map"),
        ({"energy": lambda z: z.square().sum()}, "energy must map"),
        ({"energy": lambda z: quadratic(z) * math.nan}, "energy must be finite"),
        ({"energy": lambda z: quadratic(z) - math.inf}, "energy must be finite"),
        ({"energy": lambda z: quadratic(z) + math.inf}, "at step 0"),
        ({"energy": lambda z: (z - z).sum(1).sqrt()}, "gradient"),
        ({"energy": lambda z: (2 - z[:, 0]).log()}, "energy must be finite"),  # NaN beyond 2, found on the way
    ],
)
def test_what_makes_no_sense_is_refused(sampler, options, message):
    arguments = {"energy": quadratic, "z0": torch.zeros(3, 2), "step_size": 0.5, "n_steps": 500, **options}
    energy, z0 = arguments.pop("energy"), arguments.pop("z0")
    with pytest.raises(ValueError, match=message):
        sampler(energy, z0, generator=generator(), **arguments)


@pytest.mark.parametrize("target", [0.0, 1.0, math.nan])
def test_an_acceptance_that_cannot_be_is_refused(target):
    with pytest.raises(ValueError, match="target_acceptance"):
        mala(quadratic, torch.zeros(3, 2), step_size=0.5, n_steps=5, target_acceptance=target)


def test_a_chain_that_runs_away_is_stopped():
    with pytest.raises(FloatingPointError, match="run away"):  # the gradient throws it ever further
        langevin(lambda z: z.pow(4).sum(1), torch.full((3, 2), 3.0), step_size=0.5, n_steps=100, generator=generator())
    with pytest.raises(FloatingPointError, match="run away"):  # eps a > 4
        langevin(quadratic, torch.ones(3, 2), step_size=4.5, n_steps=1000, generator=generator())
    with pytest.raises(FloatingPointError, match="finite integral"):  # flat far out, and the step grows without end
        mala(lambda z: z.tanh().square().sum(1), torch.zeros(9, 2), step_size=1.0, n_steps=9, warmup=2000)
    with pytest.raises(FloatingPointError, match="limit=5"):
        mala(lambda z: -z[:, 0], torch.zeros(9, 1), step_size=1.0, n_steps=99, limit=5, generator=generator())


def test_a_density_that_is_none_may_pass_unnoticed_but_for_r_hat():
    """U = -z²/2 holds no chain, and outward steps are refused: there is no FloatingPointError to wait for."""
    run = mala(lambda z: -quadratic(z), normal(60, 2), step_size=1.0, n_steps=2000, generator=generator(12))
    assert float(run.acceptance.mean()) < 0.1
    assert float(run.r_hat.min()) > 3
    assert float(run.samples.norm(dim=2).max()) < 60  # in 2,000 steps


def test_a_warm_up_lets_chains_of_no_density_run_with_ever_smaller_steps():
    """The third sign: the step falls like 1 / |z|, so that the acceptance stays near its target."""
    found = []
    for warmup in (500, 1500):
        start = normal(20, 2)
        run = mala(lambda z: -quadratic(z), start, step_size=1.0, n_steps=1, warmup=warmup, generator=generator(12))
        radius = float(run.samples[0].norm(dim=1).mean())
        assert 0.5 < radius / warmup < 0.7
        found.append((radius, run.step_size))
    (near, long), (far, short) = found
    assert short < long / 2 < 0.02
    assert short * far == pytest.approx(long * near, rel=0.15)


def test_the_acceptance_without_a_density_falls_with_every_step_outwards():
    """It is exp(-eps (|z'|² - |z|²) / 8) for U = -|z|²/2, from the ratio of the two proposals."""
    z, w, eps = sp.symbols("z w epsilon", positive=True)
    drift = 1 + eps / 2
    forth, back = (w - drift * z) ** 2 / (2 * eps), (z - drift * w) ** 2 / (2 * eps)
    assert sp.expand((w**2 - z**2) / 2 + forth - back + eps * (w**2 - z**2) / 8) == 0


def autoregressive(phi, n, chains, seed=0):
    """Stationary chains z' = phi z + sqrt(1 - phi^2) xi, (n, chains, 1)."""
    xi = normal(n, chains, 1, seed=seed)
    z = [xi[0]]
    for noise in xi[1:]:
        z.append(phi * z[-1] + math.sqrt(1 - phi**2) * noise)
    return torch.stack(z)


@pytest.mark.parametrize("phi", [-0.5, 0.0, 0.6, 0.9])
def test_effective_sample_size_of_an_autoregression(phi):
    """(1 - phi) / (1 + phi) of the samples, by the geometric series; replicates are batches of four chains."""
    z = autoregressive(phi, 4000, 64)
    share = torch.stack([effective_sample_size(part) for part in z.split(4, dim=1)])[:, 0] / (4 * 4000)
    assert float(share.mean()) == pytest.approx((1 - phi) / (1 + phi), rel=0.06)
    assert float(split_rhat(z)) == pytest.approx(1, abs=0.01)


def reference_diagnostics(z):
    """Split R-hat and effective sample size by sums written out (Stan's manual), one coordinate, (n, chains)."""
    half = len(z) // 2
    chains = [z[s, j] for j in range(z.shape[1]) for s in (slice(half), slice(len(z) - half, None))]
    n, m = half, len(chains)
    within = np.mean([np.var(c, ddof=1) for c in chains])
    total = (n - 1) / n * within + np.var([c.mean() for c in chains], ddof=1)

    def autocovariance(t):
        return np.mean([np.sum((c[: n - t] - c.mean()) * (c[t:] - c.mean())) / n for c in chains])

    tau, last, k = -1.0, np.inf, 0
    while 2 * k + 1 < n:
        pair = sum(1.0 if t == 0 else 1 - (within - autocovariance(t)) / total for t in (2 * k, 2 * k + 1))
        if pair <= 0:
            break
        last = min(last, pair)
        tau, k = tau + 2 * last, k + 1
    return math.sqrt(total / within), m * n / tau


@pytest.mark.parametrize(("phi", "n", "chains", "shift"), [(0.7, 201, 3, 0.0), (0.3, 60, 1, 0.0), (0.9, 200, 4, 1.0)])
def test_diagnostics_agree_with_sums_written_out(phi, n, chains, shift):
    z = autoregressive(phi, n, chains) + shift * torch.arange(chains)[:, None]
    r_hat, ess = reference_diagnostics(z[..., 0].numpy())
    close(split_rhat(z)[0], r_hat)
    close(effective_sample_size(z)[0], ess)


def test_diagnostics_see_chains_in_different_places_and_on_their_way():
    z = normal(200, 4, 2)
    z[..., 1] += torch.tensor([0.0, 0.0, 3.0, 3.0])
    r_hat, ess = split_rhat(z), effective_sample_size(z)
    assert float(r_hat[0]) < 1.02 and float(r_hat[1]) > 1.5
    assert float(ess[0]) > 400 and float(ess[1]) < 12
    drift = normal(200, 4, 1) + torch.linspace(0, 4, 200, dtype=torch.float64)[:, None, None]
    assert float(split_rhat(drift)) > 1.25  # about sqrt(1 + 1 / (1 + 1/3)); all chains alike: only the halves tell
    torch.testing.assert_close(split_rhat(100 * z - 7), r_hat)  # units do not matter
    torch.testing.assert_close(effective_sample_size(100 * z - 7), ess)


def four_chains_of_different_widths():
    z = normal(1000, 4, 1, seed=13)
    z -= z.reshape(2, 500, 4, 1).mean(1).repeat_interleave(500, 0)  # all halves have the mean 0
    return z * torch.tensor([1.0, 1.0, 1.0, 10.0]).double()[:, None]


def test_only_the_rank_normalised_r_hat_sees_chains_of_different_widths():
    z = four_chains_of_different_widths()
    assert float(split_rhat(z)) == pytest.approx(math.sqrt(1 - 1 / 500))  # B = 0, whatever the widths
    assert float(rank_rhat(z)) == pytest.approx(1.35, abs=0.05)  # between samples of four chains it varies by 0.02
    assert float(rank_rhat(normal(1000, 4, 1, seed=13))) < 1.01


def test_the_rank_normalised_r_hat_of_chains_in_two_places():
    """No overlap: the scores are the halves of a normal, of mean ±sqrt(2/π) and variance 1 - 2/π, in any distance."""
    for distance in (10, 1e6):
        z = normal(2000, 40, 1) + distance * torch.tensor([1.0, -1.0]).double().repeat(20)[:, None]
        # The variance of 80 means of two values is 80 / 79 times that of two.
        assert float(rank_rhat(z)) == pytest.approx(math.sqrt(1 + 80 / 79 * 2 / (math.pi - 2)), rel=0.01)


def reference_rank_rhat(z):
    """By SciPy's ranks and quantiles, one coordinate, (n, chains)."""
    half = len(z) // 2
    parts = np.concatenate([z[:half], z[len(z) - half :]], 1)

    def r_hat(v):
        scores = norm.ppf((rankdata(v).reshape(v.shape) - 0.375) / (v.size + 0.25))  # equal ones: their mean rank
        within = scores.var(0, ddof=1).mean()
        return math.sqrt(((half - 1) / half * within + scores.mean(0).var(ddof=1)) / within)

    return max(r_hat(parts), r_hat(np.abs(parts - np.median(parts))))


@pytest.mark.parametrize(("n", "chains", "shift"), [(201, 3, 0.0), (60, 2, 1.0), (9, 1, 0.0)])
@pytest.mark.parametrize("change", [lambda z: z, torch.round, lambda z: z**3, lambda z: z * z.cumsum(1)])
def test_the_rank_normalised_r_hat_agrees_with_scipys_ranks(n, chains, shift, change):
    z = change(autoregressive(0.6, n, chains, seed=14) + shift * torch.arange(chains)[:, None])
    close(rank_rhat(torch.cat([z, -z], 2)), [reference_rank_rhat(z[..., 0].numpy())] * 2)


def test_the_rank_normalised_r_hat_of_heavy_tails_and_of_two_values():
    tails = torch.distributions.Cauchy(0.0, 1.0).icdf(torch.rand(2000, 4, 1, generator=generator(15)))
    assert float(rank_rhat(tails)) < 1.01
    coins = normal(200, 4, 1, seed=16).sign()  # all at the same distance from the middle
    assert float(rank_rhat(coins)) == pytest.approx(float(split_rhat(coins)), abs=1e-12)


@pytest.mark.parametrize("diagnostic", [split_rhat, rank_rhat, effective_sample_size])
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(9, 2), "samples must have shape"),
        (torch.zeros(7, 2, 1), "samples must have shape"),
        (torch.full((9, 2, 1), math.nan), "samples must be finite"),
        (torch.ones(9, 2, 1), "samples must vary"),
    ],
)
def test_samples_without_anything_to_judge_are_refused(diagnostic, samples, message):
    with pytest.raises(ValueError, match=message):
        diagnostic(samples)


def bend(z):
    """An invertible map of the plane with a Jacobian of varying determinant: (sinh a, b + a^2)."""
    return torch.stack([z[:, 0].sinh(), z[:, 1] + z[:, 0] ** 2], 1)


def test_latent_energies_are_what_they_say():
    z = normal(9, 2)
    close(latent_energy(quadratic, bend, term="none")(z), quadratic(bend(z)))
    close(latent_energy(quadratic, bend, term="prior")(z), quadratic(bend(z)) + quadratic(z))
    close(latent_energy(quadratic, bend, term="jacobian")(z), quadratic(bend(z)) - z[:, 0].cosh().log())
    curve = latent_energy(quadratic, lambda t: torch.cat([t, t**2, 2 * t], 1), term="jacobian")
    t = z[:, :1]
    close(curve(t), quadratic(torch.cat([t, t**2, 2 * t], 1)) - 0.5 * (5 + 4 * t[:, 0] ** 2).log())
    assert torch.autograd.gradcheck(latent_energy(quadratic, bend, term="jacobian"), z.requires_grad_())


def test_a_generator_of_images_has_a_jacobian_too():
    net = torch.nn.Sequential(torch.nn.Linear(2, 12), torch.nn.Softplus(), torch.nn.Unflatten(1, (3, 2, 2))).double()
    energy = latent_energy(lambda x: x.square().sum((1, 2, 3)), net, term="jacobian")
    z = normal(4, 2)
    for row, value in zip(z, energy(z), strict=True):
        j = torch.autograd.functional.jacobian(lambda v: net(v[None]).flatten(), row)
        assert float(value.detach()) == pytest.approx(
            float((net(row[None]).square().sum() - 0.5 * torch.logdet(j.T @ j)).detach())
        )


def test_latent_energies_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="term must be"):
        latent_energy(quadratic, bend, term="both")
    with pytest.raises(ValueError, match="at least 2 numbers"):
        latent_energy(quadratic, lambda z: z[:, :1], term="jacobian")(normal(3, 2))
    dead = torch.nn.Linear(2, 3)
    for decode in (
        lambda z: torch.ones(len(z), 3),
        lambda z: bend(z.detach()),
        torch.no_grad()(bend),
        lambda z: dead(torch.zeros_like(z)),  # a graph, but none to z
    ):
        with pytest.raises(ValueError, match="decode must depend on z"):
            latent_energy(quadratic, decode, term="jacobian")(normal(3, 2).float())


def test_where_a_generator_is_flat_the_energy_of_its_codes_is_infinite_and_no_chain_goes_there():
    """Beyond |z| = 1 the generator stands still: no area there, and chains keep to the disc, where x is N(0, I)."""

    def decode(z):
        return z / z.square().sum(1, keepdim=True).sqrt().clamp(min=1)

    flat = latent_energy(quadratic, lambda z: 0 * z, term="jacobian")
    assert (flat(normal(3, 2)) == math.inf).all()
    with pytest.raises(ValueError, match=r"energy must be finite.*inf"):
        mala(flat, normal(3, 2), step_size=0.1, n_steps=5)
    run = mala(
        latent_energy(quadratic, decode, term="jacobian"),
        0.3 * normal(4, 2).clamp(-1, 1),
        step_size=0.4,
        n_steps=300,
        generator=generator(17),
    )
    assert float(run.samples.norm(dim=2).max()) < 1 + 1e-9 and float(run.acceptance.min()) < 1
