"""Normalisation of codes and of posteriors: exact moments in training, running ones in evaluation."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from gae_core.gaussian import kl_to_standard_normal
from gae_core.normalization import CodeBatchNorm, CoupledBatchNorm, FixedScaleBatchNorm, FixedScaleLayerNorm

TINY = 1e-300  # torch wants eps > 0; this one is lost in any variance


def sample(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-10, atol=atol)


@given(n=st.integers(2, 50), d=st.integers(1, 9), seed=st.integers(0, 100), exponent=st.integers(-4, 4))
def test_training_gives_mean_0_and_variance_v_over_v_plus_eps(n, d, seed, exponent):
    z = 10.0**exponent * (sample(n, d, seed) + 2)
    v = z.var(0, correction=0)
    out = CodeBatchNorm(d, eps=1e-3).double()(z)
    close(out.mean(0), torch.zeros(d), atol=1e-10)
    close(out.var(0, correction=0), v / (v + 1e-3))


def test_the_default_eps_is_the_documented_one():
    v = (z := 1e-2 * sample(20, 3)).var(0, correction=0)
    close(CodeBatchNorm(3).double()(z).var(0, correction=0), v / (v + 1e-5))


def test_the_default_weight_of_the_newest_batch_is_the_documented_one():
    layer, z = CodeBatchNorm(3).double(), 5 + sample(20, 3)
    layer(z)
    close(layer.running_mean, 0.1 * z.mean(0))
    close(layer.running_var, 0.9 + 0.1 * z.var(0))


def test_two_points_become_plus_and_minus_one():
    out = CodeBatchNorm(1, eps=TINY).double()(torch.tensor([[3.0], [7.0]], dtype=torch.float64))
    close(out, [[-1.0], [1.0]])


def test_training_output_does_not_change_under_shift_and_positive_scale():
    z, layer = sample(30, 4), CodeBatchNorm(4, eps=TINY).double()
    close(layer(5 * z - 3), layer(z))


def test_it_has_no_parameters():
    assert list(CodeBatchNorm(5).parameters()) == []


def test_running_statistics_are_the_exponential_averages():
    """Of the batch mean and of the unbiased batch variance, from 0 and 1."""
    layer, mean, var = CodeBatchNorm(3, momentum=0.25).double(), torch.zeros(3).double(), torch.ones(3).double()
    for seed in range(4):
        z = 2 * sample(11, 3, seed) + 1
        layer(z)
        mean, var = 0.75 * mean + 0.25 * z.mean(0), 0.75 * var + 0.25 * z.var(0)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


def test_evaluation_is_a_fixed_map_of_single_points():
    layer = CodeBatchNorm(3, eps=1e-3).double()
    for seed in range(3):
        layer(3 * sample(20, 3, seed) + 1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()
    z = sample(5, 3, 9)
    expected = (z - layer.running_mean) / (layer.running_var + 1e-3).sqrt()
    close(layer(z), expected)
    close(torch.cat([layer(row[None]) for row in z]), expected)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_gradient_of_a_batch_sums_to_zero_and_is_orthogonal_to_the_codes():
    """The output knows neither the batch's mean nor (for eps near 0) its scale."""
    z = sample(10, 4).requires_grad_()
    weight = sample(10, 4, 1)
    (gradient,) = torch.autograd.grad((CodeBatchNorm(4, eps=TINY).double()(z) * weight).sum(), z)
    close(gradient.sum(0), torch.zeros(4), atol=1e-11)
    centred = z.detach() - z.detach().mean(0)
    close((gradient * centred).sum(0), torch.zeros(4), atol=1e-11)
    assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 1), (4, 3, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_other_shapes_are_named(shape, training):
    with pytest.raises(ValueError, match=r"z must have shape \(batch, 3\), got \(" + str(shape[0])):
        CodeBatchNorm(3).train(training)(torch.zeros(shape))


def test_a_single_code_has_no_variance():
    layer = CodeBatchNorm(3)
    with pytest.raises(ValueError, match=r"at least 2 rows in training, got 1; call \.eval\(\)"):
        layer(torch.zeros(1, 3))
    assert layer.eval()(torch.zeros(1, 3)).shape == (1, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_batch_without_a_finite_variance_is_refused_before_the_averages_see_it(value):
    """1e30 is finite, its square is not."""
    layer = CodeBatchNorm(3)
    layer(sample(9, 3).float())
    before = {name: v.clone() for name, v in layer.state_dict().items()}
    z = sample(9, 3, 1).float()
    z[4, 1] = value
    with pytest.raises(FloatingPointError, match="running averages are as before"):
        layer(z)
    assert all(torch.equal(v, before[name]) for name, v in layer.state_dict().items())
    assert layer.eval()(sample(5, 3).float()).isfinite().all()


@pytest.mark.parametrize("name", ["fixed", "coupled"])
def test_norms_of_a_posterior_refuse_it_too(name):
    layer, raw = NORMS[name](3), sample(9, 3, 1).float()
    mu = raw.clone()
    mu[0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        layer(mu, raw)
    assert all(value.isfinite().all() for value in layer.eval()(raw, raw))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dim=0), "dim must be at least 1, got 0"),
        (dict(dim=-1), "dim must be at least 1, got -1"),
        (dict(dim=3, eps=0.0), "eps must be a positive number, got 0.0"),
        (dict(dim=3, eps=-1.0), "eps must be a positive number, got -1.0"),
        (dict(dim=3, momentum=5.0), r"momentum must be in \(0, 1\], got 5.0"),
        (dict(dim=3, momentum=math.nan), r"momentum must be in \(0, 1\], got nan"),
    ],
)
def test_settings_without_a_meaning_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CodeBatchNorm(**arguments)


