"""The chapter *Entropy from nearest neighbours*, equation by equation.

Laws are simulated with neighbours found by brute force, or integrated from the Beta density; constants are compared
with SymPy's or mpmath's own integrals. The forms that the chapter calls wrong have to fail the same checks.
"""

# ruff: noqa: E731, B023 - short lambdas, used at once, read best in tests of formulas
import itertools
import math
from functools import lru_cache

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from helpers import assert_z
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import KDTree
from scipy.special import digamma

from gae_core.entropy import knn_entropy, knn_entropy_bound, knn_local_entropy, log_unit_ball_volume

DIGITS = 30
PAIRS = [(n, k) for n in range(2, 9) for k in range(1, n)]
SMALL = [(n, k) for n in range(2, 6) for k in range(1, n)]


@pytest.fixture(autouse=True)
def precision():
    with mp.workdps(DIGITS + 15):
        yield


def same(left, right, digits=DIGITS):
    """Whether two mpmath numbers agree to that many digits, absolute or relative."""
    return abs(left - right) <= mp.mpf(10) ** -digits * max(1, abs(right))


def fails(left, right):
    """Whether a wrong form is off by much more than rounding."""
    return abs(left - right) > mp.mpf(10) ** -3


def random_numbers(low, high, count, seed):
    """Reproducible mpmath numbers with all their digits random."""
    rng = np.random.default_rng(seed)
    return [low + (high - low) * mp.mpf(int(rng.integers(1, 10**18))) / 10**18 for _ in range(count)]


def kth_distances(x, k, p=np.inf, y=None, period=None):
    """Distance of each point of x to its k-th neighbour, in itself or in y; clouds (..., n, d) -> (..., n)."""
    reference = x if y is None else y
    difference = np.abs(x[..., :, None, :] - reference[..., None, :, :])
    if period is not None:
        difference = np.minimum(difference, period - difference)
    distance = difference.max(-1) if p == np.inf else (difference**p).sum(-1) ** (1 / p)
    return np.sort(distance, axis=-1)[..., k if y is None else k - 1]


def mp_volume(d, p):
    """The closed form of the chapter, which `test_volume` checks against integrals."""
    return (2 * mp.gamma(1 + 1 / mp.mpf(p))) ** d / mp.gamma(1 + mp.mpf(d) / p)


def mp_estimate(points, k, log_volume, norm=2):
    """The estimate from its definition, in mpmath, for a list of lists."""
    n, d = len(points), len(points[0])
    total = 0
    for i, a in enumerate(points):
        others = (mp.norm([u - v for u, v in zip(a, b, strict=True)], norm) for j, b in enumerate(points) if j != i)
        total += mp.log(sorted(others)[k - 1])
    return mp.psi(0, n) - mp.psi(0, k) + log_volume + mp.mpf(d) / n * total


def mp_points(n, d, seed):
    values = random_numbers(-1, 1, n * d, seed)
    return [values[i * d : (i + 1) * d] for i in range(n)]


def beta_density(p, n, k):
    """The density of the theorem, written out."""
    return sp.factorial(n - 1) / (sp.factorial(k - 1) * sp.factorial(n - k - 1)) * p ** (k - 1) * (1 - p) ** (n - k - 1)


p_symbol = sp.symbols("p", positive=True)


def integral_against_beta(power, n, k):
    """Exact integral of (log p)^power against the Beta density, monomial by monomial."""
    coefficients = sp.Poly(beta_density(p_symbol, n, k), p_symbol).terms()
    return sum(c * monomial_integral(j, power) for (j,), c in coefficients)


@lru_cache
def monomial_integral(j, power):
    """Integral of p^j (log p)^power over [0, 1], by SymPy."""
    return sp.integrate(p_symbol**j * sp.log(p_symbol) ** power, (p_symbol, 0, 1))


# The mass of the ball


@pytest.mark.checks("eq-knn_entropy-infinitesimal", how="symbolic")
@pytest.mark.parametrize(("n", "k"), [pair for pair in PAIRS if pair[0] <= 6])
def test_ways_to_place_the_others(n, k):
    """Counted one by one: who is in the shell, who inside, who outside."""
    ways = sum(
        places.count("shell") == 1 and places.count("inside") == k - 1
        for places in itertools.product(("shell", "inside", "outside"), repeat=n - 1)
    )
    assert ways == sp.binomial(n - 1, 1) * sp.binomial(n - 2, k - 1)
    assert ways == sp.factorial(n - 1) / sp.factorial(k - 1) / sp.factorial(n - k - 1)
    unnormalised = sp.integrate(sp.expand(p_symbol ** (k - 1) * (1 - p_symbol) ** (n - k - 1)), (p_symbol, 0, 1))
    assert ways * unnormalised == 1  # 1 / B(k, n - k)


@pytest.mark.checks("eq-knn_entropy-binomial", how="symbolic")
@pytest.mark.checks("eq-knn_entropy-beta", how="symbolic")
@pytest.mark.parametrize(("n", "k"), PAIRS)
def test_law_of_the_mass(n, k):
    p = p_symbol
    at_least_k = sum(sp.binomial(n - 1, j) * p**j * (1 - p) ** (n - 1 - j) for j in range(k, n))
    assert sp.expand(sp.diff(at_least_k, p) - beta_density(p, n, k)) == 0
    assert integral_against_beta(0, n, k) == 1
    if n > k + 1:  # starting the sum one term off is a different law
        assert sp.expand(sp.diff(at_least_k, p) - beta_density(p, n, k + 1)) != 0


def masses(name, clouds=4000, n=6, k=2):
    """True mass of the ball around the first of n points that reaches its k-th neighbour."""
    rng = np.random.default_rng(1)
    if name == "normal, discs":
        x = rng.standard_normal((clouds, n, 2))
        radius = kth_distances(x, k, 2)[:, 0]
        return stats.ncx2.cdf(radius**2, 2, (x[:, 0] ** 2).sum(1))
    if name == "normal, squares":
        x = rng.standard_normal((clouds, n, 2))
        radius = kth_distances(x, k)[:, 0, None]
        return (stats.norm.cdf(x[:, 0] + radius) - stats.norm.cdf(x[:, 0] - radius)).prod(1)
    x = rng.exponential(size=(clouds, n, 1))
    radius = kth_distances(x, k)[:, 0]
    return stats.expon.cdf(x[:, 0, 0] + radius) - stats.expon.cdf(x[:, 0, 0] - radius)


@pytest.mark.checks("eq-knn_entropy-beta", how="statistical")
@pytest.mark.checks("eq-knn_entropy-log-mean", how="statistical")
@pytest.mark.checks("eq-knn_entropy-log-var", how="statistical")
@pytest.mark.parametrize("name", ["normal, discs", "normal, squares", "exponential, intervals"])
def test_mass_of_simulated_balls(name):
    mass = masses(name)
    n, k = 6, 2
    assert_z(mass, k / n)
    assert_z(mass**2, k * (k + 1) / (n * (n + 1)))
    mean = -sum(1 / j for j in range(k, n))
    assert_z(np.log(mass), mean)
    assert_z((np.log(mass) - mean) ** 2, sum(1 / j**2 for j in range(k, n)))
    assert stats.kstest(mass, "beta", args=(k, n - k)).statistic * math.sqrt(len(mass)) < 2.2
    with pytest.raises(AssertionError):
        assert_z(np.log(mass), digamma(k) - math.log(n - 1))  # the form with log(n - 1)


# The mean of its logarithm


@pytest.mark.checks("eq-knn_entropy-log-mean", how="symbolic")
@pytest.mark.checks("eq-knn_entropy-log-var", how="symbolic")
@pytest.mark.parametrize(("n", "k"), PAIRS)
def test_mean_and_variance_of_log_mass_integrate_exactly(n, k):
    mean = integral_against_beta(1, n, k)
    assert mean == -sum(sp.Rational(1, j) for j in range(k, n))
    assert sp.simplify(sp.digamma(k) - sp.digamma(n) - mean) == 0
    variance = integral_against_beta(2, n, k) - mean**2
    assert variance == sum(sp.Rational(1, j**2) for j in range(k, n))
    assert sp.simplify(sp.polygamma(1, k) - sp.polygamma(1, n) - variance) == 0


@pytest.mark.checks("eq-knn_entropy-log-mean", how="exact")
@pytest.mark.checks("eq-knn_entropy-log-var", how="exact")
def test_log_moments_are_derivatives_of_the_log_beta_function_at_any_arguments():
    """Not only at integers: a and b are random, n = a + b."""
    for a, b in zip(random_numbers(0.4, 5, 4, 1), random_numbers(0.4, 5, 4, 2), strict=True):
        beta = mp.beta(a, b)
        # p = e^-t, so that the logarithm is no longer singular.
        first, second = (
            mp.quad(lambda t, m=m, a=a, b=b: (-t) ** m * mp.exp(-a * t) * (-mp.expm1(-t)) ** (b - 1), [0, 1, 8, mp.inf])
            for m in (1, 2)
        )
        mean = first / beta
        assert same(mean, mp.psi(0, a) - mp.psi(0, a + b), 25)
        assert same(second / beta - mean**2, mp.psi(1, a) - mp.psi(1, a + b), 25)
        assert same(mp.diff(lambda s, b=b: mp.log(mp.beta(s, b)), a), mp.psi(0, a) - mp.psi(0, a + b), 25)
        assert fails(mean, mp.psi(0, a) - mp.log(a + b - 1))


