"""The chapter *Maximum entropy*, equation by equation.

Entropies and divergences are integrated from the densities, by SymPy where it can and by mpmath to 30 digits
elsewhere, and compared with the closed forms of the chapter. Competitors are random Gaussian mixtures.
"""

# ruff: noqa: E731, B023 - short lambdas, used at once, read best in tests of formulas
import math
import random
from functools import lru_cache

import hypothesis.strategies as st
import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import assume, given, settings
from sympy.calculus.euler import euler_equations

from gae_core.gaussian import gaussian_entropy, kl_to_standard_normal

DIGITS = 30
MAX_ENTROPY = sp.log(2 * sp.pi * sp.E) / 2  # per coordinate, at variance 1


@pytest.fixture(autouse=True)
def precision():
    with mp.workdps(DIGITS + 10):
        yield


def quad(f, *knots, method="gauss-legendre"):
    """Gauss-Legendre between the knots for smooth integrands; tanh-sinh where an end is singular."""
    return mp.quad(f, *knots, method=method)


def same(left, right, digits=DIGITS):
    """Whether two mpmath numbers agree to that many digits, absolute or relative."""
    return abs(left - right) <= mp.mpf(10) ** -digits * max(1, abs(right))


def max_entropy():
    return mp.log(2 * mp.pi * mp.e) / 2


def normal(z):
    return mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)


class Mixture:
    """A random Gaussian mixture on the line; ``standard`` shifts and scales it to mean 0 and variance 1."""

    def __init__(self, seed, parts=3, standard=True, same_width=False):
        rng = random.Random(seed)
        draw = lambda low, high: mp.mpf(rng.uniform(low, high))
        self.weights = [draw(0.2, 1) for _ in range(parts)]
        self.weights = [w / mp.fsum(self.weights) for w in self.weights]
        self.means = [draw(-2, 2) for _ in range(parts)]
        self.widths = [draw(0.4, 1)] * parts if same_width else [draw(0.4, 1) for _ in range(parts)]
        if standard:
            shift, second = self.moment(1), self.moment(2)
            scale = mp.sqrt(second - shift**2)
            self.means = [(m - shift) / scale for m in self.means]
            self.widths = [s / scale for s in self.widths]

    def moment(self, k):
        raw = {1: lambda m, s: m, 2: lambda m, s: m**2 + s**2}[k]
        return mp.fsum(w * raw(m, s) for w, m, s in zip(self.weights, self.means, self.widths, strict=True))

    def __call__(self, z):
        return mp.fsum(
            w / s * normal((z - m) / s) for w, m, s in zip(self.weights, self.means, self.widths, strict=True)
        )

    @property
    def knots(self):
        reach = 14 * max(self.widths)
        return mp.linspace(min(self.means) - reach, max(self.means) + reach, 13)


LINE = mp.linspace(-15, 15, 13)


def expect(density, function, knots=LINE, method="gauss-legendre"):
    return quad(lambda z: density(z) * function(z), knots, method=method)


def entropy(density, knots=LINE, method="gauss-legendre"):
    return expect(density, lambda z: -mp.log(density(z)), knots, method)


def divergence(p, q, knots=LINE):
    return expect(p, lambda z: mp.log(p(z) / q(z)), knots)


def probabilities(seed, size):
    rng = random.Random(seed)
    p = [mp.mpf(rng.uniform(0.01, 1)) for _ in range(size)]
    return [x / mp.fsum(p) for x in p]


positive_vectors = st.integers(2, 6).flatmap(
    lambda k: st.tuples(*[st.lists(st.floats(1e-6, 1.0), min_size=k, max_size=k) for _ in range(2)])
)


# --- differential entropy


@pytest.mark.checks("eq-max_entropy-change", how="exact")
@pytest.mark.parametrize("seed", [0, 1])
def test_entropy_under_affine_and_smooth_maps(seed):
    p = Mixture(seed, standard=False)
    a, b = mp.mpf(-0.37) * (seed + 1), mp.mpf(5.2)
    moved = lambda y: p((y - b) / a) / abs(a)
    assert same(entropy(moved, sorted(a * z + b for z in p.knots)), entropy(p, p.knots) + mp.log(abs(a)))

    bent = lambda y: p(mp.asinh(y)) / mp.sqrt(1 + y * y)
    gain = expect(p, lambda z: mp.log(mp.cosh(z)), p.knots)
    knots = [mp.sinh(z) for z in mp.linspace(p.knots[0], p.knots[-1], 40)]
    assert same(entropy(bent, knots), entropy(p, p.knots) + gain, 25)


@pytest.mark.checks("eq-max_entropy-change", how="symbolic")
def test_entropy_of_a_uniform_triangle_under_a_matrix():
    a, b, c, d = sp.symbols("a b c d", real=True)

    def area(corners):  # shoelace formula
        (x0, y0), (x1, y1), (x2, y2) = corners
        return ((x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)) / 2

    corners = [sp.Matrix([0, 0]), sp.Matrix([3, 1]), sp.Matrix([1, 2])]
    matrix = sp.Matrix([[a, b], [c, d]])
    ratio = sp.simplify(area([matrix * z for z in corners]) / area(corners))
    assert sp.expand(ratio - matrix.det()) == 0  # H = log |area|, so the entropies differ by log |det|


@pytest.mark.checks("eq-max_entropy-quantise", how="symbolic")
def test_discrete_entropy_of_cells():
    # density 2z on [0, 1]: the cells have masses (2i + 1) / m^2
    z = sp.symbols("z", positive=True)
    target = sp.integrate(-2 * z * sp.log(2 * z), (z, 0, 1))
    assert sp.simplify(target - (sp.Rational(1, 2) - sp.log(2))) == 0

    def error(m):
        mass = [mp.mpf(2 * i + 1) / m**2 for i in range(m)]
        return abs(-mp.fsum(q * mp.log(q) for q in mass) - mp.log(m) - (mp.mpf(1) / 2 - mp.log(2)))

    assert error(4000) < 1e-6 and error(4000) < error(400) / 50 < error(40) / 2500
    # exponential density: cells are a geometric law, and SymPy has the limit
    delta = sp.symbols("delta", positive=True)
    q = sp.exp(-delta)
    cells = -sp.log(1 - q) + delta * q / (1 - q)
    assert sp.limit(cells + sp.log(delta), delta, 0, "+") == 1  # the entropy of the exponential density


@pytest.mark.checks("eq-max_entropy-atoms", how="exact")
def test_two_narrow_bumps():
    def parts(sigma):
        p = Mixture(0)
        p.weights, p.means, p.widths = [mp.mpf(1) / 2] * 2, [mp.mpf(-1), mp.mpf(1)], [sigma] * 2
        knots = sorted({s + sigma * t for s in (-1, 0, 1) for t in mp.linspace(-15, 15, 11)})
        return entropy(p, knots), mp.log(2) + mp.log(2 * mp.pi * mp.e * sigma**2) / 2

    for sigma in (mp.mpf(0.35), mp.mpf(0.8), mp.mpf(2)):
        left, right = parts(sigma)
        assert left < right - mp.mpf(10) ** -10
    left, right = parts(mp.mpf(1) / 20)  # the bumps hardly overlap any more: equality
    assert same(left, right) and left < -mp.mpf(1) / 2


# --- Gibbs' inequality


@pytest.mark.checks("eq-max_entropy-gibbs", how="exact")
def test_divergence_of_random_mixtures_is_positive():
    for seed in range(3):
        p, q = Mixture(seed, standard=False), Mixture(seed + 10, standard=False)
        assert divergence(p, q, p.knots) > mp.mpf(10) ** -6
        # the bound of the proof, pointwise: p log(p/q) >= p - q
        for z in mp.linspace(-3, 3, 13):
            assert p(z) * mp.log(p(z) / q(z)) >= p(z) - q(z)


@pytest.mark.checks("eq-max_entropy-gibbs", how="symbolic")
def test_the_logarithm_lies_below_its_tangent_at_one_only():
    t = sp.symbols("t", positive=True)
    slack = t - 1 - sp.log(t)
    assert sp.solveset(sp.diff(slack, t), t, sp.Interval.open(0, sp.oo)) == {1}
    assert slack.subs(t, 1) == 0
    assert sp.diff(slack, t, 2).is_positive