def test_integers_and_no_rows_are_named():
    with pytest.raises(ValueError, match="z must be floating point, got"):
        CodeBatchNorm(3)(torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 2 rows in training, got 0"):
        CodeBatchNorm(3)(torch.zeros(0, 3))
    for layer in NORMS.values():
        with pytest.raises(ValueError, match="mu must be floating point, got"):
            layer(3)(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))


def test_half_precision_is_normalised_in_float32():
    z = sample(50, 3).bfloat16()
    out = CodeBatchNorm(3)(z)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, CodeBatchNorm(3)(z.float()))


# --- norms of the parameters of a posterior ---

NORMS = {
    "fixed": lambda dim: FixedScaleBatchNorm(dim, 0.7),
    "layer": lambda dim: FixedScaleLayerNorm(dim, 0.7),
    "coupled": lambda dim: CoupledBatchNorm(dim, 0.4),
}
EPS = 1e-5  # the documented one


@given(
    n=st.integers(2, 30),
    d=st.integers(1, 5),
    seed=st.integers(0, 100),
    exponent=st.integers(-4, 3),
    gamma=st.floats(0.1, 2),
)
def test_fixed_scale_sets_the_second_moment_of_each_mean(n, d, seed, exponent, gamma):
    mu, raw, layer = 10.0**exponent * (sample(n, d, seed) + 3), sample(n, d, seed + 1), FixedScaleBatchNorm(d, gamma)
    layer = layer.double()
    beta = sample(1, d, seed + 2)[0]
    with torch.no_grad():
        layer.beta.copy_(beta)
    out, logvar = layer(mu, raw)
    v = mu.var(0, correction=0)
    close(out.mean(0), beta, atol=1e-9)
    close(out.square().mean(0), gamma**2 * v / (v + EPS) + beta**2, atol=1e-9)
    assert torch.equal(logvar, raw)


@given(
    n=st.integers(2, 30),
    d=st.integers(1, 5),
    seed=st.integers(0, 100),
    exponent=st.integers(-4, 3),
    tau=st.floats(0.01, 0.99),
)
def test_coupled_scales_share_the_second_moment_of_the_prior(n, d, seed, exponent, tau):
    mu, raw = (10.0**exponent * (sample(n, d, seed + i) + 3) for i in range(2))
    layer = CoupledBatchNorm(d, tau).double()
    theta = 4 * sample(1, d, seed + 2)[0]
    with torch.no_grad():
        layer.theta.copy_(theta)
    out, logvar = layer(mu, raw)
    v, w = mu.var(0, correction=0), raw.var(0, correction=0)
    share = tau + (1 - tau) / (1 + (-theta).exp())
    close(out.mean(0), torch.zeros(d), atol=1e-9)
    close(out.square().mean(0), share * v / (v + EPS), atol=1e-9)
    close(logvar.exp().mean(0), (1 - share) * w / (w + EPS) + 1e-6, atol=1e-9)
    assert (layer.squared_scales()[0] > tau).all()
    close(sum(layer.squared_scales()), torch.ones(d))


def test_coupled_starts_in_the_middle_with_one_theta_a_coordinate():
    layer = CoupledBatchNorm(3)
    assert torch.equal(layer.theta, torch.zeros(3)) and list(layer.parameters()) == [layer.theta]
    close(torch.stack(layer.squared_scales()), [[0.75] * 3, [0.25] * 3])  # tau is 0.5
    assert [name for name, _ in FixedScaleBatchNorm(3, 0.7).named_parameters()] == ["beta"]
    assert list(FixedScaleLayerNorm(3, 0.7).parameters()) == []


def test_the_sign_of_the_standard_deviation_does_not_matter():
    mu, raw = sample(9, 2), sample(9, 2, 1)
    layer = CoupledBatchNorm(2).double()
    close(layer(mu, -raw)[1], layer(mu, raw)[1])