@pytest.mark.checks("eq-knn_entropy-moment", how="exact")
@pytest.mark.checks("eq-knn_entropy-renyi", how="exact")
@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 3), (7, 2)])
def test_moments_of_the_mass(n, k):
    for s in random_numbers(-0.9, 4, 3, n):
        # Integrated in t = -log p, so that p^(k - 1 + s) is smooth.
        integral = mp.quad(lambda t, s=s: mp.exp(-(k + s) * t) * (-mp.expm1(-t)) ** (n - k - 1), [0, 2, 10, mp.inf])
        left = integral / mp.beta(k, n - k)
        assert same(left, mp.beta(k + s, n - k) / mp.beta(k, n - k))
        assert same(left, mp.gamma(k + s) * mp.gamma(n) / mp.gamma(k) / mp.gamma(n + s))
        product = mp.fprod(j / (j + s) for j in range(k, n))
        assert same(left, product)
        exponentials = mp.fprod(
            mp.quad(lambda t, s=s, j=j: mp.exp(-t) * mp.exp(-s * t / j), [0, 5, 20, 100, mp.inf]) for j in range(k, n)
        )
        assert same(exponentials, product, 20)


@pytest.mark.checks("eq-knn_entropy-renyi", how="symbolic")
def test_transform_of_one_exponential():
    s, t, j = sp.symbols("s t j", positive=True)
    assert sp.simplify(sp.integrate(sp.exp(-t) * sp.exp(-s * t / j), (t, 0, sp.oo)) - j / (j + s)) == 0


# The volume of the ball


@pytest.mark.checks("eq-knn_entropy-ball-gamma", how="exact")
def test_two_ways_to_integrate_the_exponential():
    for p, d in zip(random_numbers(1, 4, 3, 3), random_numbers(1, 6, 3, 4), strict=True):
        # t^p = u in both would be the proof; these integrate in t and r as they stand.
        one = 2 * mp.quad(lambda t, p=p: mp.exp(-(t**p)), [0, 0.5, 1, 2, 5, 20, 150])
        assert same(one, 2 * mp.gamma(1 + 1 / p), 20)
        radial = mp.quad(lambda r, p=p, d=d: d * r ** (d - 1) * mp.exp(-(r**p)), [0, 0.5, 1, 2, 5, 20, 150])
        assert same(radial, mp.gamma(1 + d / p), 20)


@pytest.mark.checks("eq-knn_entropy-ball-recursion", how="exact")
@pytest.mark.checks("eq-knn_entropy-ball", how="exact")
def test_volume_slice_by_slice():
    for p in [mp.mpf(1), mp.mpf(2), mp.mpf(3), *random_numbers(1, 5, 3, 5)]:
        volume = mp.mpf(2)
        for d in range(2, 7):
            slices = 2 * mp.quad(lambda t, p=p, d=d: (1 - t**p) ** ((d - 1) / p), [0, 0.5, 1])
            assert same(slices, 2 / p * mp.beta(1 / p, (d - 1) / p + 1))
            assert same(slices, 2 * mp.gamma(1 + 1 / p) * mp.gamma(1 + (d - 1) / p) / mp.gamma(1 + d / p))
            volume *= slices
            assert same(volume, mp_volume(d, p))
            assert log_unit_ball_volume(d, float(p)) == pytest.approx(float(mp.log(volume)), abs=1e-12)


@pytest.mark.checks("eq-knn_entropy-ball-special", how="symbolic")
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
def test_volumes_that_are_used_most(d):
    t, r = sp.symbols("t r", positive=True)
    simplex = sp.Integer(1)  # the corner x_1 + ... + x_d <= t of the cube, by iterated integration
    for _ in range(d):
        simplex = sp.integrate(simplex.subs(t, r), (r, 0, t))
    assert 2**d * simplex.subs(t, 1) == sp.Integer(2) ** d / sp.factorial(d)
    ball = [2, sp.pi, 4 * sp.pi / 3, sp.pi**2 / 2, 8 * sp.pi**2 / 15][d - 1]
    assert sp.simplify(sp.pi ** sp.Rational(d, 2) / sp.gamma(1 + sp.Rational(d, 2)) - ball) == 0
    for p, volume in ((1, sp.Integer(2) ** d / sp.factorial(d)), (2, ball), (math.inf, 2**d)):
        assert log_unit_ball_volume(d, p) == pytest.approx(float(sp.log(volume)), abs=1e-12)


@pytest.mark.checks("eq-knn_entropy-ball-special", how="exact")
def test_growth_of_the_euclidean_volume():
    for d in (10**4, 10**8):
        log_volume = mp.mpf(d) / 2 * mp.log(mp.pi) - mp.loggamma(1 + mp.mpf(d) / 2)
        assert abs(log_volume - mp.mpf(d) / 2 * mp.log(2 * mp.pi * mp.e / d) + mp.log(mp.pi * d) / 2) < mp.mpf(1) / d


# The estimate


@pytest.mark.checks("eq-knn_entropy-decomposition", how="exact")
@pytest.mark.parametrize("k", [1, 3])
def test_noise_and_error_add_up(k):
    """On a normal sample, whose masses are known."""
    n = 7
    x = random_numbers(-2, 2, n, k)
    values = knn_local_entropy(torch.tensor([[float(v)] for v in x], dtype=torch.float64), k)
    for i, value in enumerate(values):
        eps = sorted(abs(x[i] - x[j]) for j in range(n) if j != i)[k - 1]
        density, mass = mp.npdf(x[i]), mp.ncdf(x[i] + eps) - mp.ncdf(x[i] - eps)
        local = mp.psi(0, n) - mp.psi(0, k) + mp.log(2) + mp.log(eps)
        noise = mp.log(mass) - (mp.psi(0, k) - mp.psi(0, n))
        assert same(local + mp.log(density), noise - mp.log(mass / (density * 2 * eps)))
        assert float(value) == pytest.approx(float(local), abs=1e-12)


@pytest.mark.checks("eq-knn_entropy-local", how="statistical")
@pytest.mark.checks("eq-knn_entropy-estimator", how="statistical")
@pytest.mark.checks("eq-knn_entropy-edge", how="statistical")
@pytest.mark.parametrize(("n", "k"), [(6, 2), (5, 4), (12, 1)])
def test_estimate_on_an_interval_has_its_exact_mean(n, k):
    """A case in which bias and constant are known exactly, at sizes where every wrong constant shows."""
    rng = np.random.default_rng(n)
    estimates, first = [], []
    for _ in range(1200):
        x = torch.from_numpy(rng.random((n, 1)))
        local = knn_local_entropy(x, k)
        first.append(float(local[0]))
        estimates.append(float(knn_entropy(x, k)))
    expected = (2 * math.log(2) - 1) * k / n
    assert_z(estimates, expected)
    assert_z(first, expected)
    for wrong in (math.log(n - 1) - digamma(n), digamma(n + 1) - digamma(n), 1 / k, -math.log(2)):
        with pytest.raises(AssertionError):
            assert_z(np.array(estimates) + wrong, expected)


@pytest.mark.checks("eq-knn_entropy-edge", how="symbolic")
@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 2), (4, 3)])
def test_bias_at_an_edge(n, k):
    """In the order of the proof with SymPy, and numerically in the other order: first over the mass, then over u."""
    p, u = p_symbol, sp.symbols("u", positive=True)
    inner = sp.simplify(2 * sp.integrate(sp.log(2) + sp.log(p - u) - sp.log(p), (u, 0, p / 2)))
    assert sp.simplify(sp.expand_log(inner - (2 * sp.log(2) - 1) * p)) == 0
    assert sp.integrate(sp.expand(p * beta_density(p, n, k)), (p, 0, 1)) == sp.Rational(k, n)

    beta = mp.beta(k, n - k)

    def over_mass(u):
        f = lambda p: p ** (k - 1) * (1 - p) ** (n - k - 1) / beta * mp.log(2 * (1 - u / p))
        return mp.quad(f, [2 * u, 1])

    with mp.workdps(15):
        bias = mp.quad(lambda u: 2 * over_mass(u), [0, 0.02, 0.1, 0.5])
        assert same(bias, (2 * mp.log(2) - 1) * k / n, 10)


