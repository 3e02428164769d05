"""The nearest-neighbour entropy against an independent k-d tree, closed forms, and its own invariances."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.spatial import KDTree
from scipy.special import digamma, gammaln

from gae_core.entropy import knn_entropy, knn_entropy_bound, knn_local_entropy, log_unit_ball_volume


def sample(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kd_tree_entropy(x, k, p):
    """Written from the formula alone, on SciPy's k-d tree and special functions."""
    n, d = x.shape
    distance = KDTree(x).query(x, k=[k + 1], p=p)[0][:, 0]
    log_volume = {
        1: d * math.log(2) - gammaln(d + 1),
        2: d / 2 * math.log(math.pi) - gammaln(d / 2 + 1),
        math.inf: d * math.log(2),
    }[p]
    return digamma(n) - digamma(k) + log_volume + d * np.log(distance).mean()


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_agrees_with_an_independent_kd_tree(d, k, p):
    x = sample(300, d)
    assert float(knn_entropy(x, k, p=p)) == pytest.approx(kd_tree_entropy(x.numpy(), k, p), abs=1e-9)


def test_local_values_average_to_the_estimate_whatever_the_chunks():
    x = sample(100, 3)
    local = knn_local_entropy(x, 2, chunk_size=7)
    assert local.shape == (100,)
    torch.testing.assert_close(local.mean(), knn_entropy(x, 2), rtol=0, atol=1e-12)


def test_is_finite_where_the_gamma_function_overflows():
    x = sample(100, 400)
    assert math.isfinite(knn_entropy(x)) and math.isfinite(knn_entropy(x.float(), p=math.inf))
    with pytest.raises(OverflowError):
        math.gamma(1 + 400 / 2)  # what the volume of the ball would be divided by


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_gradient_matches_finite_differences(p):
    x = sample(12, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: knn_entropy(x, 2, p=p), (x,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_gradient_sums_to_zero_and_obeys_euler(p):
    """H is invariant under shifts, and H(a x) = H(x) + d log a."""
    x = sample(50, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(knn_entropy(x, 3, p=p), x)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(5, dtype=x.dtype), rtol=0, atol=1e-11)
    assert float((x.detach() * gradient).sum()) == pytest.approx(5, abs=1e-11)


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-12, 12), shift=st.floats(-3, 3), seed=st.integers(0, 100))
def test_scaling_adds_d_log_a_and_shifting_nothing(exponent, shift, seed):
    x, a = sample(40, 3, seed), 10.0**exponent
    assert float(knn_entropy(a * x + a * shift)) == pytest.approx(float(knn_entropy(x)) + 3 * math.log(a), abs=1e-9)


def test_float32_keeps_its_digits_far_from_the_origin():
    """A matrix product of centred or uncentred float32 loses them; differences do not."""
    x = 1 + 1e-3 * sample(1000, 2).float()
    assert float(knn_entropy(x)) == pytest.approx(kd_tree_entropy(x.double().numpy(), 1, 2), abs=1e-4)


def test_half_precision_is_widened():
    x = sample(30, 2).bfloat16()
    assert knn_entropy(x, 3, duplicates="clamp").dtype == torch.float32


@pytest.mark.parametrize("d", [1, 2, 5])
def test_norms_agree_in_one_dimension_and_volumes_have_their_closed_forms(d):
    assert log_unit_ball_volume(d, 1) == pytest.approx(d * math.log(2) - gammaln(d + 1), abs=1e-12)
    assert log_unit_ball_volume(d, 2) == pytest.approx(d / 2 * math.log(math.pi) - gammaln(d / 2 + 1), abs=1e-12)
    assert log_unit_ball_volume(d, math.inf) == pytest.approx(d * math.log(2), abs=1e-12)
    x = sample(50, 1)
    torch.testing.assert_close(knn_entropy(x, p=1), knn_entropy(x, p=math.inf), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 60), d=st.integers(1, 12), seed=st.integers(0, 1000))
def test_bound_holds_on_any_normalised_batch(n, d, seed):
    x = sample(n, d, seed)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    if torch.cdist(x, x).add(torch.eye(n)).min() > 1e-9:  # n = 2, d = 1 gives copies
        assert float(knn_entropy(x)) <= knn_entropy_bound(n, d) + 1e-9


@pytest.mark.parametrize(("n", "d"), [(3, 2), (17, 16), (65, 64), (100, 128)])
def test_a_regular_simplex_reaches_the_bound_above_the_gaussian(n, d):
    vertices = torch.eye(n, dtype=torch.float64) - 1 / n
    coordinates = torch.linalg.svd(vertices)[0][:, : n - 1]  # rows: n points, equidistant, mean 0
    x = torch.cat([coordinates, torch.zeros(n, max(0, d - n + 1), dtype=torch.float64)], 1)[:, :d]
    x = x * math.sqrt(n * d / float((x * x).sum()))  # mean square radius d, as batch norm has it
    assert float(knn_entropy(x)) == pytest.approx(knn_entropy_bound(n, d), abs=1e-8)
    if d > 2:
        assert knn_entropy_bound(n, d) > d / 2 * math.log(2 * math.pi * math.e) + 5


