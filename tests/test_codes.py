"""What an encoder's distribution carries, against closed forms and quadrature; and the traps of published figures.

The likelihood by importance weights is in test_vae.py, beside the model whose likelihood is known.
"""

import math

import pytest
import torch
from helpers import assert_z
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from gae_core import data
from gae_core.metrics import active_units, encoder_information
from gae_core.normalization import CodeBatchNorm


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def channel(n, d, ratio, seed):
    """Encoder z = x + noise for normal x of variance ``ratio`` times the noise's: I(x; z) = d/2 ln(1 + ratio)."""
    generator = seeded(10_000 + seed)  # not that of the noise, which would be the same numbers
    return math.sqrt(ratio) * torch.randn(n, d, generator=generator, dtype=torch.float64), torch.zeros(n, d)


# --- mutual information and aggregate posterior ---


def test_both_parts_agree_with_quadrature():
    mu = torch.tensor([-2.0, -0.5, 0.1, 0.3, 1.5], dtype=torch.float64)
    logvar = torch.tensor([-1.0, 0.2, -2.0, 0.0, -3.0], dtype=torch.float64)
    components = Normal(mu, (0.5 * logvar).exp())
    mixture = MixtureSameFamily(Categorical(torch.ones(5, dtype=torch.float64)), components)
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    log_q = mixture.log_prob(grid)
    entropy = -torch.trapezoid(log_q.exp() * log_q, grid)
    from_prior = torch.trapezoid(log_q.exp() * (log_q - Normal(0.0, 1.0).log_prob(grid)), grid)
    results = [
        encoder_information(mu[:, None], logvar[:, None], samples=20, generator=seeded(seed)) for seed in range(200)
    ]
    assert_z([r.mutual_information for r in results], float(entropy - components.entropy().mean()))
    assert_z([r.kl_aggregate for r in results], float(from_prior))
    assert results[0].cap == math.log(5)
    expected = kl_divergence(components, Normal(0.0, 1.0)).mean()
    assert results[0].kl == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("d", [1, 4])
def test_information_of_a_gaussian_channel(d):
    results = [encoder_information(*channel(2000, d, 0.5, seed), generator=seeded(seed)) for seed in range(12)]
    assert_z([r.mutual_information for r in results], 0.5 * d * math.log(1.5))
    # The aggregate posterior is N(0, 1.5 I).
    assert_z([r.kl_aggregate for r in results], 0.5 * d * (0.5 - math.log(1.5)))


@pytest.mark.parametrize("n", [32, 500])
def test_it_saturates_at_the_logarithm_of_the_rows(n):
    mu, logvar = channel(n, 8, 1.0, 0)
    result = encoder_information(mu, logvar - 30, samples=2, generator=seeded())
    assert 0.5 * 8 * math.log1p(math.exp(30)) > 100  # what it is for new data
    assert result.mutual_information == pytest.approx(math.log(n), abs=1e-9)
    assert result.mutual_information <= result.cap + 1e-12


def test_trap_batches_of_32_cannot_show_more_than_ln_32():
    true = 0.5 * 8 * math.log(1 + 1.7)
    assert math.log(32) + 0.5 < true < math.log(4000) - 4
    mu, logvar = channel(4000, 8, 1.7, 0)
    whole = encoder_information(mu, logvar, generator=seeded()).mutual_information
    batches = [
        encoder_information(m, s, generator=seeded(i)).mutual_information
        for i, (m, s) in enumerate(zip(mu.split(32), logvar.split(32), strict=True))
    ]
    assert max(batches) <= math.log(32) + 1e-12
    assert abs(whole - true) < 0.15  # a standard error is 0.03; the rest is what 4000 rows leave out


def test_trap_the_estimate_can_be_negative_near_collapse_although_its_mean_is_not():
    mu, logvar = channel(500, 1, 1e-4, 0)
    estimates = torch.tensor(
        [encoder_information(mu, logvar, generator=seeded(s)).mutual_information for s in range(100)]
    )
    assert estimates.min() < 0
    assert estimates.min() > -0.01
    assert_z(estimates, 0.5 * math.log1p(float(mu.var(correction=0))))


def test_trap_divergence_without_information():
    """What delta-VAE shows: a q(z | x) that is not the prior but the same for all x."""
    mu, logvar = torch.full((100, 4), 0.8), torch.full((100, 4), -1.0)
    result = encoder_information(mu, logvar, generator=seeded())
    assert result.mutual_information == pytest.approx(0, abs=1e-12)
    assert result.kl == pytest.approx(4 * 0.5 * (0.64 + math.exp(-1) + 1 - 1), rel=1e-6)
    assert result.kl_aggregate == pytest.approx(result.kl)
    assert active_units(mu) == 0