def torus_estimates(n, d, k, p, clouds, seed=0):
    x = np.random.default_rng(seed).random((clouds, n, d))
    eps = kth_distances(x, k, p, period=1.0)
    log_volume = log_unit_ball_volume(d, p)
    return digamma(n) - digamma(k) + log_volume + d * np.log(eps).mean(1)


@pytest.mark.checks("eq-knn_entropy-torus", how="statistical")
@pytest.mark.parametrize(("n", "d", "k"), [(2, 1, 1), (4, 3, 2), (6, 5, 5), (5, 12, 1)])
def test_no_bias_on_a_torus_in_the_maximum_norm_even_for_a_handful_of_points(n, d, k):
    estimates = torus_estimates(n, d, k, np.inf, 20_000, seed=n)
    assert_z(estimates, 0)
    with pytest.raises(AssertionError):
        assert_z(estimates - digamma(n) + math.log(n - 1), 0)


def test_bias_on_a_torus_in_other_norms_is_positive_and_bounded_by_the_event_that_a_ball_meets_itself():
    few, many = torus_estimates(3, 3, 2, 2, 8000), torus_estimates(60, 3, 2, 2, 800)
    assert few.mean() > 10 * few.std() / math.sqrt(len(few))
    assert_z(many, 0)
    assert stats.binom.cdf(1, 59, math.exp(log_unit_ball_volume(3)) / 8) < 1e-10


@pytest.mark.checks("eq-knn_entropy-scaling", how="exact")
@pytest.mark.parametrize("norm", [1, 2, mp.inf])
def test_scaling_and_shifting(norm):
    x = mp_points(6, 3, 7)
    a, *b = random_numbers(-3, 3, 4, 8)
    moved = [[a * u + v for u, v in zip(row, b, strict=True)] for row in x]
    assert same(mp_estimate(moved, 2, 0, norm), mp_estimate(x, 2, 0, norm) + 3 * mp.log(abs(a)))


@pytest.mark.checks("eq-knn_entropy-one", how="exact")
@pytest.mark.parametrize("n", [2, 3, 10, 100])
def test_constant_of_the_nearest_neighbour(n):
    harmonic = sum(mp.mpf(1) / j for j in range(1, n))
    assert same(mp.psi(0, n) + mp.euler, harmonic)
    x = mp_points(min(n, 10), 2, n)
    by_definition = mp_estimate(x, 1, mp.log(mp.pi))
    n = len(x)
    distances = [sorted(mp.hypot(a[0] - b[0], a[1] - b[1]) for b in x if b is not a)[0] for a in x]
    short = mp.mpf(2) / n * sum(map(mp.log, distances)) + mp.log(mp.pi) + sum(mp.mpf(1) / j for j in range(1, n))
    assert same(by_definition, short)
    assert fails(by_definition, short - harmonic + mp.log(n - 1) + mp.euler) or n == 2
    points = torch.tensor([[float(v) for v in row] for row in x], dtype=torch.float64)
    assert float(knn_entropy(points)) == pytest.approx(float(short), abs=1e-12)


@pytest.mark.checks("eq-knn_entropy-psi", how="exact")
def test_digamma_against_logarithms():
    for n in random_numbers(3000, 10000, 3, 6):
        x = n - mp.mpf(1) / 2
        remainder = mp.psi(0, n) - mp.log(x) - 1 / (24 * x**2) + 7 / (960 * x**4)
        assert abs(remainder * x**6 - mp.mpf(31) / 8064) < 1e-6  # the next term, so nothing is missing before it
        m = n - 1
        remainder = mp.psi(0, n) - mp.log(m) - 1 / (2 * m) + 1 / (12 * m**2)
        assert abs(remainder * m**4 - mp.mpf(1) / 120) < 1e-6
    assert abs(mp.psi(0, 100) - mp.log(99) - 0.005042) < 1e-6
    assert abs(mp.psi(0, 10) - mp.log(9)) > 10 * abs(mp.psi(0, 100) - mp.log(99))


@pytest.mark.checks("eq-knn_entropy-diameter", how="symbolic")
def test_radius_and_diameter():
    v, e, d = sp.symbols("V epsilon d", positive=True)
    radius, diameter = sp.log(v) + d * sp.log(e), sp.log(v / 2**d) + d * sp.log(2 * e)
    assert sp.simplify(sp.expand_log(radius - diameter)) == 0
    mixed = sp.log(v) + d * sp.log(2 * e)
    assert sp.simplify(sp.expand_log(mixed - radius)) == d * sp.log(2)


def test_mixing_radius_and_diameter_costs_d_log_2_on_data():
    x = np.random.default_rng(2).standard_normal((400, 5))
    eps = KDTree(x).query(x, k=[4])[0][:, 0]
    constant = digamma(400) - digamma(3) + log_unit_ball_volume(5)
    right, mixed = constant + 5 * np.log(eps).mean(), constant + 5 * np.log(2 * eps).mean()
    assert float(knn_entropy(torch.from_numpy(x), 3)) == pytest.approx(right, abs=1e-10)
    assert mixed - right == pytest.approx(5 * math.log(2), abs=1e-12)
    assert abs(right - 2.5 * math.log(2 * math.pi * math.e)) < 1 < abs(mixed - 2.5 * math.log(2 * math.pi * math.e))


# Bias


def ball_second_moment(d, p):
    """The closed form of the chapter, which the test below checks against integrals."""
    if p == np.inf:
        return 1 / mp.mpf(3)
    p = mp.mpf(p)
    return mp.gamma(3 / p) * mp.gamma(1 + d / p) / mp.gamma(1 / p) / mp.gamma(1 + (d + 2) / p)


@pytest.mark.checks("eq-knn_entropy-second-moment", how="exact")
def test_second_moment_of_the_ball():
    for p, d in zip([mp.mpf(1), mp.mpf(2), *random_numbers(1, 5, 4, 9)], range(1, 7), strict=True):
        weight = lambda t, p=p, d=d: (1 - t**p) ** ((d - 1) / p)  # volume of the slice at height t
        moment = mp.quad(lambda t: t * t * weight(t), [0, 0.5, 1]) / mp.quad(weight, [0, 0.5, 1])
        assert same(moment, ball_second_moment(d, p), 25)
    for d in range(1, 9):
        assert same(ball_second_moment(d, 2), 1 / mp.mpf(d + 2))
        assert abs(ball_second_moment(d, mp.mpf(10) ** 12) - mp.mpf(1) / 3) < 1e-10


@pytest.mark.checks("eq-knn_entropy-expansion", how="exact")
@pytest.mark.parametrize(("d", "p"), [(3, 2), (3, np.inf), (2, 3.3), (1, 2)])
def test_mass_of_a_small_ball(d, p):
    """For f proportional to exp(b x_1), whose Laplacian is b^2 f, the ball around 0 is a one-dimensional integral."""
    (b,) = random_numbers(1, 2, 1, d)
    r = mp.mpf(10) ** -5
    if p == np.inf:
        mass, volume = (2 * r) ** (d - 1) * 2 * mp.sinh(b * r) / b, mp.mpf(2) ** d
    else:
        volume = mp_volume(d, p)
        slice_volume = mp.mpf(1) if d == 1 else mp_volume(d - 1, p)
        width = lambda u: slice_volume * (1 - u**p) ** ((d - 1) / mp.mpf(p))
        mass = r**d * mp.quad(lambda u: width(u) * 2 * mp.cosh(b * r * u), [0, 0.5, 1])
    second = (mass / (volume * r**d) - 1) / r**2
    assert abs(second - ball_second_moment(d, p) / 2 * b**2) < 1e-8  # the rest is of order r^2
    assert abs(second) > 0.05


def wavy_integrals(nodes=400):
    """Integrals of f = 1 + cos(2 pi x) / 2 on the circle; the trapezoidal rule is exact to all digits there."""
    x = [mp.mpf(i) / nodes for i in range(nodes)]
    f = [1 + mp.cos(2 * mp.pi * t) / 2 for t in x]
    first = [-mp.pi * mp.sin(2 * mp.pi * t) for t in x]
    second = [-2 * mp.pi**2 * mp.cos(2 * mp.pi * t) for t in x]
    return f, first, second, lambda values: sum(values) / nodes


@pytest.mark.checks("eq-knn_entropy-bias-sign", how="exact")
@pytest.mark.parametrize("d", [1, 3, 7])
def test_sign_of_the_leading_bias(d):
    """For the product density prod_j f(x_j) on the torus, both sides separate into integrals over the circle."""
    f, first, second, mean = wavy_integrals()
    q = -mp.mpf(2) / d
    rest = mean([u ** (1 + q) for u in f]) ** (d - 1)
    left = d * mean([s * u**q for s, u in zip(second, f, strict=True)]) * rest
    right = mp.mpf(2) / d * d * mean([g**2 * u ** (q - 1) for g, u in zip(first, f, strict=True)]) * rest
    expected = mp.mpf(2) / d * d * mean([(g / u) ** 2 * u * u**q for g, u in zip(first, f, strict=True)]) * rest
    assert same(left, right) and same(right, expected) and right > 0