@given(positive_vectors)
def test_gibbs_inequality_for_probabilities(vectors):
    p, q = (np.array(v) / np.sum(v) for v in vectors)
    assert np.sum(p * np.log(p / q)) >= -1e-12


# --- one dimension


@pytest.mark.checks("eq-max_entropy-stationary", how="symbolic")
def test_euler_lagrange_equation():
    z, t = sp.symbols("z t", real=True)
    lam = sp.symbols("lambda0:3", real=True)
    p, h = sp.Function("p", positive=True)(z), sp.Function("h", real=True)(z)
    integrand = lambda f: -f * sp.log(f) - (lam[0] + lam[1] * z + lam[2] * z**2) * f
    slope = sp.diff(integrand(p + t * h), t).subs(t, 0)
    assert sp.simplify(slope - h * (-sp.log(p) - 1 - lam[0] - lam[1] * z - lam[2] * z**2)) == 0
    (equation,) = euler_equations(integrand(p), [p], [z])
    (solution,) = sp.solve(equation, p)
    assert sp.simplify(sp.log(solution / sp.exp(-1 - lam[0] - lam[1] * z - lam[2] * z**2)).rewrite(sp.exp)) == 0


@pytest.mark.checks("eq-max_entropy-multipliers", how="symbolic")
def test_the_constraints_give_the_multipliers():
    z, lam1 = sp.symbols("z lambda1", real=True)
    lam2 = sp.symbols("lambda2", positive=True)
    shape = sp.exp(-lam1 * z - lam2 * z**2)
    mass, first, second = (sp.simplify(sp.integrate(z**k * shape, (z, -sp.oo, sp.oo))) for k in range(3))
    solutions = sp.solve([sp.simplify(first / mass), sp.simplify(second / mass) - 1], [lam1, lam2], dict=True)
    assert solutions == [{lam1: 0, lam2: sp.Rational(1, 2)}]
    lam0 = sp.log(mass.subs(solutions[0])) - 1  # mass 1: exp(-1 - lam0) * mass = 1
    assert sp.simplify(lam0 - (sp.log(2 * sp.pi) / 2 - 1)) == 0
    assert sp.simplify(sp.exp(-1 - lam0) * shape.subs(solutions[0]) - sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi)) == 0


@pytest.mark.checks("eq-max_entropy-second", how="symbolic")
def test_second_variation():
    z, t = sp.symbols("z t", positive=True)
    p, h = sp.exp(-z), sp.exp(-z) * (sp.sin(z) - sp.Rational(1, 2))  # a direction with mass 0 and |h| <= 2p
    assert sp.integrate(h, (z, 0, sp.oo)) == 0
    curvature = -sp.integrate(sp.simplify(h**2 / p), (z, 0, sp.oo))
    assert sp.simplify(curvature) == -sp.Rational(3, 20)

    def walk(step):
        density = lambda x: mp.exp(-x) * (1 + step * (mp.sin(x) - mp.mpf(1) / 2))
        return entropy(density, mp.linspace(0, 110, 40))

    step = mp.mpf(10) ** -5
    numeric = (walk(step) - 2 * walk(0) + walk(-step)) / step**2
    assert same(numeric, mp.mpf(-3) / 20, 9)  # central differences: error of the order step^2
    a, b = sp.symbols("p h", positive=True)
    assert sp.simplify(sp.diff(-(a + t * b) * sp.log(a + t * b), t, 2).subs(t, 0) + b**2 / a) == 0


@pytest.mark.checks("eq-max_entropy-line", how="exact")
def test_the_straight_walk_from_the_normal_starts_flat():
    q = Mixture(3, same_width=True)  # narrower than the normal, so q / phi is bounded and the walk is smooth
    walk = lambda t: entropy(lambda z: (1 - t) * normal(z) + t * q(z))
    step = mp.mpf(10) ** -6
    slope = lambda walk: (walk(step) - walk(-step)) / (2 * step)
    assert same(-quad(lambda z: (q(z) - normal(z)) * mp.log(normal(z)), LINE), 0)
    mp.mp.dps = 22  # enough for a central difference
    assert same(slope(walk), 0, 10)
    assert walk(mp.mpf(1)) < walk(mp.mpf(1) / 2) < max_entropy()
    # a competitor with another variance: the walk does not start flat
    wide = lambda z: normal(z / mp.mpf(0.8)) / mp.mpf(0.8)
    assert abs(slope(lambda t: entropy(lambda z: (1 - t) * normal(z) + t * wide(z)))) > 0.1


@pytest.mark.checks("eq-max_entropy-gap", how="exact")
@pytest.mark.parametrize("seed", range(3))
def test_entropy_deficit_is_the_divergence(seed):
    p = Mixture(seed)
    assert same(p.moment(1), 0) and same(p.moment(2), 1)
    gap = max_entropy() - entropy(p, p.knots)
    assert same(gap, divergence(p, normal, p.knots))
    assert gap > mp.mpf(10) ** -4
    wrong = Mixture(seed, standard=False)  # without the moments the two differ
    assert not same(max_entropy() - entropy(wrong, wrong.knots), divergence(wrong, normal, wrong.knots), 3)


def test_the_normal_itself_has_no_deficit():
    assert same(entropy(normal), max_entropy())


@pytest.mark.checks("eq-max_entropy-cross", how="symbolic")
def test_cross_entropy_sees_two_moments_only():
    z = sp.symbols("z", real=True)
    log_normal = -sp.log(2 * sp.pi) / 2 - z**2 / 2
    uniform = sp.integrate(-log_normal / (2 * sp.sqrt(3)), (z, -sp.sqrt(3), sp.sqrt(3)))
    laplace = 2 * sp.integrate(-log_normal * sp.exp(-sp.sqrt(2) * z) / sp.sqrt(2), (z, 0, sp.oo))
    lopsided = sp.integrate(-log_normal * sp.exp(-(z + 1)), (z, -1, sp.oo))  # an exponential, shifted to mean 0
    for value in (uniform, laplace, lopsided):
        assert sp.simplify(sp.expand_log(value - MAX_ENTROPY, force=True)) == 0


UNIT_VARIANCE = {  # density on the half line z > 0, its end, its entropy
    "normal": (normal, mp.inf, lambda: max_entropy()),
    "logistic": (
        lambda z: mp.pi / (4 * mp.sqrt(3)) * mp.sech(mp.pi * z / (2 * mp.sqrt(3))) ** 2,
        mp.inf,
        lambda: 2 - mp.log(mp.pi / mp.sqrt(3)),
    ),
    "Laplace": (lambda z: mp.exp(-mp.sqrt(2) * z) / mp.sqrt(2), mp.inf, lambda: 1 + mp.log(2) / 2),
    "uniform": (lambda z: 1 / mp.sqrt(12), lambda: mp.sqrt(3), lambda: mp.log(12) / 2),
}
TABLE = {"normal": 1.41894, "logistic": 1.40458, "Laplace": 1.34657, "uniform": 1.24245}
GAPS = {"normal": 0.0, "logistic": 0.01436, "Laplace": 0.07236, "uniform": 0.17649}


@pytest.mark.checks("eq-max_entropy-table", how="exact")
@pytest.mark.parametrize("name", UNIT_VARIANCE)
def test_entropies_at_variance_one(name):
    density, end, closed_form = UNIT_VARIANCE[name]
    end = end() if callable(end) else 60  # beyond 60 less than 1e-35 of any of these
    knots = mp.linspace(0, end, 13)
    assert same(2 * expect(density, lambda z: 1, knots), 1)
    assert same(2 * expect(density, lambda z: z * z, knots), 1, 28)
    with mp.workdps(60):  # sech^2 and the exponentials stay away from an exact zero
        assert same(2 * entropy(density, knots), closed_form(), 28)
    assert float(closed_form()) == pytest.approx(TABLE[name], abs=5.1e-6)
    assert float(max_entropy() - closed_form()) == pytest.approx(GAPS[name], abs=5.1e-6)


