"""Metrics on samples whose moments are exact by construction, so that the formulas hold to rounding."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import assert_z
from hypothesis import given
from scipy import stats
from sklearn.neighbors import NearestNeighbors
from torch import nn

from gae_core.metrics import (
    ModeCount,
    PrecisionRecall,
    frechet_distance,
    gaussianity,
    in_batches,
    mode_count,
    mode_quality,
    parzen_log_likelihood,
    precision_recall,
    squared_error,
    trustworthiness,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact(n, mean, cov, seed=0):
    """A sample whose mean and (unbiased) covariance are the given ones, not only in expectation."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(x.T).reshape(2 * [len(mean)])).T, x, upper=True, left=False
    )
    return mean + white @ torch.linalg.cholesky(cov).T


def covariance(d, seed=0):
    factor = normal(d, d, seed=seed)
    return factor @ factor.T + 0.2 * torch.eye(d)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


# ---- Fréchet distance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 10])
def test_frechet_is_the_formula_with_scipys_matrix_root(d):
    mean, cov = (normal(d, seed=1), normal(d, seed=2)), (covariance(d, 3), covariance(d, 4))
    a, b = exact(40, mean[0], cov[0]), exact(60, mean[1], cov[1], seed=5)
    root = scipy.linalg.sqrtm((cov[0] @ cov[1]).numpy()).real
    expected = float((mean[0] - mean[1]).square().sum() + (cov[0] + cov[1]).trace()) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)


def test_frechet_of_commuting_covariances_is_the_distance_of_means_and_deviations():
    turn, s, t, shift = (
        rotation(4),
        torch.tensor([0.0, 0.5, 1.0, 3.0]).double(),
        torch.tensor([1.0, 2.0, 1.0, 0.1]).double(),
        normal(4, seed=3),
    )
    base = exact(30, torch.zeros(4).double(), torch.eye(4).double())
    a, b = base * s @ turn, base * t @ turn + shift  # the first one has a covariance of rank 3
    assert frechet_distance(a, b) == pytest.approx(float((s - t).square().sum() + shift.square().sum()), abs=1e-9)


@pytest.mark.parametrize(("m", "s"), [(0.0, 2.0), (3.0, 1.0), (-1.5, 0.25)])
def test_frechet_in_one_dimension(m, s):
    base = exact(20, torch.zeros(1).double(), torch.eye(1).double())
    assert frechet_distance(base, m + s * base) == pytest.approx(m * m + (s - 1) ** 2, abs=1e-9)


@pytest.mark.parametrize("rank", [2, 5, 40])
def test_frechet_of_a_sample_to_itself_is_zero_also_when_its_covariance_is_singular(rank):
    x = normal(100, rank) @ normal(rank, 40, seed=1) * 10
    assert abs(frechet_distance(x, x)) < 1e-13 * float(x.square().sum(1).mean()) * 40
    assert abs(frechet_distance(x, x[torch.randperm(100, generator=torch.Generator().manual_seed(0))])) < 1e-7


@given(seed=st.integers(0, 500), d=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
def test_frechet_invariances(seed, d, scale):
    """Symmetric; the same under rotation, translation and permutation of rows; quadratic in the units."""
    a, b = normal(12, d, seed=seed), normal(15, d, seed=seed + 1) @ covariance(d, seed) + 1
    value, turn, shift = frechet_distance(a, b), rotation(d, seed), 5 * normal(d, seed=seed)
    assert value == pytest.approx(frechet_distance(b, a), abs=1e-9)
    assert value == pytest.approx(frechet_distance(a @ turn + shift, b @ turn + shift), abs=1e-9)
    assert value == pytest.approx(frechet_distance(a.flip(0), b), abs=1e-9)
    assert scale**2 * value == pytest.approx(frechet_distance(scale * a, scale * b), rel=1e-9, abs=1e-9 * scale**2)


def test_frechet_sees_only_two_moments():
    a = exact(50, torch.zeros(3).double(), torch.eye(3).double())
    b = exact(50, torch.zeros(3).double(), torch.eye(3).double(), seed=9)
    assert abs(frechet_distance(a, b)) < 1e-9 and not torch.allclose(a, b)


def test_frechet_rises_by_sampling_alone():
    values = [frechet_distance(normal(30, 3, seed=2 * i), normal(30, 3, seed=2 * i + 1)) for i in range(30)]
    assert min(values) > 0.01
    with pytest.raises(AssertionError):
        assert_z(values, 0.0)


def test_frechet_takes_float32_and_gradient_carrying_features():
    a, b = normal(20, 3).float().requires_grad_(), normal(20, 3, seed=1).float()
    assert isinstance(frechet_distance(a, b), float)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a.double(), b.double()), abs=1e-12)


