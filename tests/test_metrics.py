"""Measures of samples and codes, against closed forms, counts made by hand and independent programs."""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from helpers import assert_z
from sklearn.neighbors import NearestNeighbors
from torch import nn

from gae_core.metrics import (
    ModeCount,
    PrecisionRecall,
    frechet_distance,
    gaussianity,
    in_batches,
    inception_fid,
    mode_count,
    precision_recall,
    squared_error,
)
from gae_core.models.autoencoder import Autoencoder


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# --- in batches ---


def test_in_batches_applies_a_function_that_gives_one_tensor_or_several():
    x = torch.arange(14, dtype=torch.uint8).view(7, 2)
    assert torch.equal(in_batches(torch.sin, x, batch_size=3), torch.sin(x / 255))
    sines, sums = in_batches(lambda b: (b.sin(), b.sum(1)), x, batch_size=3)
    assert torch.equal(sines, torch.sin(x / 255)) and torch.equal(sums, (x / 255).sum(1))


def test_squared_error_is_summed_over_the_entries():
    halving = Autoencoder(nn.Identity(), nn.Linear(4, 4, bias=False), 4)
    nn.init.eye_(halving.decoder.weight).data.mul_(0.5)
    x = torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 3.0]])
    assert squared_error(halving, x).tolist() == [1.0, 3.0]


# --- Fréchet distance ---


def with_moments(mean, root, n=50):
    """A sample whose mean is exactly ``mean`` and its covariance root @ root.T."""
    x = normal(n, len(mean))
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ root.T + mean


def test_frechet_distance_of_samples_with_given_moments():
    # For commuting covariances it is the squared distance of the means and of the standard deviations.
    rotation = torch.linalg.qr(normal(3, 3))[0]
    std_a, std_b = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.1, 0.4]], dtype=torch.float64)
    mean_a, mean_b = normal(2, 3, seed=1)
    a, b = with_moments(mean_a, rotation * std_a), with_moments(mean_b, rotation * std_b, n=80)
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    # In two dimensions the trace of the root of C_a C_b is (tr C_a C_b + 2 sqrt(det C_a C_b))^(1/2).
    root_a, root_b = normal(2, 2, 2, seed=3)
    a, b = (with_moments(torch.zeros(2, dtype=torch.float64), root) for root in (root_a, root_b))
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    cross = ((cov_a @ cov_b).trace() + 2 * (cov_a @ cov_b).det().sqrt()).sqrt()
    expected = float(cov_a.trace() + cov_b.trace() - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


# --- Gaussianity ---


def test_gaussianity_of_normal_codes_is_noise_and_of_others_is_seen():
    z = normal(4000, 6)
    seen = gaussianity(z)
    assert seen.ks_noise == 1.36 / math.sqrt(4000)
    assert seen.ks_radius < seen.ks_noise and seen.ks_marginal < seen.ks_noise
    assert abs(seen.radius_std - 1) < 0.05 and seen.max_correlation < 0.07
    sphere = gaussianity(z / z.norm(dim=1, keepdim=True) * math.sqrt(6))
    assert sphere.radius_std < 1e-10 and sphere.ks_radius > 0.4
    z[:, 1] = z[:, 0]
    assert gaussianity(z).max_correlation == pytest.approx(1)


def test_ks_marginal_of_shifted_normal_codes():
    # The largest distance between the distribution functions of N(s, 1) and N(0, 1) is erf(s / sqrt(8)).
    measured = gaussianity(normal(20_000, 4) + 0.5).ks_marginal
    assert measured == pytest.approx(math.erf(0.5 / math.sqrt(8)), abs=0.01)


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
        ({"fake": torch.full((9, 2), math.nan)}, "fake must be floating point and finite"),
        ({"real": torch.zeros(9, 2, dtype=torch.long)}, "real must be floating point and finite"),
        ({"k": 0}, "k and chunk_size must be at least 1, got k=0"),
        ({"chunk_size": 0}, "k and chunk_size must be at least 1.*chunk_size=0"),
    ],
)
def test_precision_recall_names_wrong_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(**{"real": torch.zeros(9, 2), "fake": torch.zeros(9, 2)} | changed)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(9, 2), r"a must have shape \(n >= 2, d\)"),
        (torch.zeros(9, 2), torch.zeros(9, 3), r"b must have shape \(n >= 2, d\)"),
        (torch.zeros(()), torch.zeros(9, 3), "a must have shape"),
        (torch.full((9, 2), math.inf), torch.zeros(9, 2), "a must be floating point and finite"),
    ],
)
def test_frechet_distance_names_wrong_arguments(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


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


# --- Inception ---


def test_without_torchmetrics_inception_fid_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r'pip install "torchmetrics\[image\]"'):
        inception_fid(torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8))


@pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is optional, and not here")
def test_inception_fid_is_the_frechet_distance_of_the_features():
    class Features(nn.Module):
        def forward(self, x):
            return x[:, :2, :2, 0].double().flatten(1)

    real = torch.rand(50, 3, 8, 8, generator=seeded())
    fake = torch.randint(0, 256, (40, 1, 8, 8), generator=seeded(1), dtype=torch.uint8)
    features = Features()
    expected = frechet_distance(features((255 * real).round()), features(fake.expand(-1, 3, -1, -1)))
    assert inception_fid(real, fake, feature=features, batch_size=7) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 2, 8, 8)])
def test_inception_fid_names_wrong_shapes(shape):
    with pytest.raises(ValueError, match="fake must have shape"):
        inception_fid(torch.rand(4, 3, 8, 8), torch.rand(shape))
