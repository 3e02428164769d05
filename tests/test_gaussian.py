"""Closed forms for Gaussians against torch.distributions, 50-digit arithmetic and quadrature."""

import math

import hypothesis.strategies as st
import mpmath
import pytest
import torch
from helpers import assert_z
from hypothesis import given
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from gae_core.gaussian import gaussian_entropy, kl_to_standard_normal, standard_normal_log_prob


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(*shape, seed=0):
    factor = normal(*shape, shape[-1], seed=seed)
    return factor @ factor.mT + 0.1 * torch.eye(shape[-1], dtype=torch.float64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_entropy_agrees_with_torch_distributions_and_the_determinant(d):
    cov = covariance(3, 2, d)
    entropy = gaussian_entropy(cov)
    assert entropy.shape == (3, 2)
    close(entropy, MultivariateNormal(torch.zeros(d).double(), cov).entropy(), atol=1e-10)
    close(entropy, 0.5 * torch.linalg.slogdet(2 * math.pi * math.e * cov)[1], atol=1e-10)


def test_entropy_is_the_integral_of_minus_p_log_p():
    sigma = mpmath.mpf("0.7")

    def integrand(x):
        p = mpmath.npdf(x, 0, sigma)
        return -p * mpmath.log(p)

    expected = mpmath.quad(integrand, [-14, -2, 0, 2, 14])
    assert float(gaussian_entropy(torch.tensor([[0.49]], dtype=torch.float64))) == pytest.approx(
        float(expected), abs=1e-12
    )


@given(seed=st.integers(0, 1000), a=st.floats(1e-6, 1e6))
def test_entropy_of_a_linear_image_grows_by_the_log_determinant(seed, a):
    cov, map_ = covariance(4, seed=seed), normal(4, 4, seed=seed + 1) + 3 * torch.eye(4)
    image = a * a * map_ @ cov @ map_.T
    expected = gaussian_entropy(cov) + torch.linalg.slogdet(map_)[1] + 4 * math.log(a)
    close(gaussian_entropy((image + image.T) / 2), expected, atol=1e-8)


def test_entropy_of_independent_coordinates_adds_and_correlation_only_lowers_it():
    cov = covariance(5)
    alone = sum(gaussian_entropy(v.reshape(1, 1)) for v in cov.diagonal())
    close(gaussian_entropy(torch.diag(cov.diagonal())), alone)
    assert gaussian_entropy(cov) < alone


def test_entropy_is_finite_where_the_determinant_is_not():
    cov = 1e-4 * torch.eye(200, dtype=torch.float64)
    assert torch.linalg.det(cov) == 0
    close(gaussian_entropy(cov), torch.tensor(100 * math.log(2 * math.pi * math.e * 1e-4), dtype=torch.float64), 1e-9)


def test_entropy_gradient_is_half_the_inverse():
    cov = covariance(4).requires_grad_()
    (gradient,) = torch.autograd.grad(gaussian_entropy(cov), cov)
    close((gradient + gradient.T) / 2, torch.linalg.inv(cov.detach()) / 2, atol=1e-10)


BAD = {
    "integers": (torch.eye(2, dtype=torch.int64), "floating-point"),
    "a vector": (torch.ones(3), r"shape \(\.\.\., d, d\)"),
    "not square": (torch.ones(2, 3), r"\(2, 3\)"),
    "no dimension": (torch.ones(0, 0), r"\(0, 0\)"),
    "NaN": (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "finite"),
    "infinite": (torch.tensor([[math.inf]]), "finite"),
    "asymmetric": (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
    "singular": (torch.ones(2, 2), "positive definite"),
    "indefinite": (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
    "zero": (torch.zeros(1, 1), "positive definite"),
    "one bad of two": (torch.stack([torch.eye(2), torch.ones(2, 2)]), "positive definite"),
}


@pytest.mark.parametrize("name", BAD)
def test_entropy_names_bad_input(name):
    cov, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        gaussian_entropy(cov)


def test_entropy_accepts_asymmetry_by_rounding():
    cov = covariance(3)
    off = cov.clone()
    off[0, 1] *= 1 + 1e-6
    assert float(gaussian_entropy(off)) == pytest.approx(float(gaussian_entropy(cov)), abs=1e-4)


@pytest.mark.parametrize("shape", [(1,), (5, 1), (4, 3, 8)])
def test_log_prob_agrees_with_torch_distributions(shape):
    z = 3 * normal(*shape)
    expected = MultivariateNormal(torch.zeros(shape[-1]).double(), torch.eye(shape[-1]).double()).log_prob(z)
    assert standard_normal_log_prob(z).shape == shape[:-1]
    close(standard_normal_log_prob(z), expected)


def test_log_prob_integrates_to_one():
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]  # the trapezoidal rule is exact to rounding here
    close(torch.trapezoid(standard_normal_log_prob(z).exp(), z[:, 0]), torch.tensor(1.0).double())


@pytest.mark.parametrize("shape", [(1,), (6, 1), (2, 3, 5)])
def test_kl_agrees_with_torch_distributions_per_sample(shape):
    mu, logvar = 2 * normal(*shape), normal(*shape, seed=1)
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(-1)
    assert kl_to_standard_normal(mu, logvar).shape == shape[:-1]
    close(kl_to_standard_normal(mu, logvar), expected)


def test_kl_is_the_mean_of_the_log_ratio():
    mu, logvar = torch.tensor([0.5, -1.0]).double(), torch.tensor([-0.7, 0.4]).double()
    z = mu + (logvar / 2).exp() * normal(200_000, 2)
    ratio = Normal(mu, (logvar / 2).exp()).log_prob(z).sum(1) - standard_normal_log_prob(z)
    assert_z(ratio.numpy(), float(kl_to_standard_normal(mu, logvar)))


def exact_kl(mu, logvar):
    with mpmath.workdps(60):
        return (mpmath.mpf(mu) ** 2 + mpmath.exp(mpmath.mpf(logvar)) - mpmath.mpf(logvar) - 1) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", range(-14, 2))
def test_kl_near_zero_has_the_rounding_error_of_logvar(dtype, sign, exponent):
    """The error is at most eps |logvar|, against 60 digits; exp(logvar) - 1 - logvar would have one of eps."""
    logvar = torch.tensor([sign * 0.7 * 10.0**exponent], dtype=dtype)
    error = abs(float(kl_to_standard_normal(torch.zeros(1, dtype=dtype), logvar)) - exact_kl(0.0, float(logvar)))
    scale = max(abs(float(logvar)), math.exp(float(logvar)) if exponent > 0 else 0)
    assert error <= torch.finfo(dtype).eps * scale
    naive = (logvar.exp() - 1 - logvar).sum() / 2
    if exponent < -3 and dtype == torch.float64:
        assert abs(float(naive) - exact_kl(0.0, float(logvar))) > error


@pytest.mark.parametrize("mu", [0.0, 1e-9, -1e-4, 3.0, 1e3])
@pytest.mark.parametrize("logvar", [0.0, -40.0, 20.0])
def test_kl_keeps_its_digits_where_nothing_cancels(mu, logvar):
    value = kl_to_standard_normal(*torch.tensor([[mu], [logvar]], dtype=torch.float64))
    assert float(value) == pytest.approx(float(exact_kl(mu, logvar)), rel=1e-14, abs=0)


def test_kl_is_zero_only_for_the_prior_and_never_negative():
    logvar = torch.linspace(-1e-2, 1e-2, 100_001)[:, None]  # float32, where the terms cancel
    assert (kl_to_standard_normal(torch.zeros_like(logvar), logvar) >= 0).all()
    assert kl_to_standard_normal(torch.zeros(1, 3), torch.zeros(1, 3)) == 0
    assert kl_to_standard_normal(torch.tensor([1e-12]), torch.zeros(1)) > 0


def test_kl_gradient_is_mu_and_half_of_variance_minus_one():
    mu, logvar = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    to_mu, to_logvar = torch.autograd.grad(kl_to_standard_normal(mu, logvar).sum(), (mu, logvar))
    close(to_mu, mu.detach())
    close(to_logvar, (logvar.detach().exp() - 1) / 2)


def test_kl_rejects_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"same shape, got \(4, 3\) and \(3,\)"):
        kl_to_standard_normal(torch.zeros(4, 3), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_squared(dtype):
    """At 300 the square is beyond float16."""
    mu = torch.tensor([[300.0, -2.0]], dtype=dtype)
    logvar = torch.tensor([[1.0, -3.0]], dtype=dtype)
    found = kl_to_standard_normal(mu, logvar)
    assert found.dtype == torch.float32
    close(found, kl_to_standard_normal(mu.float(), logvar.float()))
    close(standard_normal_log_prob(mu), standard_normal_log_prob(mu.float()))
    cov = (torch.eye(2) * 4).to(dtype)
    close(gaussian_entropy(cov), gaussian_entropy(cov.float()))


def test_a_covariance_that_is_no_tensor_or_empty_is_named():
    with pytest.raises(ValueError, match=r"cov must be a tensor, got ndarray: torch\.as_tensor"):
        gaussian_entropy(torch.eye(2).numpy())
    with pytest.raises(ValueError, match=r"shape \(\.\.\., d, d\), got torch.float32 \(0, 3, 3\)"):
        gaussian_entropy(torch.zeros(0, 3, 3))