BAD = {
    "n <= k": (dict(x=sample(3, 2), k=3), "1 <= k < n"),
    "k < 1": (dict(x=sample(3, 2), k=0), "1 <= k < n"),
    "k no integer": (dict(x=sample(3, 2), k=1.0), "integer"),
    "NaN": (dict(x=torch.tensor([[0.0], [math.nan], [1.0]])), "finite"),
    "infinite": (dict(x=torch.tensor([[0.0], [math.inf], [1.0]])), "finite"),
    "1-D": (dict(x=torch.randn(5)), r"shape \(n, d\)"),
    "integers": (dict(x=torch.arange(6).reshape(3, 2)), "floating point"),
    "no columns": (dict(x=torch.zeros(3, 0)), "d must be at least 1"),
    "p < 1": (dict(x=sample(3, 2), p=0.5), "p must be"),
    "copies": (dict(x=torch.tensor([[0.0], [0.0], [1.0]])), "2 of 3 points that coincide"),
    "copies, k = 2": (dict(x=torch.tensor([[0.0], [0.0], [1.0]]), k=2), "coincide"),
    "unknown policy": (dict(x=sample(3, 2), duplicates="jitter"), "duplicates must be"),
    "an array": (dict(x=np.zeros((3, 2))), "x must be a tensor, got ndarray: torch.as_tensor"),
    "half a chunk": (dict(x=sample(3, 2), chunk_size=2.5), "chunk_size must be a whole number"),
    "no chunk": (dict(x=sample(3, 2), chunk_size=0), "chunk_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        knn_entropy(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("far", ["large", "small"])
def test_values_whose_squares_leave_the_range_have_the_entropy_of_the_others(far, p, dtype):
    """H(a x) = H(x) + d log a up to both ends of the floating-point numbers; with a power of two x loses no digit."""
    x = sample(40, 3).to(dtype).clamp(-3.9, 3.9)
    limits = torch.finfo(dtype)
    power = round(math.log2(limits.max)) - 3 if far == "large" else round(math.log2(limits.tiny)) + 12
    a = (x * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)).requires_grad_()
    found = knn_entropy(a, 2, p=p)
    assert found.item() == pytest.approx(knn_entropy(x, 2, p=p).item() + 3 * power * math.log(2), rel=1e-6)
    if far == "large":  # the gradient of small ones is beyond the range
        (gradient,) = torch.autograd.grad(found, a)
        assert float((x * gradient * 2.0**power).sum()) == pytest.approx(3, rel=1e-4)


def test_an_integer_of_numpy_is_one():
    assert knn_entropy(sample(9, 2), np.int64(2)) == knn_entropy(sample(9, 2), 2)


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_numbers_that_are_none_are_named(value):
    with pytest.raises(ValueError, match="d must be at least 1"):
        log_unit_ball_volume(value)
    with pytest.raises(ValueError, match="n must be at least 2"):
        knn_entropy_bound(value, 2)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_clamped_copies_are_finite_and_have_no_gradient(p):
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [3.0, 2.0], [4.0, 0.0]], requires_grad=True)
    local = knn_local_entropy(x, p=p, duplicates="clamp")
    assert torch.isfinite(local).all() and local[0] < local[2]
    (gradient,) = torch.autograd.grad(local[:2].sum(), x)
    assert (gradient == 0).all()
    same = torch.zeros(3, 2)
    assert torch.isfinite(knn_entropy(same, duplicates="clamp"))


def test_clamping_changes_nothing_where_nothing_coincides():
    x = sample(50, 4)
    torch.testing.assert_close(knn_entropy(x, duplicates="clamp"), knn_entropy(x), rtol=0, atol=0)


@pytest.mark.parametrize("exponent", [-30, -15, -8, 0, 8, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_clamp_is_relative_to_the_data(exponent, dtype):
    """With copies, too, H(a x) = H(x) + d log a: a bound of a fixed size would drown small data, or miss large ones."""
    x, a = sample(40, 3).to(dtype), 2.0**exponent  # a power of two, so that scaling does not round
    x[1] = x[0]
    shift = 3 * exponent * math.log(2)
    local, scaled = (knn_local_entropy(y, duplicates="clamp").double() for y in (x, a * x))
    torch.testing.assert_close(scaled, local + shift, rtol=1e-6, atol=1e-4)
    assert float(local[0]) == pytest.approx(float(local[2:].median()) + 3 * math.log(torch.finfo(dtype).eps), abs=8), (
        "the bound is the rounding error of the data, not a fixed distance"
    )


@pytest.mark.parametrize(("n", "d", "message"), [(1, 2, "n must be"), (3, 0, "d must be")])
def test_bound_rejects(n, d, message):
    with pytest.raises(ValueError, match=message):
        knn_entropy_bound(n, d)