def test_a_standard_deviation_of_zero_gives_the_floor_and_no_gradient():
    """The middle row of a symmetric batch is its mean. Without the floor the logarithm would be -inf there."""
    raw = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    layer = CoupledBatchNorm(1, floor=1e-4).double()
    _, logvar = layer(torch.zeros(3, 1, dtype=torch.float64), raw)
    close(logvar[1, 0].detach(), math.log(1e-4))
    (gradient,) = torch.autograd.grad(logvar[1, 0], raw)
    close(gradient, torch.zeros(3, 1))
    sigma = torch.linspace(-0.1, 0.1, 2001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((sigma.square() + 1e-4).log().sum(), sigma)
    assert slope.abs().max() == pytest.approx(100, rel=1e-4)  # the documented 1 / sqrt(floor)


@pytest.mark.parametrize("training", [True, False])
def test_equal_rows_and_an_extreme_theta_stay_finite_with_finite_gradients(training):
    mu, raw = (torch.full((4, 2), 3.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for theta in (-1000.0, 0.0, 1000.0):
        layer = CoupledBatchNorm(2).double().train(training)
        torch.nn.init.constant_(layer.theta, theta)
        out, logvar = layer(mu, raw)
        if training:
            close(out.detach(), torch.zeros(4, 2))
            close(logvar.detach(), torch.full((4, 2), math.log(1e-6), dtype=raw.dtype))
        gradients = torch.autograd.grad(out.sum() + logvar.sum(), [mu, raw, layer.theta])
        assert all(torch.isfinite(g).all() for g in (out, logvar, *gradients))


@given(n=st.integers(1, 20), d=st.integers(2, 6), seed=st.integers(0, 100), gamma=st.floats(0.1, 2))
def test_layer_norm_sets_the_second_moment_of_each_row(n, d, seed, gamma):
    mu, raw = 2 * sample(n, d, seed) + 1, sample(n, d, seed + 1)
    out, logvar = FixedScaleLayerNorm(d, gamma)(mu, raw)
    v = mu.var(1, correction=0)
    close(out.mean(1), torch.zeros(n))
    close(out.square().mean(1), gamma**2 * v / (v + EPS))
    assert torch.equal(logvar, raw)


@pytest.mark.parametrize("name", NORMS)
def test_posterior_norms_name_other_shapes(name):
    layer = NORMS[name](3)
    with pytest.raises(ValueError, match=r"mu must have shape \(batch, 3\), got \(4, 2\)"):
        layer(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"raw must have shape \(batch, 3\), got \(5, 3\)"):
        layer(torch.zeros(4, 3), torch.zeros(5, 3))


@pytest.mark.parametrize("name", ["fixed", "coupled"])
def test_a_single_posterior_is_normalised_in_evaluation_alone(name):
    layer = NORMS[name](3)
    with pytest.raises(ValueError, match=r"at least 2 rows in training, got 1; call \.eval\(\)"):
        layer(torch.zeros(1, 3), torch.zeros(1, 3))
    mu, logvar = layer.eval()(torch.ones(1, 3), torch.ones(1, 3))
    assert torch.isfinite(mu).all() and torch.isfinite(logvar).all()


@pytest.mark.parametrize("name", ["fixed", "coupled"])
def test_evaluation_of_posteriors_does_not_depend_on_the_company(name):
    layer = NORMS[name](3).double()
    for seed in range(3):
        layer(sample(20, 3, seed) + 1, sample(20, 3, seed + 5))
    mu, raw = sample(6, 3, 9), sample(6, 3, 10)
    layer.eval()
    for whole, part in zip(layer(mu, raw), layer(mu[:1], raw[:1]), strict=True):
        close(part, whole[:1])


@pytest.mark.parametrize("value", [0.0, -0.5, math.inf, math.nan])
def test_a_scale_that_is_no_positive_number_is_named(value):
    for layer in (FixedScaleBatchNorm, FixedScaleLayerNorm):
        with pytest.raises(ValueError, match="gamma must be a positive number, got"):
            layer(3, value)
    with pytest.raises(ValueError, match="floor must be a positive number, got"):
        CoupledBatchNorm(3, floor=value)


@pytest.mark.parametrize("tau", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_share_outside_the_open_interval_is_named(tau):
    with pytest.raises(ValueError, match="tau must be between 0 and 1, both excluded, got"):
        CoupledBatchNorm(3, tau)


def test_dimensions_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        FixedScaleBatchNorm(0, 0.5)
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        FixedScaleLayerNorm(1, 0.5)


@pytest.mark.parametrize(
    ("norm", "floor", "raw"),
    [
        (FixedScaleBatchNorm(4, 0.5), 0.5 + 8, torch.zeros(20, 4)),
        (FixedScaleLayerNorm(4, 0.5), 0.5, torch.zeros(20, 4)),
        (CoupledBatchNorm(4, 0.5), 4 * math.log(2), torch.tensor([1.0, -1.0]).repeat(10)[:, None].repeat(1, 4)),
    ],
    ids=["fixed", "layer", "coupled"],
)
def test_floors_are_those_of_the_chapter_and_are_attained_with_the_cheapest_deviations_alone(norm, floor, raw):
    """The cheapest: 1 where they are free; of two signs and one size where they are normalised."""
    if isinstance(norm, FixedScaleBatchNorm):
        torch.nn.init.constant_(norm.beta, 2.0)
    norm, mu, raw = norm.double(), 100 * sample(20, 4), raw.double()
    assert norm.floor() == pytest.approx(floor)  # of the coupled norm with theta = 0: a share of 1/4
    assert kl_to_standard_normal(*norm(mu, raw)).mean().item() == pytest.approx(floor, rel=1e-4)  # eps and floor
    assert kl_to_standard_normal(*norm(mu, raw + 0.3 * sample(20, 4, 1))).mean() > 1.001 * floor