@pytest.mark.checks("eq-max_entropy-table", how="symbolic")
def test_entropies_of_laplace_and_uniform_by_integration():
    z = sp.symbols("z", positive=True)
    laplace = sp.exp(-sp.sqrt(2) * z) / sp.sqrt(2)
    value = 2 * sp.integrate(laplace * (sp.log(2) / 2 + sp.sqrt(2) * z), (z, 0, sp.oo))
    assert sp.simplify(value - 1 - sp.log(2) / 2) == 0
    assert 2 * sp.integrate(z**2 * laplace, (z, 0, sp.oo)) == 1
    assert sp.integrate(z**2 / sp.sqrt(12), (z, -sp.sqrt(3), sp.sqrt(3))) == 1


def generalised_entropy(u):
    return u + mp.log(2) + mp.log(u) + mp.mpf(3) / 2 * mp.loggamma(u) - mp.loggamma(3 * u) / 2


@pytest.mark.checks("eq-max_entropy-generalised", how="exact")
def test_generalised_normal_family():
    rng = random.Random(5)
    for shape in (mp.mpf(1), mp.mpf(rng.uniform(1.1, 1.9)), mp.mpf(rng.uniform(2.1, 6))):
        u = 1 / shape
        scale = mp.sqrt(mp.gamma(u) / mp.gamma(3 * u))
        raw = lambda z: mp.exp(-((z / scale) ** shape))
        end = scale * mp.mpf(110) ** u
        knots = mp.linspace(0, end, 9)
        mass = 2 * quad(raw, knots, method="tanh-sinh")
        density = lambda z: raw(z) / mass
        assert same(2 * expect(density, lambda z: z * z, knots, "tanh-sinh"), 1)
        assert same(2 * entropy(density, knots, "tanh-sinh"), generalised_entropy(u))
        slope = 1 + 1 / u + mp.mpf(3) / 2 * (mp.digamma(u) - mp.digamma(3 * u))
        assert same(mp.diff(generalised_entropy, u), slope, 20)
        assert generalised_entropy(u) < max_entropy()
    assert same(generalised_entropy(mp.mpf(1) / 2), max_entropy())
    assert same(generalised_entropy(mp.mpf(1)), 1 + mp.log(2) / 2)
    assert same(generalised_entropy(mp.mpf(10) ** -15), mp.log(12) / 2, 13)  # shape to infinity: uniform


@pytest.mark.checks("eq-max_entropy-generalised", how="symbolic")
def test_generalised_normal_family_peaks_at_the_normal():
    u = sp.symbols("u", positive=True)
    formula = u + sp.log(2) + sp.log(u) + sp.Rational(3, 2) * sp.loggamma(u) - sp.loggamma(3 * u) / 2
    slope = sp.diff(formula, u)
    half = sp.Rational(1, 2)
    assert sp.simplify(sp.expand_func(slope.subs(u, half))) == 0
    trigamma = sp.polygamma(1, half)
    curvature = (
        sp.diff(slope, u).subs(u, half).subs(sp.polygamma(1, 3 * half), trigamma - 4)
    )  # psi'(x+1) = psi'(x) - 1/x^2
    assert sp.simplify(curvature - (14 - 3 * sp.pi**2 / 2)) == 0 and curvature.evalf() < 0


@pytest.mark.checks("eq-max_entropy-negentropy", how="symbolic")
def test_the_gap_is_quadratic_near_the_normal():
    z, epsilon = sp.symbols("z epsilon", real=True)
    k3, k4 = sp.symbols("kappa3 kappa4", real=True)
    phi = sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi)
    mean = lambda f: sp.integrate(sp.expand(f) * phi, (z, -sp.oo, sp.oo))
    he3, he4 = z**3 - 3 * z, z**4 - 6 * z**2 + 3
    h = k3 / 6 * he3 + k4 / 24 * he4
    assert [sp.simplify(mean(h * z**k)) for k in range(3)] == [0, 0, 0]
    third, fourth = (sp.simplify(mean((1 + epsilon * h) * z**k)) for k in (3, 4))
    assert sp.expand(third - epsilon * k3) == 0 and sp.expand(fourth - 3 - epsilon * k4) == 0
    assert sp.expand(mean(h**2) / 2 - k3**2 / 12 - k4**2 / 48) == 0
    x = sp.symbols("x")
    series = sp.series((1 + x) * sp.log(1 + x), x, 0, 3).removeO()
    assert sp.expand(series - x - x**2 / 2) == 0

    k3, k4 = mp.mpf(0.7), mp.mpf(1.3)
    h = lambda z: k3 / 6 * (z**3 - 3 * z) + k4 / 24 * (z**4 - 6 * z**2 + 3)
    for e in (mp.mpf(10) ** -8,):
        gap = max_entropy() - entropy(lambda z: normal(z) * (1 + e * h(z)))
        assert abs(gap / e**2 - (k3**2 / 12 + k4**2 / 48)) < 2 * e  # the remainder is of the order epsilon


def binary_divergence(a, b):
    return a * mp.log(a / b) + (1 - a) * mp.log((1 - a) / (1 - b))


@pytest.mark.checks("eq-max_entropy-pinsker", how="exact")
@pytest.mark.parametrize("seed", range(20))
def test_pinsker_chain_for_probabilities(seed):
    p, q = probabilities(seed, 2 + seed % 5), probabilities(seed + 100, 2 + seed % 5)
    pairs = list(zip(p, q, strict=True))
    kl = mp.fsum(x * mp.log(x / y) for x, y in pairs)
    a, b = (mp.fsum(pair[i] for pair in pairs if pair[0] > pair[1]) for i in (0, 1))
    variation = mp.fsum(abs(x - y) for x, y in pairs) / 2
    tiny = mp.mpf(10) ** -35
    assert same(a - b, variation)
    assert kl >= binary_divergence(a, b) - tiny
    assert binary_divergence(a, b) >= 2 * variation**2 - tiny


@pytest.mark.checks("eq-max_entropy-pinsker", how="exact")
def test_pinsker_chain_for_a_density():
    density, _, closed_form = UNIT_VARIANCE["Laplace"]
    gap = max_entropy() - closed_form()
    first, second = (  # on z > 0, Laplace is above the normal below the first crossing and beyond the second
        mp.findroot(lambda z: mp.log(density(z) / normal(z)), start) for start in (0.5, 2.4)
    )
    pieces = lambda f: 2 * (quad(f, [0, first]) + quad(f, [second, 4, 8, 60, 100]))
    a, b = pieces(density), pieces(normal)
    assert 0 < b < a < 1
    assert gap > binary_divergence(a, b) > 2 * (a - b) ** 2
    assert a - b < mp.sqrt(gap / 2)


@pytest.mark.checks("eq-max_entropy-pinsker-slope", how="symbolic")
def test_slope_in_the_proof_of_pinsker():
    a, b = sp.symbols("a b", positive=True)
    g = a * sp.log(a / b) + (1 - a) * sp.log((1 - a) / (1 - b)) - 2 * (a - b) ** 2
    assert sp.simplify(sp.diff(g, b) - (b - a) * (1 / (b * (1 - b)) - 4)) == 0
    assert g.subs(b, a) == 0
    assert sp.simplify(1 / (b * (1 - b)) - 4 - (2 * b - 1) ** 2 / (b * (1 - b))) == 0  # never negative on (0, 1)


@given(positive_vectors)
def test_pinsker_as_a_property(vectors):
    p, q = (np.array(v) / np.sum(v) for v in vectors)
    assert np.sum(p * np.log(p / q)) >= 2 * (np.abs(p - q).sum() / 2) ** 2 - 1e-12


def transport(name):
    """The increasing map from N(0, 1) to a density of the table, on x > 0, from the upper tail."""
    tail = lambda x: mp.erfc(x / mp.sqrt(2)) / 2
    return {
        "uniform": lambda x: mp.sqrt(3) * (1 - 2 * tail(x)),
        "Laplace": lambda x: -mp.log(2 * tail(x)) / mp.sqrt(2),
        "logistic": lambda x: mp.sqrt(3) / mp.pi * mp.log((1 - tail(x)) / tail(x)),
    }[name]