@pytest.mark.checks("eq-knn_entropy-bias-sign", how="symbolic")
def test_integration_by_parts_behind_the_sign():
    """The difference of the integrands is a divergence."""
    x, y, d = sp.symbols("x y d", positive=True)
    f = sp.Function("f")(x, y)
    q = 2 / d
    laplacian = sp.diff(f, x, 2) + sp.diff(f, y, 2)
    squared = sp.diff(f, x) ** 2 + sp.diff(f, y) ** 2
    divergence = sum(sp.diff(f**-q * sp.diff(f, v), v) for v in (x, y))
    assert sp.simplify(laplacian * f**-q - q * squared * f ** (-q - 1) - divergence) == 0


def leading_bias(n, d, k, p):
    """Of the product density with factors 1 + cos(2 pi x) / 2 on the torus."""
    f, _, second, mean = wavy_integrals(100)
    q = -mp.mpf(2) / d
    integral = d * mean([s * u**q for s, u in zip(second, f, strict=True)])
    integral *= mean([u ** (1 + q) for u in f]) ** (d - 1)
    volume = mp.exp(log_unit_ball_volume(d, p))
    gammas = mp.gammaprod([k + mp.mpf(2) / d, n], [k, n + mp.mpf(2) / d])
    return float(-ball_second_moment(d, p) / 2 / volume ** (mp.mpf(2) / d) * gammas * integral)


def wavy_sample(size, rng):
    """Independent values from the density 1 + cos(2 pi x) / 2, by rejection."""
    x = rng.random(3 * size + 200)
    kept = x[1.5 * rng.random(len(x)) < 1 + np.cos(2 * np.pi * x) / 2]
    return kept[:size]


@pytest.mark.checks("eq-knn_entropy-bias", how="statistical")
@pytest.mark.parametrize(("p", "clouds"), [(2, 500), (np.inf, 400)])
def test_leading_bias_of_the_whole_estimate(p, clouds):
    """500 points on the 3-torus, neighbours by k-d tree; -mean log f is subtracted, which has the mean H."""
    n, d, k = 500, 3, 3
    rng = np.random.default_rng(12)
    errors = []
    for _ in range(clouds):
        x = wavy_sample(n * d, rng).reshape(n, d)
        eps = KDTree(x, boxsize=1.0).query(x, k=[k + 1], p=p)[0]
        estimate = digamma(n) - digamma(k) + log_unit_ball_volume(d, p) + d * np.log(eps).mean()
        errors.append(estimate + np.log(1 + np.cos(2 * np.pi * x) / 2).sum(1).mean())
    assert_z(errors, leading_bias(n, d, k, p))
    with pytest.raises(AssertionError):
        assert_z(errors, 0)
    with pytest.raises(AssertionError):
        assert_z(errors, -leading_bias(n, d, k, p))


@pytest.mark.checks("eq-knn_entropy-bias", how="statistical")
def test_leading_bias_with_the_noise_removed():
    """Masses drawn from their Beta law and radii solved for: the noise drops out, so n can be large."""
    n, d, k, size = 20_000, 3, 3, 100_000
    rng = np.random.default_rng(3)
    x = wavy_sample(size * d, rng).reshape(size, d)
    mass = rng.beta(k, n - k, size)
    low, high = np.zeros(size), np.full(size, 0.5)
    for _ in range(60):  # bisection; the mass of the cube is a product of integrals
        r = (low + high) / 2
        inside = (2 * r[:, None] + np.cos(2 * np.pi * x) * np.sin(2 * np.pi * r[:, None]) / (2 * np.pi)).prod(1)
        low, high = np.where(inside < mass, r, low), np.where(inside < mass, high, r)
    density = (1 + np.cos(2 * np.pi * x) / 2).prod(1)
    values = -np.log(mass / (density * (2 * r) ** d))
    expected = leading_bias(n, d, k, np.inf)
    assert_z(values, expected)
    assert values.std() / math.sqrt(size) < 0.15 * abs(expected)


@pytest.mark.checks("eq-knn_entropy-bias-gaussian", how="exact")
def test_bias_integral_of_the_normal_density():
    """Integrated over the radius from the Laplacian itself; nothing forces d to be an integer."""
    for d in [mp.mpf(3), mp.mpf(8), *random_numbers(2.5, 20, 3, 10)]:
        sphere = 2 * mp.pi ** (d / 2) / mp.gamma(d / 2)
        log_density = lambda r, d=d: -r * r / 2 - d / 2 * mp.log(2 * mp.pi)
        integrand = lambda r, d=d, g=log_density: r ** (d - 1) * (r * r - d) * mp.exp((1 - 2 / d) * g(r))
        integral = sphere * mp.quad(integrand, [0, 1, 3, 6, 12, 25, 50, 120])
        assert same(integral, 4 * mp.pi * (d / (d - 2)) ** (d / 2 + 1), 20)


@pytest.mark.checks("eq-knn_entropy-bias-ratio", how="exact")
def test_euclidean_ball_against_cube():
    ratios = []
    for d in [1, 2, 4, 8, 16, 64, 10**3, 10**7]:
        log_volume = mp.mpf(d) / 2 * mp.log(mp.pi) - mp.loggamma(1 + mp.mpf(d) / 2)
        volume_power = mp.exp(2 * log_volume / d)
        cube = ball_second_moment(d, np.inf) / 4
        ratio = 1 / mp.mpf(d + 2) / volume_power / cube
        assert same(ratio, 12 / ((d + 2) * volume_power))
        ratios.append(ratio)
    assert ratios[0] == pytest.approx(1, abs=1e-30)
    assert all(later < earlier for earlier, later in itertools.pairwise(ratios))
    assert abs(ratios[-1] - 12 / (2 * mp.pi * mp.e)) < 1e-5 and abs(12 / (2 * mp.pi * mp.e) - 0.7026) < 1e-4


def expected_largest(count, k):
    """Mean of the k-th largest of `count` independent standard normal variables."""
    density = lambda t: count * math.comb(count - 1, k - 1) * mp.npdf(t)
    with mp.workdps(15):
        integrand = lambda t: t * density(t) * mp.ncdf(t) ** (count - k) * (1 - mp.ncdf(t)) ** (k - 1)
        return float(mp.quad(integrand, [-9, -3, 0, 3, 9]))


def test_largest_of_a_few_normal_variables():
    assert expected_largest(2, 1) == pytest.approx(1 / math.sqrt(math.pi))
    assert expected_largest(5, 3) == pytest.approx(0, abs=1e-12)


