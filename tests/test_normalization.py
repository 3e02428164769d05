"""Batch normalisation of codes: exact moments in training, running ones in evaluation."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from gae_core.normalization import CodeBatchNorm

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


def test_half_precision_is_normalised_in_float32():
    z = sample(50, 3).bfloat16()
    out = CodeBatchNorm(3)(z)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, CodeBatchNorm(3)(z.float()))