@pytest.mark.checks("eq-max_entropy-talagrand", how="exact")
@pytest.mark.parametrize("name", ["uniform", "Laplace", "logistic"])
def test_transport_on_the_line(name):
    # On the line the increasing map is optimal, before and after an increasing decoder.
    move = transport(name)
    knots = mp.linspace(0, 15, 9)
    assert same(2 * expect(normal, lambda x: move(x) ** 2, knots), 1, 28)  # it does reach variance 1
    distance = mp.sqrt(2 * expect(normal, lambda x: (move(x) - x) ** 2, knots))
    gap = max_entropy() - UNIT_VARIANCE[name][2]()
    assert 0 < distance <= mp.sqrt(2 * gap)
    lipschitz = mp.mpf(1.7)
    decoder = lambda x: lipschitz * mp.tanh(x)
    images = mp.sqrt(2 * expect(normal, lambda x: (decoder(move(x)) - decoder(x)) ** 2, knots))
    assert 0 < images <= lipschitz * distance <= lipschitz * mp.sqrt(2 * gap)


@pytest.mark.checks("eq-max_entropy-talagrand", how="symbolic")
def test_transport_between_normals():
    m, x = sp.symbols("m x", real=True)
    s = sp.symbols("s", positive=True)
    phi = sp.exp(-(x**2) / 2) / sp.sqrt(2 * sp.pi)
    squared = sp.simplify(sp.integrate(sp.expand((m + s * x - x) ** 2) * phi, (x, -sp.oo, sp.oo)))
    twice_kl = m**2 + s**2 - 1 - 2 * sp.log(s)
    slack = sp.expand(twice_kl - squared)
    assert sp.simplify(slack - 2 * (s - 1 - sp.log(s))) == 0  # not negative, by the tangent of the logarithm
    assert slack.subs(s, 1) == 0  # a pure shift is the case of equality


# --- several dimensions


def correlation(seed, d):
    factor = np.random.default_rng(seed).normal(size=(d, d + 2))
    cov = factor @ factor.T
    scale = np.sqrt(np.diag(cov))
    return cov / np.outer(scale, scale)


@pytest.mark.checks("eq-max_entropy-gaussian-d", how="symbolic")
def test_entropy_of_a_normal_vector_by_the_chain_rule():
    # H(Z1) + H(Z2 | Z1) + H(Z3 | Z1, Z2), each a normal density with the variance left after regression
    s = sp.Matrix(3, 3, lambda i, j: sp.Symbol(f"s{min(i, j)}{max(i, j)}", real=True))
    left = [s[0, 0]]
    for j in (1, 2):
        cross = s[:j, j]
        left.append(s[j, j] - (cross.T * s[:j, :j].inv() * cross)[0, 0])
    assert sp.simplify(left[0] * left[1] * left[2] - s.det()) == 0
    # H = sum of log(2 pi e v) / 2, and 2 pi e comes out of the determinant three times
    assert sp.simplify((2 * sp.pi * sp.E * s).det() - (2 * sp.pi * sp.E) ** 3 * s.det()) == 0


@pytest.mark.checks("eq-max_entropy-gaussian-d", how="exact")
def test_entropy_of_a_normal_vector_on_its_own_axes():
    # rotate two independent normals: the entropy is the sum of theirs, and the covariance is no longer diagonal
    rng = random.Random(2)
    widths = [mp.mpf(rng.uniform(0.3, 2)) for _ in range(2)]
    angle = mp.mpf(rng.uniform(0.2, 1.2))
    rotation = mp.matrix([[mp.cos(angle), -mp.sin(angle)], [mp.sin(angle), mp.cos(angle)]])
    cov = rotation * mp.diag([w**2 for w in widths]) * rotation.T
    parts = mp.fsum(entropy(lambda z, w=w: normal(z / w) / w, [w * z for z in LINE]) for w in widths)
    assert same(mp.log(mp.det(2 * mp.pi * mp.e * cov)) / 2, parts)
    code = gaussian_entropy(torch.tensor([[float(cov[i, j]) for j in range(2)] for i in range(2)], dtype=torch.float64))
    assert float(code) == pytest.approx(float(parts), abs=1e-12)


@pytest.mark.parametrize("d", [1, 2, 5, 64])
def test_the_package_agrees_with_numpy(d):
    cov = correlation(d, d) * 0.7
    expected = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * cov)[1]
    assert float(gaussian_entropy(torch.from_numpy(cov))) == pytest.approx(expected, abs=1e-10)


@pytest.mark.checks("eq-max_entropy-mvn", how="symbolic")
def test_uniform_density_on_an_ellipse():
    # Z = A (r cos t, r sin t), uniform on the disc r <= 2: covariance A A^T
    r, t = sp.symbols("r t", positive=True)
    a, b, c = sp.symbols("a b c", positive=True)
    matrix = sp.Matrix([[a, b], [0, c]])
    cov = matrix * matrix.T
    point = matrix * sp.Matrix([r * sp.cos(t), r * sp.sin(t)])
    mean = lambda f: sp.integrate(sp.integrate(sp.expand(f) * r, (t, 0, 2 * sp.pi)), (r, 0, 2)) / (4 * sp.pi)
    assert sp.simplify(mean(point[0] ** 2) - cov[0, 0]) == 0 and sp.simplify(mean(point[0] * point[1]) - cov[0, 1]) == 0
    own = sp.log(4 * sp.pi * a * c)  # the entropy: logarithm of the area
    log_normal = -sp.log(4 * sp.pi**2 * cov.det()) / 2 - sp.simplify((point.T * cov.inv() * point)[0, 0]) / 2
    kl = -own - mean(log_normal)
    gap = sp.log((2 * sp.pi * sp.E * cov).det()) / 2 - own
    assert sp.simplify(sp.expand_log(kl - gap, force=True)) == 0
    assert sp.simplify(sp.expand_log(gap, force=True) - (1 - sp.log(2))) == 0 and (1 - sp.log(2)).is_positive


@pytest.mark.checks("eq-max_entropy-mvn-cross", how="symbolic")
@pytest.mark.parametrize("d", [2, 3])
def test_expected_quadratic_form_is_the_dimension(d):
    z, m = sp.Matrix(sp.symbols(f"z:{d}")), sp.Matrix(sp.symbols(f"m:{d}"))
    cov = sp.Matrix(d, d, lambda i, j: sp.Symbol(f"s{min(i, j)}{max(i, j)}"))
    form = sp.Poly(sp.expand(((z - m).T * cov.adjugate() * (z - m))[0, 0]), *z)  # times det, to stay polynomial
    value = 0
    for powers, coefficient in form.terms():  # the moments: 1, m_i, s_ij + m_i m_j
        indices = [i for i, power in enumerate(powers) for _ in range(power)]
        moment = {
            0: lambda: 1,
            1: lambda: m[indices[0]],
            2: lambda: cov[indices[0], indices[1]] + m[indices[0]] * m[indices[1]],
        }[len(indices)]()
        value += coefficient * moment
    assert sp.expand(value - d * cov.det()) == 0


@pytest.mark.checks("eq-max_entropy-gaussian-kl", how="exact")
@pytest.mark.parametrize("seed", range(2))
def test_divergence_when_the_moments_differ(seed):
    p = Mixture(seed, standard=False)
    right = max_entropy() - entropy(p, p.knots) + (p.moment(2) - 1) / 2
    assert same(divergence(p, normal, p.knots), right)


@pytest.mark.checks("eq-max_entropy-gaussian-kl", how="symbolic")
def test_divergence_of_a_normal_from_the_standard_normal():
    x, mu = sp.symbols("x mu", real=True)
    s = sp.symbols("sigma", positive=True)
    phi = sp.exp(-(x**2) / 2) / sp.sqrt(2 * sp.pi)
    log_ratio = -sp.log(s) - x**2 / 2 + (mu + s * x) ** 2 / 2  # at z = mu + sigma x
    value = sp.integrate(sp.expand(log_ratio) * phi, (x, -sp.oo, sp.oo))
    assert sp.simplify(value - (mu**2 + s**2 - 2 * sp.log(s) - 1) / 2) == 0
    # independent coordinates: the densities factor, so the divergences add; the package does the sum
    means, variances = [0.3, -1.2, 0.0], [0.5, 2.0, 1.0]
    total = sum(float(value.subs({mu: m, s: math.sqrt(v)})) for m, v in zip(means, variances, strict=True))
    code = kl_to_standard_normal(
        torch.tensor([means], dtype=torch.float64), torch.tensor([variances], dtype=torch.float64).log()
    )
    assert code.shape == (1,) and float(code[0]) == pytest.approx(total, abs=1e-12)