GOOD = normal(5, 3)
BAD_PAIRS = {
    "a 1-D": ((normal(5), GOOD), r"a must have shape \(n >= 2, d\)"),
    "a one row": ((normal(1, 3), GOOD), r"a must have shape .* got \(1, 3\)"),
    "b one row": ((GOOD, normal(1, 3)), r"b must have shape .* got \(1, 3\)"),
    "b other d": ((GOOD, normal(5, 4)), r"b must have shape .*d alike in both, got \(5, 4\)"),
    "b images": ((GOOD, normal(5, 3, 2)), r"b must have shape"),
    "a NaN": ((GOOD * math.nan, GOOD), "a must be finite"),
    "b infinite": ((GOOD, GOOD / 0), "b must be finite"),
    "b integers": ((GOOD, GOOD.long()), "b must be floating point, got torch.int64"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_frechet_names_bad_input(name):
    pair, message = BAD_PAIRS[name]
    with pytest.raises(ValueError, match=message):
        frechet_distance(*pair)


# ---- Gaussianity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 10, 101])
def test_quantiles_of_the_normal_are_as_near_as_n_points_can_be(n):
    """At the quantiles (i - 1/2) / n the empirical distribution is 1 / (2n) off on both sides of every step."""
    z = torch.from_numpy(stats.norm.ppf((np.arange(n) + 0.5) / n))[:, None]
    result = gaussianity(z)
    assert result.ks_marginal == pytest.approx(1 / (2 * n), abs=1e-12)
    assert result.max_correlation == pytest.approx(0, abs=1e-12)
    assert result.ks_noise == pytest.approx(1.36 / math.sqrt(n))
    half = torch.from_numpy(stats.norm.ppf((np.arange(n) + 0.5) / n))
    one_good = gaussianity(torch.stack([half, half.flip(0) + 100], 1))
    assert one_good.ks_marginal == pytest.approx((1 / (2 * n) + 1) / 2, abs=1e-9)  # the mean over coordinates


def test_radii_at_the_quantiles_of_chi_squared_are_as_near_as_n_points_can_be():
    n, d = 50, 4
    direction = torch.nn.functional.normalize(normal(n, d), dim=1)
    squared = torch.from_numpy(stats.chi2(d).ppf((np.arange(n) + 0.5) / n))
    result = gaussianity(direction * squared.sqrt()[:, None])
    assert result.ks_radius == pytest.approx(1 / (2 * n), abs=1e-9)
    assert result.radius_std == pytest.approx(float(squared.std()) / math.sqrt(2 * d), abs=1e-12)


def test_the_radius_sees_a_sphere_that_the_marginals_do_not():
    d = 64
    z = torch.nn.functional.normalize(normal(2000, d), dim=1) * math.sqrt(d)
    result = gaussianity(z)
    step = stats.chi2(d).cdf(d)  # all radii at sqrt d: the distribution jumps there from 0 to 1
    assert result.ks_radius == pytest.approx(max(step, 1 - step), abs=1e-6)
    assert result.radius_std == pytest.approx(0, abs=1e-12)
    assert result.ks_marginal < result.ks_noise < 0.1 * result.ks_radius


def test_correlations_are_numpys_and_their_sign_does_not_matter():
    z = normal(30, 4) @ normal(4, 4, seed=1)
    expected = np.abs(np.corrcoef(z.numpy().T) - np.eye(4)).max()
    assert gaussianity(z).max_correlation == pytest.approx(expected, abs=1e-12)
    x = normal(20, 1)
    for sign in (3.0, -0.5):
        assert gaussianity(torch.cat([x, sign * x + 1], 1)).max_correlation == pytest.approx(1, abs=1e-12)


def test_normal_codes_pass_at_the_stated_rate_and_others_do_not():
    """The noise level is exceeded once in twenty, for marginals (d = 1) and radii alike; its asymptotics need n."""
    results = [gaussianity(normal(300, 1, seed=i)) for i in range(400)]
    for name in ("ks_marginal", "ks_radius"):
        exceeded = [float(getattr(r, name) > r.ks_noise) for r in results]
        assert_z(exceeded, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * 1.36**2) for k in range(1, 9)))
    assert_z([r.radius_std**2 for r in results], 1.0)  # the sample variance of |z|^2 is unbiased
    for z in (2 * normal(300, 2), normal(300, 2) + 0.5, normal(300, 2).exp()):
        assert gaussianity(z).ks_marginal > 2 * gaussianity(z).ks_noise