@pytest.mark.checks("eq-knn_entropy-highd", how="statistical")
@pytest.mark.parametrize("shape", ["normal", "uniform", "signs", "exponential"])
def test_limit_in_high_dimension(shape):
    n, d, clouds = 6, 20_000, 200
    rng = np.random.default_rng(4)
    draw, kappa = {
        "normal": (lambda: rng.standard_normal((n, d), dtype=np.float32), 3),
        "uniform": (lambda: math.sqrt(12) * (rng.random((n, d), dtype=np.float32) - np.float32(0.5)), 9 / 5),
        "signs": (lambda: 2 * rng.integers(0, 2, (n, d), dtype=np.int8).astype(np.float32) - 1, 1),
        "exponential": (lambda: rng.standard_exponential((n, d), dtype=np.float32) - 1, 9),
    }[shape]
    values = {1: [], 2: []}
    for _ in range(clouds):
        x = torch.from_numpy(draw())
        squared = np.sort(torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").double().numpy() ** 2, axis=1)
        for k in values:
            values[k].append(math.sqrt(d) / 2 * np.log(squared[:, k] / (2 * d)).mean())
    for k in values:
        assert_z(values[k], -math.sqrt(kappa + 3) / 4 * expected_largest(n - 1, k))
    if shape in ("signs", "exponential"):
        with pytest.raises(AssertionError):
            assert_z(values[1], -math.sqrt(6) / 4 * expected_largest(n - 1, 1))


@pytest.mark.checks("eq-knn_entropy-kurtosis", how="symbolic")
def test_spread_of_squared_differences():
    """By enumeration, for variables with two and three atoms, mean 0 and variance 1."""
    a, t = sp.symbols("a t", positive=True)
    three = {a: 1 / (2 * a**2), -a: 1 / (2 * a**2), sp.Integer(0): 1 - 1 / a**2}
    two = {1 / t: t**2 / (1 + t**2), -t: 1 / (1 + t**2)}  # with a third moment
    for atoms in (three, two):

        def mean(g, atoms=atoms):
            points = itertools.product(atoms.items(), repeat=3)
            return sp.simplify(sum(g(x, y, z) * s * t * u for (x, s), (y, t), (z, u) in points))

        kappa = mean(lambda x, y, z: x**4)
        assert mean(lambda x, y, z: x) == 0 and mean(lambda x, y, z: x**2) == 1
        assert mean(lambda x, y, z: (x - y) ** 2) == 2
        assert sp.simplify(mean(lambda x, y, z: (x - y) ** 4) - 4 - 2 * (kappa + 1)) == 0
        assert sp.simplify(mean(lambda x, y, z: (x - y) ** 2 * (x - z) ** 2) - 4 - (kappa - 1)) == 0


@pytest.mark.checks("eq-knn_entropy-highd-constant", how="exact")
def test_constant_in_high_dimension():
    for d in (mp.mpf(10) ** 3, mp.mpf(10) ** 9):
        log_volume = d / 2 * mp.log(mp.pi) - mp.loggamma(1 + d / 2)
        left = log_volume + d / 2 * mp.log(2 * d) - d / 2 * mp.log(2 * mp.pi * mp.e)
        assert abs(left - d / 2 * mp.log(2) + mp.log(mp.pi * d) / 2) < 1 / d


# Variance


@pytest.mark.checks("eq-knn_entropy-shared", how="exact")
def test_covariance_of_points_that_share_an_arc():
    """Given the shared arc e the two are independent with mean -gamma - E1(e), so the covariance is Var E1(e)."""
    first = mp.quad(lambda e: mp.exp(-e) * mp.e1(e), [0, 0.01, 0.1, 1, 5, 20, 100])
    second = mp.quad(lambda e: mp.exp(-e) * mp.e1(e) ** 2, [0, 0.01, 0.1, 1, 5, 20, 100])
    by_conditioning = second - first**2
    closed = 2 * (mp.pi**2 / 12 + mp.polylog(2, mp.mpf(-1) / 2))
    assert same(by_conditioning, closed, 25)
    single = 2 * mp.quad(lambda u: mp.log((2 + 2 * u) / (2 + u)) / u, [0, 0.5, 1])
    assert same(single, closed, 25)
    for u in random_numbers(0.1, 0.9, 2, 11):  # Frullani
        integrand = lambda t, u=u: (mp.exp(-(u + 2) * t) - mp.exp(-(2 * u + 2) * t)) / t
        assert same(mp.quad(integrand, [0, 1, 5, 20, 100]), mp.log((2 + 2 * u) / (2 + u)), 25)
    for c in (mp.mpf(1), mp.mpf(1) / 2):
        assert same(mp.quad(lambda u, c=c: mp.log(1 + c * u) / u, [0, 0.5, 1]), -mp.polylog(2, -c), 25)


@pytest.mark.checks("eq-knn_entropy-circle", how="statistical")
@pytest.mark.parametrize(("n", "clouds"), [(3, 20_000), (5, 20_000), (40, 3000)])
def test_variance_on_the_circle(n, clouds):
    """The mean is 0 exactly, so the variance is the mean square."""
    estimates = torus_estimates(n, 1, 1, np.inf, clouds, seed=n)
    variance = (math.pi**2 / 2 + 4 * float(mp.polylog(2, -0.5))) / n - float(mp.psi(1, n))
    assert_z(estimates**2, variance)
    with pytest.raises(AssertionError):
        assert_z(estimates**2, (math.pi**2 / 6) / n)  # as if the values were independent


@pytest.mark.checks("eq-knn_entropy-circle", how="exact")
def test_variance_on_a_large_circle():
    limit = mp.pi**2 / 2 + 4 * mp.polylog(2, mp.mpf(-1) / 2) - 1
    n = mp.mpf(10) ** 12
    assert abs(n * ((limit + 1) / n - mp.psi(1, n)) - limit) < 1e-11
    assert abs(limit - mp.mpf("2.1411")) < 1e-4


# Two samples


@pytest.mark.checks("eq-knn_entropy-cross", how="statistical")
@pytest.mark.checks("eq-knn_entropy-kl", how="statistical")
@pytest.mark.parametrize(("n", "m", "k"), [(4, 7, 2), (8, 3, 3), (3, 2, 1)])
def test_cross_entropy_and_divergence_have_no_bias_on_a_torus(n, m, k):
    k_own, d, clouds = min(k, n - 1), 2, 20_000
    rng = np.random.default_rng(n)
    x, y = rng.random((clouds, n, d)), rng.random((clouds, m, d))
    rho, eps = kth_distances(x, k, y=y, period=1.0), kth_distances(x, k_own, period=1.0)
    cross = digamma(m + 1) - digamma(k) + d * math.log(2) + d * np.log(rho).mean(1)
    assert_z(cross, 0)
    with pytest.raises(AssertionError):
        assert_z(cross + digamma(m) - digamma(m + 1), 0)
    if k == k_own:
        assert_z(d * np.log(rho / eps).mean(1) + digamma(m + 1) - digamma(n), 0)
        with pytest.raises(AssertionError):
            assert_z(d * np.log(rho / eps).mean(1) + digamma(m) - digamma(n), 0)


@pytest.mark.checks("eq-knn_entropy-cross", how="symbolic")
@pytest.mark.parametrize(("n", "k"), SMALL)
def test_law_of_the_mass_with_a_reference_sample(n, k):
    """With m = n - 1 reference points: at least k of all m in the ball, Beta(k, m - k + 1)."""
    m, p = n - 1, p_symbol
    at_least_k = sum(sp.binomial(m, j) * p**j * (1 - p) ** (m - j) for j in range(k, m + 1))
    mean = sum(c * monomial_integral(j, 1) for (j,), c in sp.Poly(sp.diff(at_least_k, p), p).terms())
    assert sp.simplify(mean - sp.digamma(k) + sp.digamma(m + 1)) == 0


@pytest.mark.checks("eq-knn_entropy-kl", how="exact")
def test_volume_drops_out_of_the_divergence():
    x, y = mp_points(4, 2, 12), mp_points(6, 2, 13)
    total = mp.mpf(0)
    for i, a in enumerate(x):
        rho = sorted(mp.hypot(a[0] - b[0], a[1] - b[1]) for b in y)[1]
        eps = sorted(mp.hypot(a[0] - b[0], a[1] - b[1]) for j, b in enumerate(x) if j != i)[1]
        total += mp.log(rho / eps)
    cross = mp.psi(0, 7) - mp.psi(0, 2) + mp.log(mp.pi)
    cross += sum(mp.log(sorted(mp.hypot(a[0] - b[0], a[1] - b[1]) for b in y)[1]) for a in x) / 2
    assert same(cross - mp_estimate(x, 2, mp.log(mp.pi)), total / 2 + mp.psi(0, 7) - mp.psi(0, 4))


# Gradient


def mp_gradient(function, points):
    """Numerical derivative of function(points) in every coordinate."""

    def at(i, j, value):
        moved = [row[:] for row in points]
        moved[i][j] = value
        return function(moved)

    return [
        [mp.diff(lambda v, i=i, j=j: at(i, j, v), points[i][j], h=mp.mpf(10) ** -20) for j in range(len(points[0]))]
        for i in range(len(points))
    ]


@pytest.mark.checks("eq-knn_entropy-gradient", how="exact")
@pytest.mark.checks("eq-knn_entropy-gradient-identities", how="exact")
@pytest.mark.parametrize("k", [1, 2])
def test_gradient(k):
    n, d = 6, 3
    x = mp_points(n, d, 20 + k)
    with mp.workdps(80):
        numerical = mp_gradient(lambda z: mp_estimate(z, k, 0), x)
    formula = [[mp.mpf(0)] * d for _ in range(n)]
    for i in range(n):
        squared = {j: sum((u - v) ** 2 for u, v in zip(x[i], x[j], strict=True)) for j in range(n) if j != i}
        chosen = sorted(squared, key=squared.get)[k - 1]
        for c in range(d):
            push = mp.mpf(d) / n * (x[i][c] - x[chosen][c]) / squared[chosen]
            formula[i][c] += push
            formula[chosen][c] -= push
    assert all(same(a, b) for r, s in zip(numerical, formula, strict=True) for a, b in zip(r, s, strict=True))
    for c in range(d):
        assert same(sum(row[c] for row in numerical), 0)
    assert same(sum(x[i][c] * numerical[i][c] for i in range(n) for c in range(d)), d)
    points = torch.tensor([[float(v) for v in row] for row in x], dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(knn_entropy(points, k), points)
    torch.testing.assert_close(gradient, torch.tensor([[float(v) for v in row] for row in formula]).double())


@pytest.mark.checks("eq-knn_entropy-gradient-identities", how="exact")
@pytest.mark.parametrize("norm", [1, mp.inf])
def test_identities_in_other_norms(norm):
    x = mp_points(5, 3, 30)
    with mp.workdps(80):
        gradient = mp_gradient(lambda z: mp_estimate(z, 2, 0, norm), x)
    assert all(same(sum(row[c] for row in gradient), 0) for c in range(3))
    assert same(sum(x[i][c] * gradient[i][c] for i in range(5) for c in range(3)), 3)


# The estimate ranks wrongly


def normalised(n, d, seed):
    x = np.random.default_rng(seed).standard_normal((n, d))
    return (x - x.mean(0)) / x.std(0)


def simplex(n, d):
    """Equidistant points, n <= d + 1, with mean 0 and mean square radius d."""
    x = np.zeros((n, d))
    x[:, : n - 1] = np.linalg.svd(np.eye(n) - 1 / n)[0][:, : n - 1]
    return x * math.sqrt(n * d / (x**2).sum())


@pytest.mark.checks("eq-knn_entropy-pairs", how="symbolic")
def test_sum_over_pairs():
    n, d = 4, 2
    z = [sp.symbols(f"z{i}_:{d}") for i in range(n)]
    pairs = sum((a - b) ** 2 for u in z for v in z for a, b in zip(u, v, strict=True))
    squares = sum(a**2 for u in z for a in u)
    total = sum(sum(u[c] for u in z) ** 2 for c in range(d))
    assert sp.expand(pairs - 2 * n * squares + 2 * total) == 0
    # With sum 0 and sum of squares n d this is 2 n^2 d, as for this batch:
    x = normalised(7, 3, 1)
    assert ((x[:, None] - x) ** 2).sum() == pytest.approx(2 * 7**2 * 3)


@pytest.mark.checks("eq-knn_entropy-bound", how="exact")
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 2), (4, 3), (5, 4)])
def test_simplex_reaches_the_bound(n, d):
    """A regular simplex in exact coordinates: the corners e_i - 1/n, whose distances are sqrt(2)."""
    scale = mp.sqrt(mp.mpf(n * d) / (n - 1))
    corners = [[scale * ((i == j) - mp.mpf(1) / n) for j in range(n)] for i in range(n)]
    assert same(sum(v * v for row in corners for v in row), n * d)
    assert all(same(sum(v * v for v in row), d) for row in corners)
    # The corners lie in n - 1 dimensions of R^n; distances do not see the extra one, but the factor d does.
    log_distances = sum(
        mp.log(min(mp.norm([u - v for u, v in zip(a, b, strict=True)]) for b in corners if b is not a)) for a in corners
    )
    value = mp.psi(0, n) - mp.psi(0, 1) + mp.log(mp_volume(d, 2)) + mp.mpf(d) / n * log_distances
    bound = mp.psi(0, n) - mp.psi(0, 1) + mp.log(mp_volume(d, 2)) + mp.mpf(d) / 2 * mp.log(mp.mpf(2 * n * d) / (n - 1))
    assert same(value, bound)
    assert knn_entropy_bound(n, d) == pytest.approx(float(bound), abs=1e-12)
    assert bound > mp.mpf(d) / 2 * mp.log(2 * mp.pi * mp.e)