@lru_cache
def disc():
    """Uniform density on the disc of radius 2: entropies and dependence, each from its own integral."""
    marginal_at = lambda b: (
        mp.sin(b) / mp.pi
    )  # density of a coordinate at z = 2 cos b, from the chord of length 4 sin b
    along = lambda f: 2 * quad(lambda b: marginal_at(b) * f(b) * 2 * mp.sin(b), [0, mp.pi / 2], method="tanh-sinh")
    with mp.workdps(DIGITS + 10):
        area = 2 * quad(lambda b: 4 * mp.sin(b) * 2 * mp.sin(b), [0, mp.pi / 2], method="tanh-sinh")
        assert same(along(lambda b: 1), 1) and same(along(lambda b: 4 * mp.cos(b) ** 2), 1)  # mass and variance
        marginal = along(lambda b: -mp.log(marginal_at(b)))
        shape = along(lambda b: mp.log(marginal_at(b) / normal(2 * mp.cos(b))))
    with mp.workdps(22):  # KL(p || p1 p2) in polar coordinates, on one eighth of the disc; z = 2 s (cos t, sin t)
        log_marginal = lambda w: mp.log(mp.sqrt(1 - w * w) / mp.pi)
        log_ratio = lambda s, t: -mp.log(4 * mp.pi) - log_marginal(s * mp.cos(t)) - log_marginal(s * mp.sin(t))
        dependence = quad(lambda s, t: 8 / mp.pi * s * log_ratio(s, t), [0, 1], [0, mp.pi / 4], method="tanh-sinh")
    return mp.log(area), marginal, dependence, shape


@pytest.mark.checks("eq-max_entropy-subadditive", how="exact")
def test_entropy_of_the_disc_is_that_of_its_marginals_minus_the_dependence():
    joint, marginal, dependence, _ = disc()
    assert same(joint, 2 * marginal - dependence, 18)
    assert dependence > 0.1


@pytest.mark.checks("eq-max_entropy-decomposition", how="exact")
def test_gap_of_the_disc_is_shape_plus_dependence():
    joint, _, dependence, shape = disc()
    assert same(2 * max_entropy() - joint, 2 * shape + dependence, 18)


@pytest.mark.checks("eq-max_entropy-disc", how="exact")
def test_closed_forms_of_the_disc():
    joint, marginal, dependence, shape = disc()
    assert same(joint, mp.log(4 * mp.pi))
    assert same(marginal, mp.log(2 * mp.pi) - mp.mpf(1) / 2)
    assert same(shape, 1 - mp.log(2 * mp.pi) / 2, 18)
    assert same(dependence, mp.log(mp.pi) - 1, 18)
    assert 0.4 < dependence / (2 * max_entropy() - joint) < 0.5  # "nearly half of the gap"


@pytest.mark.checks("eq-max_entropy-decomposition", how="symbolic")
def test_gap_of_two_correlated_normals():
    rho = sp.symbols("rho", real=True)
    cov = sp.Matrix([[1, rho], [rho, 1]])
    kl = (cov.trace() - 2 - sp.log(cov.det())) / 2  # from N(0, I); the marginals are standard normal already
    dependence = -sp.log(1 - rho**2) / 2  # 2 H(Z1) - H(Z), by the chain rule with the variance 1 - rho^2
    assert sp.simplify(kl - dependence) == 0


def test_decomposition_of_a_mixture_in_the_plane():
    # float64, by quadrature on a grid: a correlated mixture, standardised coordinate by coordinate
    centres = np.array([[-1.0, -0.6], [1.0, 0.9], [0.2, -1.1]])
    weights = np.array([0.5, 0.3, 0.2])
    widths = np.array([0.5, 0.6, 0.4])
    mean = weights @ centres
    scale = np.sqrt(weights @ (centres**2 + widths[:, None] ** 2) - mean**2)
    grid = np.linspace(-7, 7, 701)
    step = grid[1] - grid[0]
    bell = lambda z: np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    factors = [
        np.stack(
            [bell((grid * scale[j] + mean[j] - c[j]) / w) / w * scale[j] for c, w in zip(centres, widths, strict=True)]
        )
        for j in (0, 1)
    ]
    joint = np.einsum("k,ki,kj->ij", weights, *factors)
    p1, p2 = (weights @ f for f in factors)
    kl = lambda p, q: (p * np.log(p / q)).sum()
    gap = np.log(2 * np.pi * np.e) + (joint * np.log(joint)).sum() * step**2
    parts = (kl(p1, bell(grid)) + kl(p2, bell(grid))) * step + kl(joint, np.outer(p1, p2)) * step**2
    assert gap == pytest.approx(parts, abs=1e-9) and gap > 0.1


@pytest.mark.checks("eq-max_entropy-hadamard", how="exact")
@pytest.mark.parametrize("d", [2, 3, 6])
def test_hadamard_for_random_matrices(d):
    rng = random.Random(d)
    factor = mp.matrix(d, d + 1)
    for i in range(d):
        for j in range(d + 1):
            factor[i, j] = mp.mpf(rng.gauss(0, 1))
    cov = factor * factor.T
    diagonal = mp.fprod(cov[j, j] for j in range(d))
    assert 0 < mp.det(cov) < diagonal
    scale = mp.diag([1 / mp.sqrt(cov[j, j]) for j in range(d)])
    corr = scale * cov * scale
    assert same(mp.det(corr), mp.det(cov) / diagonal) and mp.det(corr) < 1
    assert same(mp.fsum(mp.eigsy(corr, eigvals_only=True)), d)


@given(st.integers(2, 8), st.integers(0, 10**6))
@settings(max_examples=60)
def test_log_det_of_a_correlation_matrix_is_not_positive(d, seed):
    corr = correlation(seed, d)
    sign, log_det = np.linalg.slogdet(corr)
    assert sign == 1 and log_det < 0
    entropy_of_code = float(gaussian_entropy(torch.from_numpy(corr)))
    assert entropy_of_code <= d * float(max_entropy())


@pytest.mark.checks("eq-max_entropy-hadamard-small", how="symbolic")
def test_hadamard_in_two_and_three_dimensions():
    rho, a, b, c = sp.symbols("rho a b c", real=True)
    assert sp.expand(1 - sp.Matrix([[1, rho], [rho, 1]]).det() - rho**2) == 0
    det = sp.Matrix([[1, a, b], [a, 1, c], [b, c, 1]]).det()
    assert sp.expand(1 - det - ((a - b * c) ** 2 + b**2 * (1 - c**2) + c**2)) == 0


# --- the general theorem, on [0, 1] with two odd constraint functions

FEATURES = (lambda z: mp.cos(5 * z), lambda z: z**2)


def partition(*lam):
    return quad(lambda z: mp.exp(-mp.fdot(lam, [f(z) for f in FEATURES])), [0, 0.5, 1])


def member(lam):
    total = partition(*lam)
    return lambda z: mp.exp(-mp.fdot(lam, [f(z) for f in FEATURES])) / total


def competitor(z):
    return (4 + 18 * z * (1 - z) + 6 * z) / 10


def targets(density):
    return [expect(density, f, [0, 0.5, 1]) for f in FEATURES]


def solve(c, start=(0, 0)):
    """The multipliers at which the family meets the constraints, by Newton's method on the moments."""
    equations = [
        lambda *lam, f=f, v=v: expect(member(lam), f, [0, 0.5, 1]) - v for f, v in zip(FEATURES, c, strict=True)
    ]
    return list(mp.findroot(lambda *lam: [equation(*lam) for equation in equations], start, tol=mp.mpf(10) ** -50))


@lru_cache
def solved():
    with mp.workdps(DIGITS + 10):
        c = targets(competitor)
        return c, solve(c)


@pytest.mark.checks("eq-max_entropy-general", how="exact")
def test_entropy_bound_for_every_multiplier():
    c, best = solved()
    knots = [0, 0.5, 1]
    own = entropy(competitor, knots)
    rng = random.Random(4)
    for _ in range(2):
        lam = [mp.mpf(rng.uniform(-2, 2)) for _ in FEATURES]
        bound = mp.log(partition(*lam)) + mp.fdot(lam, c)
        assert same(own, bound - divergence(competitor, member(lam), knots))
        assert own < bound
    # the member that meets the constraints attains the bound and beats the competitor
    assert all(same(x, y) for x, y in zip(targets(member(best)), c, strict=True))
    top = entropy(member(best), knots)
    assert same(top, mp.log(partition(*best)) + mp.fdot(best, c)) and top > own