BAD_CODES = {
    "1-D": (normal(5), r"shape \(n >= 3, d >= 1\), got \(5,\)"),
    "two rows": (normal(2, 3), r"got \(2, 3\)"),
    "no columns": (normal(5, 0), r"got \(5, 0\)"),
    "NaN": (normal(5, 1) * math.nan, "finite"),
    "infinite": (normal(5, 1) / 0, "finite"),
    "constant": (torch.cat([normal(5, 1), torch.full((5, 1), 0.1), normal(5, 1)], 1), r"constant ones: \[1\]"),
}


@pytest.mark.parametrize("name", BAD_CODES)
def test_gaussianity_names_bad_input(name):
    z, message = BAD_CODES[name]
    with pytest.raises(ValueError, match=message):
        gaussianity(z)


# ---- application by batches -------------------------------------------------------------------------------------


class Squash(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(normal(3, 3))

    def forward(self, x):
        return torch.tanh(self.linear(x.flatten(1))).reshape(x.shape)

    def encode(self, x):
        return self(x)[:, :2]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8, 1000])
def test_batches_give_what_the_whole_gives_without_gradient(batch_size):
    model, x = Squash(), normal(7, 3)
    for function in (model, model.encode, lambda x: x**2):
        result = in_batches(function, x, batch_size=batch_size)
        torch.testing.assert_close(result, function(x).detach(), rtol=0, atol=1e-14)
        assert not result.requires_grad


def test_batches_are_no_larger_than_asked_and_bytes_become_floats():
    sizes = []

    def function(x):
        sizes.append(len(x))
        assert x.dtype == torch.float32
        return x

    x = torch.arange(7, dtype=torch.uint8)[:, None]
    torch.testing.assert_close(in_batches(function, x, batch_size=3), x / 255)
    assert sizes == [3, 3, 1]


def test_a_module_is_applied_in_the_mode_it_is_in():
    layer = nn.BatchNorm1d(3, affine=False, dtype=torch.float64)
    x = normal(8, 3) + 2
    assert in_batches(layer, x).mean().abs() < 1e-9
    assert in_batches(layer.eval(), x).mean() > 0.5


def test_squared_error_is_the_sum_over_entries_for_each_sample():
    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    x = normal(5, 2, 3, 3)
    torch.testing.assert_close(squared_error(Half(), x), torch.stack([(row / 2).square().sum() for row in x]))
    pixels = torch.full((4, 1, 2, 2), 255, dtype=torch.uint8)  # ones in the unit interval, halved
    torch.testing.assert_close(squared_error(Half(), pixels), torch.ones(4))
    assert (squared_error(nn.Identity(), pixels) == 0).all()


def test_a_model_on_a_gpu_takes_and_returns_tensors_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    model, x = Squash(), normal(7, 3)
    expected = in_batches(model, x)
    result = in_batches(model.cuda().encode, x)
    assert result.device.type == "cpu"
    torch.testing.assert_close(result, expected[:, :2])