@pytest.mark.parametrize("chunk_size", [1, 7, 50])
def test_chunks_and_the_precision_of_the_codes_do_not_change_the_value(chunk_size):
    mu, logvar = channel(50, 3, 2.0, 0)
    mu = mu.float()
    whole = encoder_information(mu.double(), logvar, samples=2, generator=seeded())
    parts = encoder_information(mu, logvar.float(), samples=2, chunk_size=chunk_size, generator=seeded())
    assert vars(parts) == pytest.approx(vars(whole), rel=1e-12)


def test_a_far_and_narrow_posterior_does_not_lose_digits():
    """Translation changes no information."""
    mu, logvar = channel(200, 2, 3.0, 0)
    near, far = (
        encoder_information((mu + offset) * 1e-3, logvar + 2 * math.log(1e-3), generator=seeded()).mutual_information
        for offset in (0.0, 1e3)
    )
    assert far == pytest.approx(near, abs=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mu": torch.zeros(5)}, r"mu must have shape \(n >= 2, d >= 1\)"),
        ({"mu": torch.zeros(1, 2), "logvar": torch.zeros(1, 2)}, r"mu must have shape \(n >= 2, d >= 1\)"),
        ({"logvar": torch.zeros(5, 3)}, "logvar must have the shape of mu"),
        ({"mu": torch.full((5, 2), math.nan)}, "mu must be finite"),
        ({"logvar": torch.full((5, 2), -math.inf)}, "logvar must be finite"),
        ({"samples": 0}, "samples and chunk_size be at least 1.*samples=0"),
        ({"chunk_size": 0}, "samples and chunk_size be at least 1.*chunk_size=0"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        encoder_information(**{"mu": torch.zeros(5, 2), "logvar": torch.zeros(5, 2)} | changed)


# --- active units ---


def test_active_units_are_those_whose_variance_reaches_the_threshold():
    base = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None]  # variance 1
    mu = base * torch.tensor([0.0, 0.0999, 0.1001, 3.0]) + 1e3
    assert active_units(mu) == 2
    assert active_units(mu, threshold=5.0) == 1
    assert active_units(mu.float() - 1e3, threshold=20.0) == 0


def test_trap_batch_norm_makes_all_units_active_whatever_they_carry():
    """Means of variance gamma^2 with unit noise: all active for gamma > 0.1, at 0.006 nats a unit."""
    d, gamma = 8, 0.11
    noise = 1e-3 * torch.randn(4000, d, generator=seeded(99), dtype=torch.float64)  # an encoder that has collapsed
    assert active_units(noise) == 0
    mu = gamma * CodeBatchNorm(d, eps=1e-12).double()(noise)
    assert active_units(mu) == d
    results = [encoder_information(mu, torch.zeros_like(mu), generator=seeded(s)) for s in range(8)]
    information = sum(r.mutual_information for r in results) / 8
    assert information == pytest.approx(0.5 * d * math.log1p(gamma**2), abs=0.01)
    assert information < 0.01 * math.log(4000)


def test_active_units_rejects_codes():
    with pytest.raises(ValueError, match="mu must have shape"):
        active_units(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="mu must be finite"):
        active_units(torch.full((3, 3), math.inf))


# --- data ---


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_trap_test_data_are_none_of_the_training_data(name):
    try:
        images = data.load(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    seen = {image.numpy().tobytes() for image in images.x_train}
    assert not any(image.numpy().tobytes() in seen for image in images.x_test)


@pytest.mark.parametrize("value", [-800.0, 800.0])
def test_variances_beyond_the_range_of_numbers_are_named_and_those_before_give_the_cap(value):
    mu = torch.arange(20.0)[:, None]
    with pytest.raises(ValueError, match=rf"logvar must be in \[-600, 600\], .* got {value:g} to {value:g}"):
        encoder_information(mu, torch.full_like(mu, value))
    found = encoder_information(mu, torch.full_like(mu, -20.0), generator=torch.Generator().manual_seed(0))
    assert found.mutual_information == pytest.approx(math.log(20), abs=1e-6)  # no code could be another's


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_a_threshold_that_is_none_is_named(value):
    with pytest.raises(ValueError, match="threshold must be a number of at least 0, got"):
        active_units(torch.arange(6.0)[:, None], threshold=value)