def with_unit_variances(x):
    """The rotation of the proof: a coordinate below variance 1 and one above are turned until the first has 1."""
    x = x.copy()
    d = x.shape[1]
    for _ in range(d - 1):
        variance = (x**2).mean(0)
        low, high = variance.argmin(), variance.argmax()
        if variance[high] - variance[low] < 1e-12:
            break
        left, right = 0.0, math.pi / 2
        for _ in range(80):
            angle = (left + right) / 2
            turned = math.cos(angle) * x[:, low] + math.sin(angle) * x[:, high]
            left, right = (angle, right) if (turned**2).mean() < 1 else (left, angle)
        x[:, low], x[:, high] = turned, math.cos(angle) * x[:, high] - math.sin(angle) * x[:, low]
    return x


@pytest.mark.parametrize(("n", "d"), [(4, 3), (9, 16), (17, 16), (100, 128)])
def test_batch_norm_lets_a_simplex_pass(n, d):
    x = with_unit_variances(simplex(n, d))
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose((x**2).mean(0), 1, atol=1e-6)
    np.testing.assert_allclose((x**2).sum(1), d, rtol=1e-9)
    value = float(knn_entropy(torch.from_numpy(x)))
    assert value == pytest.approx(knn_entropy_bound(n, d), abs=1e-6)
    moved = x.copy()
    moved[0] += 0.01 * np.arange(d) / d  # no other batch with these moments reaches it
    moved = moved - moved.mean(0)
    moved *= math.sqrt(n * d / (moved**2).sum())
    assert float(knn_entropy(torch.from_numpy(moved))) < knn_entropy_bound(n, d) - 1e-7


def test_excess_at_the_size_of_a_published_setting():
    assert knn_entropy_bound(100, 128) - 64 * math.log(2 * math.pi * math.e) == pytest.approx(47.18, abs=0.01)
    assert knn_entropy_bound(17, 16) - 8 * math.log(2 * math.pi * math.e) == pytest.approx(7.44, abs=0.01)


@pytest.mark.checks("eq-knn_entropy-bound-k", how="exact")
@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 12), d=st.integers(1, 6), k=st.integers(1, 11), seed=st.integers(0, 1000))
def test_bound_for_any_neighbour(n, d, k, seed):
    k = min(k, n - 1)
    with mp.workdps(DIGITS):
        points = mp_points(n, d, seed)
        means = [sum(row[c] for row in points) / n for c in range(d)]
        centred = [[row[c] - means[c] for c in range(d)] for row in points]
        scale = mp.sqrt(mp.mpf(n * d) / sum(v * v for row in centred for v in row))
        value = mp_estimate([[scale * v for v in row] for row in centred], k, mp.log(mp_volume(d, 2)))
        constant = mp.psi(0, n) - mp.psi(0, k) + mp.log(mp_volume(d, 2))
        assert value <= constant + mp.mpf(d) / 2 * mp.log(mp.mpf(2 * n * d) / (n - k)) + mp.mpf(10) ** -25