@pytest.mark.checks("eq-max_entropy-logz", how="exact")
def test_derivatives_of_the_log_partition_function():
    lam = [mp.mpf(0.8), mp.mpf(-1.3)]
    density = member(lam)
    knots = [0, 0.5, 1]
    means = targets(density)
    step = mp.mpf(10) ** -8
    moved = lambda j, by: [x + by * (i == j) for i, x in enumerate(lam)]
    for j in range(2):
        above, below = moved(j, step), moved(j, -step)
        log_z = [mp.log(partition(*point)) for point in (above, below)]
        assert same((log_z[0] - log_z[1]) / (2 * step), -means[j], 14)
        ups, downs = targets(member(above)), targets(member(below))
        for k in range(2):  # the second derivative is that of minus the mean
            covariance = expect(density, lambda z: FEATURES[j](z) * FEATURES[k](z), knots) - means[j] * means[k]
            assert same(-(ups[k] - downs[k]) / (2 * step), covariance, 14)


@pytest.mark.checks("eq-max_entropy-logz", how="symbolic")
def test_derivatives_of_the_log_partition_function_of_the_normal():
    x, a = sp.symbols("x a", real=True)
    b = sp.symbols("b", positive=True)
    raw = [sp.simplify(sp.integrate(x**k * sp.exp(-a * x - b * x**2), (x, -sp.oo, sp.oo))) for k in range(5)]
    log_z = sp.expand_log(sp.log(raw[0]), force=True)
    moment = [sp.simplify(r / raw[0]) for r in raw]
    assert sp.simplify(sp.diff(log_z, a) + moment[1]) == 0 and sp.simplify(sp.diff(log_z, b) + moment[2]) == 0
    assert sp.simplify(sp.diff(log_z, a, b) - (moment[3] - moment[1] * moment[2])) == 0
    assert sp.simplify(sp.diff(log_z, b, 2) - (moment[4] - moment[2] ** 2)) == 0


@pytest.mark.checks("eq-max_entropy-dual", how="exact")
def test_duality_and_the_meaning_of_the_multipliers():
    c, best = solved()
    dual = lambda lam: mp.log(partition(*lam)) + mp.fdot(lam, c)
    rng = random.Random(9)
    for _ in range(4):
        assert dual([x + mp.mpf(rng.uniform(-1, 1)) for x in best]) > dual(best)
    top = entropy(member(best), [0, 0.5, 1])
    assert same(top, dual(best))
    step = mp.mpf(10) ** -6
    for j in range(2):
        values = []
        for sign in (1, -1):
            moved = [x + sign * step * (i == j) for i, x in enumerate(c)]
            values.append(entropy(member(solve(moved, best)), [0, 0.5, 1]))
        assert same((values[0] - values[1]) / (2 * step), best[j], 8)  # central differences


# --- other constraints


@pytest.mark.checks("eq-max_entropy-others", how="symbolic")
def test_uniform_exponential_laplace():
    z, m, s, width = sp.symbols("z m s w", positive=True)
    assert sp.simplify(sp.integrate(sp.log(width) / width, (z, 0, width)) - sp.log(width)) == 0
    exponential = sp.exp(-z / m) / m
    assert sp.integrate(z * exponential, (z, 0, sp.oo)) == m
    assert sp.simplify(sp.integrate(exponential * (z / m + sp.log(m)), (z, 0, sp.oo)) - 1 - sp.log(m)) == 0
    laplace = sp.exp(-z / s) / (2 * s)
    assert sp.simplify(2 * sp.integrate(z * laplace, (z, 0, sp.oo)) - s) == 0
    value = 2 * sp.integrate(laplace * (z / s + sp.log(2 * s)), (z, 0, sp.oo))
    assert sp.simplify(sp.expand_log(value - 1 - sp.log(2 * s), force=True)) == 0
    # the multipliers are the prices of the constraints
    assert sp.diff(1 + sp.log(m), m) == 1 / m and sp.diff(1 + sp.log(2 * s), s) == 1 / s


@pytest.mark.checks("eq-max_entropy-others", how="exact")
def test_competitors_under_the_same_constraints_have_less():
    mean = mp.mpf(1.7)
    for shape in (mp.mpf(0.6), mp.mpf(1.4), mp.mpf(3)):  # gamma densities with that mean
        gamma = lambda z: z ** (shape - 1) * mp.exp(-z * shape / mean) * (shape / mean) ** shape / mp.gamma(shape)
        assert entropy(gamma, [0, 1, 5, 20, 60, 150], "tanh-sinh") < 1 + mp.log(mean) - mp.mpf(10) ** -3
    beta = lambda z: 6 * z * (1 - z)
    assert entropy(beta, [0, 0.5, 1]) < 0  # uniform on [0, 1] has 0
    # at the same variance the normal beats Laplace, at the same mean absolute value Laplace beats the normal
    width = mp.sqrt(mp.pi / 2)  # E|Z| = width * sqrt(2 / pi) = 1
    assert 1 + mp.log(2) / 2 < max_entropy()
    assert 1 + mp.log(2) > max_entropy() + mp.log(width)


@pytest.mark.checks("eq-max_entropy-boltzmann", how="symbolic")
def test_boltzmann_relations_for_three_states():
    beta = sp.symbols("beta", positive=True)
    u = sp.symbols("u1:4", real=True)
    z = sum(sp.exp(-beta * x) for x in u)
    p = [sp.exp(-beta * x) / z for x in u]
    energy = sum(q * x for q, x in zip(p, u, strict=True))
    variance = sum(q * x**2 for q, x in zip(p, u, strict=True)) - energy**2
    own = -sum(q * sp.log(q) for q in p)
    zero = lambda f: sp.simplify(sp.expand_log(f, force=True)) == 0
    assert zero(sp.diff(sp.log(z), beta) + energy)
    assert zero(sp.diff(energy, beta) + variance)
    assert zero(own - sp.log(z) - beta * energy)
    assert zero(sp.diff(own, beta) + beta * variance)
    assert zero(sp.diff(own, beta) / sp.diff(energy, beta) - beta)
    assert zero(-sp.log(z) / beta - (energy - own / beta))


@pytest.mark.checks("eq-max_entropy-boltzmann", how="exact")
def test_boltzmann_relations_for_a_density():
    well = lambda z: (z * z - 1) ** 2 + z / 3
    knots = mp.linspace(-5, 5, 13)
    beta = mp.mpf(1.37)
    z = lambda b: quad(lambda x: mp.exp(-b * well(x)), knots)
    density = lambda b: (lambda total: lambda x: mp.exp(-b * well(x)) / total)(z(b))
    energy = expect(density(beta), well, knots)
    variance = expect(density(beta), lambda x: well(x) ** 2, knots) - energy**2
    assert same(entropy(density(beta), knots), mp.log(z(beta)) + beta * energy)
    step = mp.mpf(10) ** -8
    slope = lambda f: (f(beta + step) - f(beta - step)) / (2 * step)
    assert same(slope(lambda b: mp.log(z(b))), -energy, 12)
    assert same(slope(lambda b: expect(density(b), well, knots)), -variance, 12)
    assert same(slope(lambda b: entropy(density(b), knots)), -beta * variance, 12)


@pytest.mark.checks("eq-max_entropy-softmax", how="symbolic")
def test_softmax_identity():
    s = sp.symbols("s1:4", real=True)
    a, b = sp.symbols("a b", positive=True)
    p = [a / (a + b + 1), b / (a + b + 1), 1 / (a + b + 1)]
    total = sum(sp.exp(x) for x in s)
    left = sum(-q * sp.log(q) + q * x for q, x in zip(p, s, strict=True))
    kl = sum(q * sp.log(q / (sp.exp(x) / total)) for q, x in zip(p, s, strict=True))
    assert sp.simplify(sp.expand_log(left - sp.log(total) + kl, force=True)) == 0