def test_in_batches_applies_a_function_that_gives_one_tensor_or_several():
    x = torch.arange(14, dtype=torch.uint8).view(7, 2)
    assert torch.equal(in_batches(torch.sin, x, batch_size=3), torch.sin(x / 255))
    sines, sums = in_batches(lambda b: (b.sin(), b.sum(1)), x, batch_size=3)
    assert torch.equal(sines, torch.sin(x / 255)) and torch.equal(sums, (x / 255).sum(1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- precision and recall ---


def brute_force(real, fake, k):
    """The definition, by another program's neighbours and a loop over balls."""

    def share(points, sample):
        radius = NearestNeighbors(n_neighbors=k + 1).fit(sample).kneighbors(sample)[0][:, k]
        return np.mean([(np.linalg.norm(sample - p, axis=1) <= radius).any() for p in points])

    return PrecisionRecall(precision=share(fake, real), recall=share(real, fake))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("d", "scale"), [(1, 1.0), (4, 0.6), (4, 1.5)])
def test_precision_and_recall_follow_their_definition(k, d, scale):
    real, fake = normal(150, d), scale * normal(120, d, seed=1)
    result = precision_recall(real, fake, k=k)
    assert vars(result) == pytest.approx(vars(brute_force(real.numpy(), fake.numpy(), k)), abs=1e-12)
    assert 0 < result.precision <= 1 and 0 < result.recall <= 1
    assert precision_recall(real + 1e4, fake + 1e4, k=k, chunk_size=7) == result
    swapped = precision_recall(fake, real, k=k)
    assert (swapped.precision, swapped.recall) == (result.recall, result.precision)


@pytest.mark.parametrize("repeats", [1, 5])
def test_the_same_points_have_precision_and_recall_one(repeats):
    x = normal(60, 8).repeat(repeats, 1)
    assert precision_recall(x, x) == PrecisionRecall(1, 1)
    assert precision_recall(x.float(), x.float() * 1e-3 / 1e-3) == PrecisionRecall(1, 1)


def test_distant_samples_have_precision_and_recall_zero():
    assert precision_recall(normal(60, 3), normal(60, 3, seed=1) + 100) == PrecisionRecall(0, 0)


@pytest.mark.parametrize("kept", [1, 3])
def test_a_generator_that_drops_modes_is_precise_and_recalls_the_share_it_keeps(kept):
    modes = (
        normal(4, 50, 2) + 100 * torch.eye(4, 2, dtype=torch.float64)[:, None] + 1000 * torch.arange(4)[:, None, None]
    )
    result = precision_recall(modes.flatten(0, 1), modes[:kept].flatten(0, 1))
    assert result == PrecisionRecall(1, kept / 4)
    noisy = torch.cat([modes[:kept].flatten(0, 1), normal(25 * kept, 2) - 1e5])  # a third of it is far from all data
    assert precision_recall(modes.flatten(0, 1), noisy).precision == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"real": torch.zeros(3, 2)}, r"real must have shape \(n >= 4, d\), .*got \(3, 2\)"),
        ({"fake": torch.zeros(9, 3)}, r"fake must have shape \(n >= 4, d\), .*got \(9, 3\)"),
        ({"fake": torch.full((9, 2), math.nan)}, "fake must be finite"),
        ({"real": torch.zeros(9, 2, dtype=torch.long)}, "real must be floating point"),
        ({"k": 0}, "k and chunk_size must be at least 1, got k=0"),
        ({"chunk_size": 0}, "k and chunk_size must be at least 1.*chunk_size=0"),
    ],
)
def test_precision_recall_names_wrong_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(**{"real": torch.zeros(9, 2), "fake": torch.zeros(9, 2)} | changed)


# --- modes ---


def test_a_perfect_sampler_has_the_floors_divergence():
    classes, n = 50, 5000
    uniform = torch.ones(classes)
    counts = [mode_count(torch.randint(classes, (n,), generator=seeded(seed)), uniform) for seed in range(200)]
    assert {c.modes for c in counts} == {classes}
    assert counts[0].floor == 49 / 10_000
    assert_z([c.kl for c in counts], 49 / 10_000)


@pytest.mark.parametrize("kept", [1, 4, 10])
def test_dropped_modes_cost_the_logarithm_of_the_share_that_is_left(kept):
    labels = torch.arange(kept).repeat(7)
    result = mode_count(labels, torch.full((10,), 0.1))
    assert result.modes == kept
    assert result.kl == pytest.approx(math.log(10 / kept), abs=1e-12)
    assert result.floor == 9 / (2 * 7 * kept)