def test_bound_for_other_neighbours_is_not_idle():
    """At k = n - 1 and two clusters it is within d log 2 / 2; a bound with n in the place of n - k would be broken."""
    n = 8
    x = np.repeat([[-1.0], [1.0]], n // 2, axis=0) + 1e-6 * np.arange(n)[:, None]
    x = (x - x.mean(0)) / x.std(0)
    value = float(knn_entropy(torch.from_numpy(x), n // 2))
    constant = digamma(n) - digamma(n // 2) + math.log(2)
    assert constant + 0.5 * math.log(2 * n / n) < value <= constant + 0.5 * math.log(2 * n / (n - n // 2)) + 1e-9


@pytest.mark.checks("eq-knn_entropy-excess", how="exact")
def test_excess_of_the_simplex():
    gauss = mp.log(2 * mp.pi * mp.e)
    for d in (10, 10**5, 10**9):
        e = mp.mpf(d)
        log_volume = e / 2 * mp.log(mp.pi) - mp.loggamma(1 + e / 2)
        excess = mp.psi(0, e + 1) + mp.euler + log_volume + e / 2 * mp.log(2 * (e + 1)) - e / 2 * gauss
        limit = e / 2 * mp.log(2) + mp.log(e) / 2 - mp.log(mp.pi) / 2 + mp.mpf(1) / 2 + mp.euler
        assert abs(excess - limit) < 1 / e
        if d < 1000:
            assert float(excess) == pytest.approx(knn_entropy_bound(d + 1, d) - d / 2 * float(gauss), abs=1e-10)


def test_estimate_prefers_atoms_to_the_normal_density_in_high_dimension_and_not_in_low():
    rng = np.random.default_rng(5)

    def difference(d):
        values = []
        for _ in range(30):
            signs = rng.choice([-1.0, 1.0], (100, d)) + 0.05 * rng.standard_normal((100, d))
            normal = rng.standard_normal((100, d))
            a, b = (float(knn_entropy(torch.from_numpy((x - x.mean(0)) / x.std(0)))) for x in (signs, normal))
            values.append(a - b)
        return np.mean(values) / (np.std(values) / math.sqrt(30))

    assert difference(2) < -20 and difference(64) > 8  # in standard errors; the true difference is negative in both


def mean_length(d):
    """Mean length of a standard normal vector."""
    return math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))


def squeezed(x, s):
    """Normal vectors (..., d) with the spread of their lengths multiplied by about s; covariance I all the same."""
    d = x.shape[-1]
    mu, length = mean_length(d), x.norm(dim=-1, keepdim=True)
    scale = math.sqrt(d / (mu**2 + s**2 * (d - mu**2)))
    return scale * (mu + s * (length - mu)) * x / length


@pytest.mark.checks("eq-knn_entropy-radial", how="exact")
@pytest.mark.parametrize(("d", "s"), [(2, "0.9"), (5, "0.4"), (8, "0.7")])
def test_entropy_of_squeezed_lengths(d, s):
    """The left side from the density of the squeezed vector itself, the right side from the normal length alone."""
    s, mu = mp.mpf(s), mp.sqrt(2) * mp.gamma(mp.mpf(d + 1) / 2) / mp.gamma(mp.mpf(d) / 2)
    a = mp.sqrt(d / (mu**2 + s**2 * (d - mu**2)))
    sphere = 2 * mp.pi ** (mp.mpf(d) / 2) / mp.gamma(mp.mpf(d) / 2)
    length_density = lambda r: r ** (d - 1) * mp.exp(-r * r / 2) * 2 / (2 ** (mp.mpf(d) / 2) * mp.gamma(mp.mpf(d) / 2))
    knots = [0, mp.mpf(1) / 2, 1, 2, 3, 4, 6, 9, 14]
    image = lambda r: a * (mu + s * (r - mu))
    moved = [image(r) for r in knots]
    density = lambda q: length_density(mu + (q / a - mu) / s) / (a * s)  # of the squeezed length
    left = mp.quad(lambda q: -density(q) * mp.log(density(q) / (sphere * q ** (d - 1))), moved)
    assert same(mp.quad(lambda q: q * q * density(q), moved), d, 20)  # so the covariance is I
    stretch = mp.quad(lambda r: length_density(r) * mp.log(image(r) / r), knots)
    right = mp.mpf(d) / 2 * mp.log(2 * mp.pi * mp.e) + mp.log(a * s) + (d - 1) * stretch
    assert same(left, right, 18)
    assert left < mp.mpf(d) / 2 * mp.log(2 * mp.pi * mp.e) - mp.mpf("0.009"), "less than the normal density has"
    x = torch.randn(1000, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    expected = torch.tensor([float(image(mp.mpf(float(r)))) for r in x.norm(dim=1)[:5]], dtype=torch.float64)
    torch.testing.assert_close(squeezed(x, float(s)).norm(dim=1)[:5], expected)


@pytest.mark.parametrize("d", [1, 2, 3, 8, 60])
def test_the_entropy_of_squeezed_lengths_falls_with_their_spread(d):
    """For d = 2 and more by the steps of the proof as well: Jensen's bound of E 1/(R + c) and what it leaves."""
    with mp.workdps(20):
        mu = mp.sqrt(2) * mp.gamma(mp.mpf(d + 1) / 2) / mp.gamma(mp.mpf(d) / 2)
        norm = 2 ** (mp.mpf(d) / 2 - 1) * mp.gamma(mp.mpf(d) / 2)
        knots = [0, *(mu + mp.mpf(t) for t in (-4, -2, 0, 2, 4, 9) if mu + t > 0)]
        mean = lambda f: mp.quad(lambda r: f(r) * r ** (d - 1) * mp.exp(-r * r / 2) / norm, knots)
        entropies = []  # less that of the normal density
        for s in map(mp.mpf, ("0.02", "0.1", "0.3", "0.5", "0.7", "0.9", "0.99", "1")):
            a = mp.sqrt(d / (mu**2 + s**2 * (d - mu**2)))
            stretch = mean(lambda r, s=s, a=a: mp.log(a * (mu + s * (r - mu)) / r)) if d > 1 else 0
            entropies.append(mp.log(a * s) + (d - 1) * stretch)
            c = (1 - s) * mu / s
            if d > 1 and c > 0:
                inverse = mean(lambda r, c=c: 1 / (r + c))
                assert inverse < mu / (d - 1 + c * mu)
                assert (d - 1) * inverse < d * (mu + c) / (d + 2 * c * mu + c * c)  # the derivative is negative
        assert all(low < high for low, high in itertools.pairwise(entropies))
        assert abs(entropies[-1]) < 1e-12 and entropies[0] < -3
        if d == 8:
            assert [round(float(entropies[j]), 2) for j in (1, 3, 5)] == [-1.82, -0.33, -0.01]
    d, mu, c = sp.symbols("d mu c")
    left = d * (mu + c) * (d - 1 + c * mu) - (d - 1) * mu * (d + 2 * c * mu + c**2)
    assert sp.expand(left - c * (d * (d - 1) - (d - 2) * mu**2) - c**2 * mu) == 0


@pytest.mark.parametrize(("d", "s", "gain"), [(4, 0.98, 0.00085), (5, 0.95, 0.0046)])
def test_the_favourite_of_the_estimate_moves_before_one_can_see_it(d, s, gain):
    """Batches of 128 as below, two thousand of them: a gain of thousandths of a nat, many standard errors from 0."""
    generator = torch.Generator().manual_seed(d)
    values = []
    for _ in range(20):
        x = torch.randn(100, 128, d, generator=generator, dtype=torch.float64)
        estimates = []
        for y in (x, squeezed(x.flatten(0, 1), s).view_as(x)):
            y = (y - y.mean(1, keepdim=True)) / y.std(1, correction=0, keepdim=True)
            distances = torch.cdist(y, y)
            distances.diagonal(dim1=1, dim2=2).fill_(math.inf)
            estimates.append(d * distances.amin(2).log().mean(1))  # and constants
        values.append(estimates[1] - estimates[0])
    values = torch.cat(values)
    error = float(values.std()) / math.sqrt(len(values))
    assert float(values.mean()) > 6 * error
    assert float(values.mean()) == pytest.approx(gain, abs=4 * error)


def test_when_the_expected_estimate_leaves_the_normal_density():
    """Independent batches of 128, batch-normalised: from six dimensions on lengths that vary less are far ahead.

    Differences to the same batches unsqueezed, in standard errors of 150 batches. At 16 dimensions the sphere is
    ahead, at 8 a spread of seven tenths, and the sphere is level; the true entropy is lower in every case.
    """

    def differences(d, s):
        generator = torch.Generator().manual_seed(d)
        values = []
        for _ in range(150):
            x = torch.randn(128, d, generator=generator, dtype=torch.float64)
            two = (x, squeezed(x, s))
            first, second = (float(knn_entropy((y - y.mean(0)) / y.std(0, correction=0))) for y in two)
            values.append(second - first)
        mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
        return mean, mean / error

    assert all(differences(4, s)[1] < -6 for s in (0, 0.7, 0.85)), "four dimensions: the normal density is better"
    assert differences(6, 0.85)[1] > 4 and differences(6, 0)[1] < -10
    assert differences(8, 0.7)[1] > 10 and abs(differences(8, 0)[0]) < 0.05
    assert differences(16, 0)[0] == pytest.approx(0.6, abs=0.05)
    assert differences(16, 0)[0] > differences(16, 0.7)[0] > 0.2


def test_an_ascent_of_free_points_in_eight_dimensions_leaves_the_normal_law_of_the_lengths():
    """1,000 points in batches of 128, from a normal sample: the spread of the squared length is halved."""
    generator, d = torch.Generator().manual_seed(11), 8
    x = torch.randn(1000, d, generator=generator)
    spread = lambda x: float((x**2).sum(1).std()) / math.sqrt(2 * d)
    assert 0.9 < spread(x) < 1.1
    for _ in range(1000):
        chosen = torch.randperm(1000, generator=generator)[:128]
        points = x[chosen].requires_grad_()
        batch = (points - points.mean(0)) / points.std(0, correction=0)
        (force,) = torch.autograd.grad(knn_entropy(batch), points)
        force = force * 128 / d
        x[chosen] = x[chosen] + 0.1 * force * (3 / force.norm(dim=1, keepdim=True)).clamp_max(1)
        x = (x - x.mean(0)) / x.std(0, correction=0)
    assert spread(x) < 0.6
    assert max(stats.kstest(x[:, j].numpy(), "norm").statistic for j in range(d)) < 0.05, "no coordinate shows it"


@pytest.mark.parametrize(
    ("n", "width", "least", "most"), [(300, 0.05, 6, 7.5), (300, 0.3, 1.7, 2.2), (1000, 0.05, 0.9, 1.4)]
)
def test_the_bias_for_smooth_clusters_is_nats_where_that_for_the_normal_density_is_a_tenth(n, width, least, most):
    """Eight coordinates, each a mixture of normals about -1 and 1; the entropy by quadrature."""
    density = lambda z: (stats.norm.pdf(z, 1, width) + stats.norm.pdf(z, -1, width)) / 2
    z = np.linspace(-1 - 9 * width, 1 + 9 * width, 200_001)
    p = density(z)
    truth = -8 * np.trapezoid(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), z)
    rng = np.random.default_rng(6)
    bias, normal = [], []
    for _ in range(10):
        clusters = rng.choice([-1.0, 1.0], (n, 8)) + width * rng.standard_normal((n, 8))
        bias.append(float(knn_entropy(torch.from_numpy(clusters))) - truth)
        x = rng.standard_normal((n, 8))
        normal.append(float(knn_entropy(torch.from_numpy(x))) + stats.norm.logpdf(x).sum(1).mean())
    assert least < np.mean(bias) < most
    assert abs(np.mean(normal)) < 0.15


# Even spacing


def test_an_ascent_with_all_points_comes_near_the_lattice_and_may_stop_short_of_it():
    """36 points on a torus that the hexagonal lattice fits: patchworks are maxima too, far above any density."""
    side, steps = 6, 500
    n, period = side**2, torch.tensor([side, side * math.sqrt(3) / 2], dtype=torch.float64)
    constant = digamma(n) - digamma(1) + math.log(math.pi) - math.log(float(period.prod()))

    def estimate(x):
        gap = (x[:, None] - x) / period
        gap = (gap - gap.round()) * period
        return constant + (gap.square().sum(-1) + 99 * torch.eye(n)).amin(1).log().mean()

    lattice = torch.tensor([[i + 0.5 * (j % 2), j * math.sqrt(3) / 2] for i in range(side) for j in range(side)])
    bound = digamma(n) - math.log(n) + np.euler_gamma + math.log(4 * math.pi / math.sqrt(12))
    assert float(estimate(lattice.double())) == pytest.approx(bound, abs=1e-6)
    ends = []
    for seed in range(3):
        x = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * period
        optimizer = torch.optim.Adam([x.requires_grad_()], lr=0.2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
        for _ in range(steps):
            optimizer.zero_grad()
            (-estimate(x)).backward()
            optimizer.step()
            schedule.step()
        ends.append(float(estimate(x.detach())))
    assert all(1.6 < end <= bound + 1e-9 for end in ends), "the entropy of a density on this torus is at most 0"
    assert min(ends) < bound - 0.03


@pytest.mark.checks("eq-knn_entropy-lattice", how="exact")
def test_lattices():
    n, v = 12, mp.mpf(5) / 2
    constant = mp.psi(0, n) - mp.psi(0, 1)
    excess = lambda density, d: mp.log(v) + mp.psi(0, n) - mp.log(n) + mp.euler + mp.log(2**d * density)
    circle = [min(abs(i - j), n - abs(i - j)) * v / n for i in range(n) for j in range(n) if i != j]
    assert same(constant + mp.log(2) + mp.log(min(circle)), excess(mp.mpf(1), 1))
    # Hexagonal: the torus spanned by 4 and 3 steps along two directions at 60 degrees, scaled to volume v.
    step = mp.sqrt(v / (n * mp.sqrt(3) / 2))
    basis = [(mp.mpf(1), mp.mpf(0)), (mp.mpf(1) / 2, mp.sqrt(3) / 2)]
    distances = []
    for a, b in itertools.product(range(4), range(3)):
        if (a, b) == (0, 0):
            continue
        images = [
            mp.hypot(*(step * ((a + 4 * s) * basis[0][c] + (b + 3 * t) * basis[1][c]) for c in (0, 1)))
            for s in (-1, 0, 1)
            for t in (-1, 0, 1)
        ]
        distances.append(min(images))
    assert same(constant + mp.log(mp.pi) + 2 * mp.log(min(distances)), excess(mp.pi / mp.sqrt(12), 2))
    for density, d, printed in ((mp.mpf(1), 1, 1.27), (mp.pi / mp.sqrt(12), 2, 1.87), (mp.pi / 4, 2, 1.72)):
        assert abs(mp.euler + mp.log(2**d * density) - printed) < 0.005


@pytest.mark.checks("eq-knn_entropy-packing", how="exact")
@settings(max_examples=60, deadline=None)
@given(n=st.integers(3, 10), d=st.integers(1, 3), seed=st.integers(0, 1000))
def test_bound_by_packing(n, d, seed):
    """On the unit torus, v = 1; the largest excess found is that of the lattice on the circle."""
    with mp.workdps(DIGITS):
        x = [[(v + 1) / 2 for v in row] for row in mp_points(n, d, seed)]
        total = 0
        for i, a in enumerate(x):
            gaps = ([min(abs(u - w), 1 - abs(u - w)) for u, w in zip(a, b, strict=True)] for b in x[:i] + x[i + 1 :])
            total += mp.log(min(mp.norm(gap) for gap in gaps))
        value = mp.psi(0, n) + mp.euler + mp.log(mp_volume(d, 2)) + mp.mpf(d) / n * total
        assert value <= mp.psi(0, n) - mp.log(n) + mp.euler + d * mp.log(2) + mp.mpf(10) ** -25


# Implicit maximum likelihood


@pytest.mark.checks("eq-knn_entropy-imle", how="exact")
@pytest.mark.checks("eq-knn_entropy-imle-gradient", how="exact")
def test_cross_entropy_of_data_under_samples_is_imle_with_a_logarithm():
    y, x = mp_points(7, 2, 40), mp_points(4, 2, 41)
    squares = lambda x: [min((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 for b in x) for a in y]
    # The cross-entropy estimate with k = 1, from its definition with n = 7, m = 4.
    constant = mp.psi(0, 5) - mp.psi(0, 1) + mp.log(mp.pi)
    cross = lambda x: constant + mp.mpf(2) / 7 * sum(mp.log(mp.sqrt(s)) for s in squares(x))
    logs = mp.mpf(2) / (2 * 7) * sum(mp.log(s) for s in squares(x))
    assert same(cross(x), logs + mp.psi(0, 5) + mp.euler + mp.log(mp.pi))

    with mp.workdps(80):
        log_pull, square_pull = mp_gradient(cross, x), mp_gradient(lambda x: sum(squares(x)), x)
    for j, sample in enumerate(x):
        mine = [a for a in y if min(range(4), key=lambda i: mp.hypot(a[0] - x[i][0], a[1] - x[i][1])) == j]
        for c in (0, 1):
            rho = [(sample[0] - a[0]) ** 2 + (sample[1] - a[1]) ** 2 for a in mine]
            parts = [sample[c] - a[c] for a in mine]
            assert same(log_pull[j][c], mp.mpf(2) / 7 * sum(q / r for q, r in zip(parts, rho, strict=True)))
            assert same(square_pull[j][c], 2 * sum(parts))


def test_covering_and_dropping():
    y = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    to_sample = lambda x: ((y[:, None] - x) ** 2).sum(-1).min(1).sum()
    to_data = lambda x: ((y[:, None] - x) ** 2).sum(-1).min(0).sum()
    collapsed, covering = np.repeat(y[:1], 4, axis=0), np.concatenate([y, [[99.0, -99.0]]])
    assert to_data(collapsed) == 0 and to_sample(collapsed) == 50
    assert to_sample(covering) == 0 and to_data(covering) > 1e4


# Exercises


@pytest.mark.checks("eq-knn_entropy-force", how="exact")
def test_moments_of_the_force():
    """From the law of the distance itself: P(eps <= r) is the binomial tail at p = (2 r)^d."""
    n, d, k = 5, 2, 2
    for s in random_numbers(0.5, 3, 3, 50):

        def density(r):
            p = (2 * r) ** d
            return p ** (k - 1) * (1 - p) ** (n - k - 1) / mp.beta(k, n - k) * d * 2**d * r ** (d - 1)

        left = mp.quad(lambda r, s=s: r**-s * density(r), [0, 0.1, 0.5])
        right = 2**s * mp.gamma(k - s / d) * mp.gamma(n) / mp.gamma(k) / mp.gamma(n - s / d)
        assert same(left, right, 20)


@pytest.mark.checks("eq-knn_entropy-powers", how="statistical")
@pytest.mark.parametrize(("k", "q"), [(3, 2.0), (2, 1.5), (1, 0.5)])
def test_powers_of_a_density(k, q):
    n, d = 6, 2
    x = np.random.default_rng(6).random((20_000, n, d))
    mass = (2 * kth_distances(x, k, period=1.0)) ** d
    factor = math.gamma(k) * math.gamma(n + 1 - q) / math.gamma(k + 1 - q) / math.gamma(n)
    assert_z(factor * (mass ** (1 - q)).mean(1), 1)
    with pytest.raises(AssertionError):
        assert_z((mass ** (1 - q)).mean(1) * (n / k) ** (1 - q), 1)  # the plug-in form


def test_unequal_scales_lead_the_estimate_astray():
    rng = np.random.default_rng(7)
    x = rng.random((100, 2)) * [1, 1e-9]
    line = digamma(100) + np.euler_gamma + math.log(math.pi) + 2 * np.log(kth_distances(x[:, :1], 1)).mean()
    estimate = float(knn_entropy(torch.from_numpy(x)))
    assert estimate == pytest.approx(line, abs=1e-3)
    assert estimate > math.log(1e-9) + 5
    whitened = float(knn_entropy(torch.from_numpy(x / [1, 1e-9]))) + math.log(1e-9)
    assert abs(whitened - math.log(1e-9)) < 0.5


@pytest.mark.parametrize("d", [1, 2])
def test_two_points_on_a_circle_or_torus(d):
    """For n = 2: one distance, of known law, whose logarithm has the mean -1 / d."""
    assert_z(d * np.log(2 * kth_distances(np.random.default_rng(9).random((20_000, 2, d)), 1, period=1.0)[:, 0]), -1)