@given(positive_vectors, st.floats(0.1, 20))
def test_no_distribution_beats_softmax(vectors, spread):
    p = np.array(vectors[0]) / np.sum(vectors[0])
    s = spread * np.array(vectors[1])
    best = s.max() + np.log(np.exp(s - s.max()).sum())
    assert -np.sum(p * np.log(p)) + p @ s <= best + 1e-9


@pytest.mark.checks("eq-max_entropy-variational", how="exact")
def test_gibbs_variational_principle():
    energy = lambda z: z**4 / 4 - z / 2
    knots = mp.linspace(-6, 6, 13)
    log_z = mp.log(quad(lambda z: mp.exp(-energy(z)), knots))
    best = lambda z: mp.exp(-energy(z) - log_z)
    score = lambda p, where: entropy(p, where) - expect(p, energy, where)
    assert same(score(best, knots), log_z)
    for seed in range(2):
        p = Mixture(seed)
        assert score(p, p.knots) < log_z
        gap = expect(p, lambda z: mp.log(p(z)) + energy(z) + log_z, p.knots)
        assert same(score(p, p.knots), log_z - gap)


@pytest.mark.checks("eq-max_entropy-softmaximum", how="exact")
def test_soft_maximum_lies_between_its_bounds():
    rng = random.Random(1)
    for size in (2, 5, 9):
        s = [mp.mpf(rng.uniform(-3, 3)) for _ in range(size)]
        for temperature in (mp.mpf(1) / 7, mp.mpf(1), mp.mpf(30)):
            soft = temperature * mp.log(mp.fsum(mp.exp(x / temperature) for x in s))
            assert max(s) < soft < max(s) + temperature * mp.log(size)
    equal = [mp.mpf(2)] * 4  # equal scores attain the upper bound
    assert same(3 * mp.log(mp.fsum(mp.exp(x / 3) for x in equal)), 2 + 3 * mp.log(4))


# --- no maximum


@pytest.mark.checks("eq-max_entropy-escape", how="exact")
def test_mass_that_escapes_meets_the_constraints_and_nears_the_supremum():
    m, v = mp.mpf(1.3), mp.mpf(6)
    assert v > 2 * m**2
    shortfall = []
    for power in (3, 6, 9):
        epsilon = mp.mpf(10) ** -power
        mean = lambda far: (m - epsilon * far) / (1 - epsilon)
        second = lambda far: 2 * (1 - epsilon) * mean(far) ** 2 + epsilon * (far**2 + mp.mpf(1) / 12)
        far = mp.findroot(lambda x: second(x) - v, mp.sqrt((v - 2 * m**2) / epsilon))
        mu = mean(far)
        base = lambda z: (1 - epsilon) * mp.exp(-z / mu) / mu
        inside = lambda z: base(z) + epsilon
        edges = [far - mp.mpf(1) / 2, far + mp.mpf(1) / 2]
        low = mp.linspace(0, min(edges[0], 100 * mu), 13)
        # moments and entropy by integrating the density itself, outside and inside the far interval
        tail = [x for x in [*mp.linspace(edges[1], edges[1] + 100 * mu, 9)]]
        middle = [low[-1], edges[0]] if low[-1] < edges[0] else None

        def integrate(f):
            total = quad(lambda z: f(z, base(z)), low) + quad(lambda z: f(z, base(z)), tail)
            total += quad(lambda z: f(z, inside(z)), edges)
            return total + (quad(lambda z: f(z, base(z)), middle) if middle else 0)

        assert same(integrate(lambda z, p: p), 1, 25)
        assert same(integrate(lambda z, p: z * p), m, 25)
        assert same(integrate(lambda z, p: z * z * p), v, 25)
        own = integrate(lambda z, p: -p * mp.log(p))
        assert (1 - epsilon) * (1 + mp.log(mu)) <= own < 1 + mp.log(m)
        assert abs(epsilon * far**2 - (v - 2 * m**2)) < 20 * mp.sqrt(epsilon)
        assert abs(mu - m) < 10 * mp.sqrt(epsilon)
        shortfall.append(1 + mp.log(m) - own)
    assert shortfall[0] > 20 * shortfall[1] > 400 * shortfall[2]  # it falls like sqrt(epsilon): about 32 a step


@pytest.mark.checks("eq-max_entropy-jeffreys", how="exact")
@pytest.mark.parametrize("lam1", [-2.3, 0.0, 1.9])
def test_truncated_normals_stay_below_twice_the_squared_mean(lam1):
    lam1, lam2 = mp.mpf(lam1), mp.mpf(0.45)
    shape = lambda z: mp.exp(-lam1 * z - lam2 * z * z)
    knots = mp.linspace(0, 20, 13)
    total = quad(shape, knots)
    q = lambda z: shape(z) / total
    m, v = expect(q, lambda z: z, knots), expect(q, lambda z: z * z, knots)
    e = lambda z: mp.exp(-z / m) / m
    log_ratio = lambda z: -lam1 * z - lam2 * z * z - mp.log(total) + z / m + mp.log(m)
    forward = expect(q, log_ratio, knots)
    backward = -expect(e, log_ratio, mp.linspace(0, 110 * m, 25))
    assert forward > 0 and backward > 0
    assert same(forward + backward, lam2 * (2 * m**2 - v))
    assert m**2 < v < 2 * m**2


def test_a_truncated_normal_exists_for_every_second_moment_between():
    """exp(-t z - z²) on the half line has every ratio between 1 and 2; scaled, it meets any pair of constraints."""

    def moments(t):
        # by the error function, with the sum of the exponents kept small
        half = mp.sqrt(mp.pi) / 2 * mp.erfc(t / 2) * mp.exp(t * t / 4)
        first = (1 - t * half) / 2
        return first / half, (half - t * first) / 2 / half

    def ratio(t):
        mean, second = moments(t)
        return second / mean**2

    with mp.workdps(60):
        assert 1 < ratio(mp.mpf(-200)) < mp.mpf("1.0001") and mp.mpf("1.999") < ratio(mp.mpf(200)) < 2
        for wanted in ("1.02", "1.3", "1.5708", "1.9", "1.98"):
            t = mp.findroot(lambda t, wanted=wanted: ratio(t) - mp.mpf(wanted), (-30, 60), solver="anderson", tol=1e-40)
            m = mp.mpf("1.7")
            scale = m / moments(t)[0]
            lam1, lam2 = t / scale, 1 / scale**2
            shape = lambda z, lam1=lam1, lam2=lam2: mp.exp(-lam1 * z - lam2 * z * z + min(0, lam1) ** 2 / (-4 * lam2))
            knots = mp.linspace(0, 80 * m, 81)
            total, first, second = (quad(lambda z, k=k, shape=shape: z**k * shape(z), knots) for k in (0, 1, 2))
            assert same(first / total, m, 20) and same(second / total, mp.mpf(wanted) * m * m, 20)


@pytest.mark.parametrize(("m", "v"), [("1", "2.01"), ("0.2", "0.3"), ("3", "100")])
def test_the_numbers_of_the_escaping_mass_exist(m, v):
    """The sign of the second constraint changes between any fixed length and m / epsilon, for small epsilon."""
    m, v = mp.mpf(m), mp.mpf(v)
    assert v > 2 * m**2
    for power in (4, 6, 8):
        epsilon = mp.mpf(10) ** -power
        mean = lambda far: (m - epsilon * far) / (1 - epsilon)
        excess = lambda far: 2 * (1 - epsilon) * mean(far) ** 2 + epsilon * (far**2 + mp.mpf(1) / 12) - v
        least = max(m, mp.mpf(1) / 2)
        assert excess(least) < 0 < excess(m / epsilon) and abs(mean(m / epsilon)) < mp.mpf(10) ** -30
        far = mp.findroot(excess, (least, m / epsilon), solver="anderson", tol=1e-30)
        assert far > mp.mpf(1) / 2 and mean(far) > 0


def test_only_the_mean_on_the_line_has_no_bound():
    a = sp.symbols("a", positive=True)
    assert sp.limit(sp.log(2 * a), a, sp.oo) == sp.oo


# --- the codes