def test_modes_are_compared_with_the_frequencies_of_the_data():
    reference = torch.tensor([30, 0, 10])  # counts; a class that the data have not does not count as one
    assert mode_count(torch.tensor([0, 0, 0, 2]), reference) == ModeCount(modes=2, kl=0.0, floor=1 / 8)
    kl = mode_count(torch.tensor([0, 2], dtype=torch.uint8), reference).kl
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


@pytest.mark.parametrize(
    ("labels", "reference", "message"),
    [
        (torch.zeros(4), torch.ones(3), "labels must be integers"),
        (torch.zeros(0, dtype=torch.long), torch.ones(3), "labels must be integers"),
        (torch.zeros(2, 2, dtype=torch.long), torch.ones(3), "labels must be integers"),
        (torch.tensor([0, 3]), torch.ones(3), "labels must be classes that the reference has"),
        (torch.tensor([0, -1]), torch.ones(3), "labels must be classes that the reference has"),
        (torch.tensor([0, 1]), torch.tensor([1, 0, 1]), "labels must be classes that the reference has"),
        (torch.tensor([0]), torch.tensor([1.0, -0.1]), "reference must be finite frequencies"),
        (torch.tensor([0]), torch.zeros(2), "reference must be finite frequencies"),
        (torch.tensor([0]), torch.ones(2, 2), "reference must be finite frequencies"),
    ],
)
def test_mode_count_names_wrong_arguments(labels, reference, message):
    with pytest.raises(ValueError, match=message):
        mode_count(labels, reference)


# --- quality of modes, bad input ---


MODES = torch.tensor([[0.0, 0.0], [4.0, 0.0]])


def test_mode_quality_of_the_mixture_itself():
    x = MODES[torch.arange(4000) % 2] + 0.5 * normal(4000, 2).float()
    found = mode_quality(x, MODES, 0.5)
    assert found.modes == 2 and found.kl == pytest.approx(0, abs=1e-3)
    assert found.high_quality == pytest.approx(1 - math.exp(-4.5), abs=0.008)  # 4.7 of its standard errors
    assert found.spread == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(std=0.0), "std must be a positive number, got 0.0"),
        (dict(std=-0.1), "std must be a positive number, got -0.1"),
        (dict(std=math.nan), "std must be a positive number, got nan"),
        (dict(modes=MODES * math.nan), "modes must be finite"),
        (dict(modes=MODES[:0]), "x and modes must have shapes"),
        (dict(x=MODES * math.inf), "x must be finite"),
    ],
)
def test_mode_quality_names_wrong_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        mode_quality(**{"x": MODES, "modes": MODES, "std": 1.0, **changed})


X = normal(40, 3)
BAD = {
    "no columns": (lambda: frechet_distance(X[:, :0], X[:, :0]), "d >= 1"),
    "squares overflow": (lambda: frechet_distance(1e200 * X, X), "squares are finite"),
    "half a neighbour": (lambda: precision_recall(X, X, k=2.5), "k must be a whole number, got 2.5"),
    "half a neighbour of codes": (lambda: trustworthiness(X, X, k=2.5), "k be a whole number .* k=2.5"),
    "codes 1-D": (lambda: trustworthiness(X, X[:, 0]), r"z must have shape \(n, d\), got \(40,\)"),
    "frequencies are a number": (lambda: mode_count(torch.zeros(3, dtype=torch.long), 10), "must be a tensor of freq"),
    "NaN among the samples": (lambda: parzen_log_likelihood(X * math.nan, X, width=1.0), "samples must be finite"),
    "NaN among the data": (lambda: parzen_log_likelihood(X, X * math.nan, width=1.0), "x must be finite"),
    "no chunk": (lambda: parzen_log_likelihood(X, X, width=1.0, chunk_size=0), "chunk_size must be at least 1, got 0"),
    "no batch": (lambda: in_batches(nn.Identity(), X, batch_size=0), "batch_size must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_answer_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