def double_well(weight):
    """The minimiser of E(Z^2 - 1)^2 - weight * H at variance 1: its density, knots and both terms."""
    knots = mp.linspace(-9, 9, 13)
    moment = lambda b, k: quad(lambda z: z**k * mp.exp(-(z**4) / weight - b * z * z), knots)
    b = mp.findroot(lambda b: moment(b, 2) / moment(b, 0) - 1, (mp.mpf(1) / 2 - 3 / weight, mp.mpf(1) / 2))
    total = moment(b, 0)
    density = lambda z: mp.exp(-(z**4) / weight - b * z * z) / total
    cost = expect(density, lambda z: (z * z - 1) ** 2, knots)
    value = mp.log(total) + expect(density, lambda z: z**4, knots) / weight + b
    return density, knots, cost, value, b


@pytest.mark.checks("eq-max_entropy-doublewell", how="exact")
def test_the_double_well_minimiser():
    assert same(expect(normal, lambda z: (z * z - 1) ** 2), 2)  # the cost of N(0, 1)
    weight = mp.mpf(1.5)
    density, knots, cost, value, _ = double_well(weight)
    assert same(expect(density, lambda z: 1, knots), 1) and same(expect(density, lambda z: z * z, knots), 1)
    objective = lambda p, where: expect(p, lambda z: (z * z - 1) ** 2, where) - weight * entropy(p, where)
    assert same(objective(density, knots), cost - weight * value, 25)
    rivals = [(Mixture(seed), None) for seed in range(3)] + [(normal, LINE)]
    symmetric = Mixture(0)  # two bumps with variance 1, the kind the cost asks for
    symmetric.weights, symmetric.means, symmetric.widths = (
        [mp.mpf(1) / 2] * 2,
        [mp.mpf(-0.9), mp.mpf(0.9)],
        [mp.sqrt(1 - mp.mpf(0.9) ** 2)] * 2,
    )
    for p, where in [*rivals, (symmetric, None)]:
        assert objective(p, where or p.knots) > cost - weight * value


@pytest.mark.checks("eq-max_entropy-tradeoff", how="exact")
def test_the_price_of_reconstruction():
    for weight in (mp.mpf(0.4), mp.mpf(2), mp.mpf(25)):
        density, _, cost, value, _ = double_well(weight)
        gap = divergence(density, normal, mp.linspace(-6, 6, 13)) if weight < 5 else max_entropy() - value
        assert same(gap, max_entropy() - value, 20)
        assert 0 < gap <= (2 - cost) / weight <= 2 / weight


@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(0, 5)), min_size=1, max_size=8), st.floats(0, 5), st.floats(0.05, 20)
)
def test_the_price_of_reconstruction_among_any_candidates(candidates, cost_of_normal, weight):
    # each candidate is (gap, cost): an encoder chooses the best, and N(0, I) with gap 0 is among them
    pool = [*candidates, (0.0, cost_of_normal)]
    gap, cost = min(pool, key=lambda pair: pair[1] + weight * pair[0])
    assert gap <= (cost_of_normal - cost) / weight + 1e-9
    assert gap <= cost_of_normal / weight + 1e-9


@pytest.mark.checks("eq-max_entropy-samuelson", how="exact")
def test_a_normalised_batch_is_bounded():
    rng = random.Random(8)
    for n in (2, 3, 10, 100):
        for scale in (1, 30):
            z = [mp.mpf(rng.gauss(0, 1)) for _ in range(n)]
            z[0] *= scale
            mean = mp.fsum(z) / n
            spread = mp.sqrt(mp.fsum((x - mean) ** 2 for x in z) / n)
            z = [(x - mean) / spread for x in z]
            assert max(abs(x) for x in z) <= mp.sqrt(n - 1) + mp.mpf(10) ** -35
            if n == 2:
                assert same(abs(z[0]), 1) and same(abs(z[1]), 1)
        one_out = [mp.sqrt(n - 1)] + [-1 / mp.sqrt(n - 1)] * (n - 1)  # the case of equality
        assert same(mp.fsum(one_out), 0) and same(mp.fsum(x * x for x in one_out), n)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_a_normalised_batch_is_bounded_as_a_property(values):
    z = np.array(values)
    assume(z.std() > 1e-6 * max(1.0, np.abs(z).max()))
    z = (z - z.mean()) / z.std()
    assert np.abs(z).max() <= math.sqrt(len(z) - 1) * (1 + 1e-6)


def test_the_numbers_in_the_warning_on_totals():
    assert 128 * 0.01 == pytest.approx(1.28) and math.sqrt(1.28 / 2) == pytest.approx(0.8)


# --- exercises


@pytest.mark.checks("eq-max_entropy-lognormal", how="exact")
def test_entropy_of_the_log_normal():
    mu, sigma = mp.mpf(-0.4), mp.mpf(0.7)
    density = lambda z: normal((mp.log(z) - mu) / sigma) / (sigma * z)
    knots = [mp.exp(mu + sigma * x) for x in mp.linspace(-14, 14, 45)]
    assert same(entropy(density, knots), mu + mp.log(2 * mp.pi * mp.e * sigma**2) / 2, 25)


@pytest.mark.checks("eq-max_entropy-geometric", how="symbolic")
def test_entropy_of_the_geometric():
    i = sp.symbols("i", integer=True, positive=True)
    q = sp.symbols("q", positive=True)  # q = 1 - 1/m
    mean = sp.summation(i * q ** (i - 1) * (1 - q), (i, 1, sp.oo))
    mean = sp.piecewise_fold(mean).args[0][0]  # the branch q < 1
    assert sp.simplify(mean - 1 / (1 - q)) == 0
    m = sp.symbols("m", positive=True)
    value = sp.log(m) - (m - 1) * sp.log(1 - 1 / m)
    assert sp.limit(value - 1 - sp.log(m), m, sp.oo) == 0
    assert sp.limit(m * (value - 1 - sp.log(m)), m, sp.oo) == -sp.Rational(1, 2)  # so the remainder is O(1/m)
    for number in (mp.mpf(1.5), mp.mpf(4)):
        ratio = 1 - 1 / number
        p = lambda k: ratio ** (k - 1) / number
        direct = -mp.fsum(p(k) * mp.log(p(k)) for k in range(1, 600))
        closed = mp.log(number) - (number - 1) * mp.log(ratio)
        assert same(direct, closed)
        poisson = lambda k: mp.exp(-(number - 1)) * (number - 1) ** (k - 1) / mp.factorial(k - 1)
        assert -mp.fsum(poisson(k) * mp.log(poisson(k)) for k in range(1, 90)) < closed  # same mean, less entropy


@pytest.mark.checks("eq-max_entropy-sphere", how="exact")
@pytest.mark.parametrize("d", [2, 3, 8, 33])
def test_moments_of_a_coordinate_of_the_sphere(d):
    # from the density of a coordinate, proportional to (1 - x^2/d)^((d-3)/2); x = sqrt(d) sin(a)
    moment = lambda k: quad(lambda a: (mp.sqrt(d) * mp.sin(a)) ** k * mp.cos(a) ** (d - 2), [-mp.pi / 2, mp.pi / 2])
    assert same(moment(2) / moment(0), 1)
    assert same(moment(4) / moment(0), mp.mpf(3 * d) / (d + 2))
    length = lambda k: mp.mpf(2) ** (mp.mpf(k) / 2) * mp.gamma(mp.mpf(d + k) / 2) / mp.gamma(mp.mpf(d) / 2)
    assert same(length(2), d) and same(length(4), d * (d + 2))  # E|G|^2 and E|G|^4


@pytest.mark.checks("eq-max_entropy-temperature", how="symbolic")
def test_entropy_rises_with_temperature():
    t = sp.symbols("T", positive=True)
    s = sp.symbols("s1:4", real=True)
    total = sum(sp.exp(x / t) for x in s)
    p = [sp.exp(x / t) / total for x in s]
    mean = sum(q * x for q, x in zip(p, s, strict=True))
    variance = sum(q * x**2 for q, x in zip(p, s, strict=True)) - mean**2
    own = -sum(q * sp.log(q) for q in p)
    assert sp.simplify(sp.expand_log(sp.diff(own, t) - variance / t**3, force=True)) == 0
    numbers = dict(zip(s, (1, 1, 0), strict=True))  # two scores share the maximum
    assert sp.limit(own.subs(numbers), t, sp.oo) == sp.log(3)
    assert abs(float(own.subs(numbers).subs(t, sp.Rational(1, 200))) - math.log(2)) < 1e-12
