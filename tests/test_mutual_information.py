"""The chapter *Mutual information*, equation by equation.

Discrete statements are summed over random tables, continuous ones integrated, with mpmath to 30 digits; minima are
found by SymPy. The source's form of an equation fails where the chapter says that it does.
"""

# ruff: noqa: B023, E731 - short lambdas, used at once, read best in tests of formulas
import itertools
import math
import random

import mpmath as mp
import pytest
import sympy as sp
import torch
from helpers import assert_z

from gae_core.information import (
    dv_terms,
    gaussian_information,
    info_nce_terms,
    jsd_terms,
    nwj_terms,
    permute_rows,
    reconstruction_terms,
)

DIGITS = 30


@pytest.fixture(autouse=True)
def precision():
    with mp.workdps(DIGITS + 10):
        yield


def same(left, right, digits=DIGITS):
    return abs(left - right) <= mp.mpf(10) ** -digits * max(1, abs(right))


def draws(seed, n, low=0.05, high=1.0):
    rng = random.Random(seed)
    return [mp.mpf(rng.uniform(low, high)) for _ in range(n)]


def table(seed, shape=(3, 4)):
    """A random joint distribution as {(x, z): probability}."""
    weights = draws(seed, math.prod(shape))
    total = mp.fsum(weights)
    return dict(zip(itertools.product(*map(range, shape)), [w / total for w in weights], strict=True))


def marginal(joint, *axes):
    out = {}
    for key, p in joint.items():
        part = tuple(key[axis] for axis in axes)
        out[part] = out.get(part, mp.mpf(0)) + p
    return out


def entropy(p):
    return -mp.fsum(v * mp.log(v) for v in p.values() if v)


def divergence(p, q):
    return mp.fsum(v * mp.log(v / q[key]) for key, v in p.items() if v)


def product(joint):
    x, z = marginal(joint, 0), marginal(joint, 1)
    return {(i, j): x[i,] * z[j,] for (i,) in x for (j,) in z}


def information(joint):
    return divergence(joint, product(joint))


def mean(p, f):
    return mp.fsum(v * f(*key) for key, v in p.items() if v)


def critic(seed, joint, scale=2):
    """Random scores {(x, z): T}."""
    return {key: scale * (t - mp.mpf("0.5")) for key, t in zip(joint, draws(seed + 99, len(joint)), strict=True)}


def normal(x, mu=0, var=1):
    return mp.exp(-((x - mu) ** 2) / (2 * mp.mpf(var))) / mp.sqrt(2 * mp.pi * var)


def quad(f, knots):
    return mp.quad(f, knots, method="gauss-legendre")


# --- from entropy to information ---


@pytest.mark.checks("eq-mutual_information-entropies", how="exact")
@pytest.mark.parametrize("seed", range(3))
def test_information_by_entropies(seed):
    p = table(seed)
    x, z = marginal(p, 0), marginal(p, 1)
    x_given_z = mean(p, lambda i, j: -mp.log(p[i, j] / z[j,]))
    z_given_x = mean(p, lambda i, j: -mp.log(p[i, j] / x[i,]))
    for value in (entropy(x) - x_given_z, entropy(z) - z_given_x, entropy(x) + entropy(z) - entropy(p)):
        assert same(value, information(p))


def deterministic(seed, G):
    z = table(seed, (len(G), 1))
    return {(G[k], k): p for (k, _), p in z.items()}


@pytest.mark.checks("eq-mutual_information-discrete", how="exact")
@pytest.mark.parametrize("G", [[0, 0, 1, 2, 1], [3, 1, 0, 2], [0, 0, 0]])
def test_discrete_codes_carry_the_entropy_of_their_samples(G):
    p = deterministic(1, G)
    joint = {key: p.get(key, mp.mpf(0)) for key in itertools.product(set(G), range(len(G)))}
    assert same(information(joint), entropy(marginal(p, 0)))
    z = marginal(p, 1)
    assert same(mean(p, lambda x, k: -mp.log(p[x, k] / z[k,])), 0)


def test_the_example_of_eight_codes_in_bits():
    p = {(x, z): mp.mpf(1) / 8 for z, x in enumerate([0, 0, 0, 0, 1, 1, 2, 3])}
    joint = {key: p.get(key, mp.mpf(0)) for key in itertools.product(range(4), range(8))}
    assert same(information(joint) / mp.log(2), mp.mpf("1.75"))


@pytest.mark.checks("eq-mutual_information-cells", how="exact")
@pytest.mark.parametrize("k", [2, 5, 40])
def test_cells_of_a_deterministic_sample_carry_their_own_entropy(k):
    """For x = sinh z and z normal: I(c; z) integrated over z as the mean divergence of p(c | z) from p(c)."""
    edges = [-mp.inf, *[mp.sqrt(2) * mp.erfinv(2 * mp.mpf(i) / k - 1) for i in range(1, k)], mp.inf]
    pi = [mp.ncdf(b) - mp.ncdf(a) for a, b in itertools.pairwise(edges)]
    # For z in cell c the divergence of the sure c from pi is log(1 / pi_c); z is in the cell when sinh z is.
    cut = [min(max(e, -20), 20) for e in edges]
    value = mp.fsum(
        quad(normal, mp.linspace(a, b, 5)) * -mp.log(p) for (a, b), p in zip(itertools.pairwise(cut), pi, strict=True)
    )
    assert same(value, mp.log(k))
    assert same(-mp.fsum(p * mp.log(p) for p in pi), value)


def atoms(seed, n=4):
    weights = draws(seed, n)
    return [w / mp.fsum(weights) for w in weights], [4 * v - 2 for v in draws(seed + 50, n)]


def mixed_information(density, weights, places, knots):
    """Information of x on which of the places its density is centred at, by its definition."""

    def integrand(x):
        parts = [density(x, place) for place in places]
        mix = mp.fsum(w * part for w, part in zip(weights, parts, strict=True))
        return mp.fsum(w * part * mp.log(part / mix) for w, part in zip(weights, parts, strict=True))

    return mp.quad(integrand, knots, method="gauss-legendre", maxdegree=5)


@pytest.mark.checks("eq-mutual_information-noise", how="exact")
@pytest.mark.parametrize("tau", ["0.3", "1.2"])
def test_with_noise_the_information_is_the_entropy_less_a_constant(tau):
    """Codes with four values, G(z) arbitrary."""
    tau = mp.mpf(tau)
    weights, places = atoms(3)
    density = lambda x, place: normal(x, place, tau**2)
    knots = mp.linspace(min(places) - 16 * tau, max(places) + 16 * tau, 40)
    mix = lambda x: mp.fsum(w * density(x, place) for w, place in zip(weights, places, strict=True))
    h = mp.quad(lambda x: -mix(x) * mp.log(mix(x)), knots, method="gauss-legendre", maxdegree=5)
    value = mixed_information(density, weights, places, knots)
    assert same(value, h - mp.log(2 * mp.pi * mp.e * tau**2) / 2)
    assert not same(value, h, 1)  # the source's I = H


def random_matrix(seed, rows, columns):
    return mp.matrix(rows, columns) + mp.matrix(
        [[2 * v - 1 for v in draws(seed + 7 * i, columns)] for i in range(rows)]
    )


def block(a, rows, columns):
    return mp.matrix([[a[i, j] for j in columns] for i in rows])


@pytest.mark.checks("eq-mutual_information-gaussian", how="exact")
@pytest.mark.parametrize("seed", range(2))
def test_information_of_gaussian_vectors(seed):
    """Against the divergence of N(0, Sigma) from the product, with its trace, and the package."""
    root = random_matrix(seed, 5, 7)
    cov = root * root.T
    x, z = range(2), range(2, 5)
    xx, zz, xz = block(cov, x, x), block(cov, z, z), block(cov, x, z)
    apart = mp.matrix(5, 5)
    for i, j in itertools.product(range(5), range(5)):
        apart[i, j] = cov[i, j] if (i < 2) == (j < 2) else 0
    solved = mp.inverse(apart) * cov
    kl = (mp.fsum(solved[i, i] for i in range(5)) - 5 - mp.log(mp.det(cov) / mp.det(apart))) / 2
    assert same(mp.log(mp.det(xx) * mp.det(zz) / mp.det(cov)) / 2, kl)
    inner = mp.eye(3) - mp.inverse(zz) * xz.T * mp.inverse(xx) * xz
    assert same(-mp.log(mp.det(inner)) / 2, kl)
    tensor = torch.tensor([[float(cov[i, j]) for j in range(5)] for i in range(5)], dtype=torch.float64)
    assert float(gaussian_information(tensor, 2)) == pytest.approx(float(kl), rel=1e-10)


def linear_channel(seed, D=4, d=3, tau="0.6"):
    A, tau = random_matrix(seed, D, d), mp.mpf(tau)
    S = mp.inverse(mp.eye(d) + A.T * A / tau**2)
    return A, tau, S


@pytest.mark.checks("eq-mutual_information-linear", how="exact")
@pytest.mark.parametrize("seed", range(2))
def test_information_of_a_linear_generator(seed):
    A, tau, S = linear_channel(seed)
    xx = A * A.T + tau**2 * mp.eye(4)
    by_entropies = (mp.log(mp.det(xx)) - 4 * mp.log(tau**2)) / 2
    assert same(mp.log(mp.det(mp.eye(4) + A * A.T / tau**2)) / 2, by_entropies)
    assert same(-mp.log(mp.det(S)) / 2, by_entropies)
    conditional = mp.eye(3) - A.T * mp.inverse(xx) * A  # covariance of z given x
    assert all(same(conditional[i, j], S[i, j]) for i in range(3) for j in range(3))


# --- the bound by a decoder ---


def conditional_density(seed, p):
    """A random r(z | x) for each x as {(x, z): r}."""
    weights = dict(zip(p, draws(seed + 31, len(p)), strict=True))
    total = marginal(weights, 0)
    return {key: w / total[key[0],] for key, w in weights.items()}


@pytest.mark.checks("eq-mutual_information-barber-agakov", how="exact")
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_and_its_gap(seed):
    p = table(seed)
    r, x, h = conditional_density(seed, p), marginal(p, 0), entropy(marginal(p, 1))
    posterior = {(i, j): v / x[i,] for (i, j), v in p.items()}
    gaps = {i: mp.fsum(posterior[i, j] * mp.log(posterior[i, j] / r[i, j]) for j in range(4)) for (i,) in x}
    bound = h + mean(p, lambda i, j: mp.log(r[i, j]))
    assert same(bound + mp.fsum(x[i,] * gaps[i] for i in gaps), information(p))
    assert bound < information(p)
    assert same(h + mean(p, lambda i, j: mp.log(posterior[i, j])), information(p))
    # The source has the divergence without the mean over x.
    assert all(not same(bound + gap, information(p), 8) for gap in gaps.values())


@pytest.mark.checks("eq-mutual_information-drop", how="symbolic")
def test_without_the_entropy_of_the_codes_it_is_no_bound():
    z, width = sp.symbols("z a", positive=True)
    half = sp.Rational(1, 2)
    mean_log = sp.integrate(sp.log(2) * 2, (z, 0, half))  # r = p(z) = 2, independent of x
    h = -sp.integrate(2 * sp.log(2), (z, 0, half))
    assert mean_log == sp.log(2) > 0
    assert mean_log + h == 0
    # The same with the best Gaussian decoder, of variance 1/48: still above the information, 0.
    var = sp.Rational(1, 48)
    gaussian = (
        sp.integrate(2 * (-((z - sp.Rational(1, 4)) ** 2) / (2 * var)), (z, 0, half)) - sp.log(2 * sp.pi * var) / 2
    )
    assert gaussian > 0
    assert gaussian + h < 0
    # It is legal where H(z) >= 0: for uniform codes, from width 1 on.
    assert sp.solve(sp.Eq(sp.log(width), 0), width) == [1]
    # The package keeps the constant.
    sample = 0.5 * torch.rand(10_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guess = torch.full_like(sample, 0.25)
    assert reconstruction_terms(sample, guess, 48**-0.5, entropy=math.log(0.5)).mean() < 0
    assert reconstruction_terms(sample, guess, 48**-0.5, entropy=0.0).mean() > 0.4  # the source's


@pytest.mark.checks("eq-mutual_information-decoder", how="exact")
@pytest.mark.parametrize("sigma", ["0.3", "1.1"])
def test_the_gaussian_decoder_with_its_constants(sigma):
    """For z normal in two dimensions, x = z + tau eps: integrated coordinate by coordinate, for a poor encoder."""
    sigma, tau, slope, shift, d = mp.mpf(sigma), mp.mpf("0.5"), mp.mpf("0.6"), mp.mpf("0.2"), 2
    spread = (1 - slope) ** 2 + (slope * tau) ** 2  # variance of z - E(x), E(x) = slope x + shift
    knots = mp.linspace(-16, 16, 30)

    def log_density(factor):
        one = lambda e: -(e**2) / (2 * sigma**2) - factor
        return d * quad(lambda e: normal(e, -shift, spread) * one(e), knots)

    right_factor = mp.log(2 * mp.pi * sigma**2) / 2
    h = d * mp.log(2 * mp.pi * mp.e) / 2
    error = d * (spread + shift**2)
    bound = h - mp.mpf(d) / 2 * mp.log(2 * mp.pi * sigma**2) - error / (2 * sigma**2)
    assert same(h + log_density(right_factor), bound)
    assert bound < d * mp.log(1 + 1 / tau**2) / 2
    # The source's factor has the exponent -1/2 for every d.
    assert not same(h - mp.log(2 * mp.pi * sigma**2) / 2 - error / (2 * sigma**2), bound, 2)


def test_the_sources_normaliser_breaks_the_bound_in_several_dimensions():
    """With 1 / (sqrt(2 pi) sigma) in d = 8 the density has mass (2 pi sigma^2)^{7/2}, and the bound exceeds I."""
    d, tau = 8, 1.0
    true = 0.5 * d * math.log(1 + 1 / tau**2)
    s2 = tau**2 / (1 + tau**2)  # variance of z given x
    h = 0.5 * d * math.log(2 * math.pi * math.e)
    right, wrong = (h - 0.5 * k * math.log(2 * math.pi * s2) - d / 2 for k in (d, 1))
    assert right == pytest.approx(true)
    assert wrong > true + 3


@pytest.mark.checks("eq-mutual_information-cap", how="symbolic")
def test_a_fixed_sigma_caps_the_bound():
    d, sigma, error = sp.symbols("d sigma epsilon", positive=True)
    entropy_of_normal = d / 2 * sp.log(2 * sp.pi * sp.E)
    bound = entropy_of_normal - d / 2 * sp.log(2 * sp.pi * sigma**2) - error / (2 * sigma**2)
    cap = d * (sp.Rational(1, 2) - sp.log(sigma))
    assert sp.simplify(sp.expand_log(cap - bound, force=True) - error / (2 * sigma**2)) == 0
    half = cap.subs(sigma, sp.sqrt(sp.Rational(1, 2)))
    assert sp.simplify(sp.expand_log(half - d / 2 * (1 + sp.log(2)), force=True)) == 0
    assert abs(float(half / d) - 0.847) < 5e-4
    # Weight 1 is sigma^2 = 1/2: the coefficient of the squared error.
    assert sp.diff(bound, error).subs(sigma, sp.sqrt(sp.Rational(1, 2))) == -1


@pytest.mark.checks("eq-mutual_information-best", how="symbolic")
def test_the_best_sigma():
    sigma = sp.symbols("sigma", positive=True)
    e = sp.symbols("e0:3", positive=True)
    one = -sp.log(2 * sp.pi * sigma**2) / 2 - e[0] ** 2 / (2 * sigma**2)
    assert sp.solve(sp.diff(one, sigma), sigma) == [e[0]]
    assert sp.diff(one, sigma, 2).subs(sigma, e[0]).is_negative
    d = len(e)
    square = sum(v**2 for v in e)
    common = -d * sp.log(2 * sp.pi * sigma**2) / 2 - square / (2 * sigma**2)
    (best,) = sp.solve(sp.diff(common, sigma), sigma)
    assert sp.simplify(best**2 - square / d) == 0
    at_best = sum(one.subs(e[0], v).subs(sigma, v) for v in e)
    claimed = -sp.Rational(d, 2) * sp.log(2 * sp.pi * sp.E) - sum(sp.log(v) for v in e)
    assert sp.simplify(sp.expand_log(at_best - claimed, force=True)) == 0
    claimed_common = -sp.Rational(d, 2) * sp.log(2 * sp.pi * sp.E) - d * sp.log(best)
    assert sp.simplify(sp.expand_log(common.subs(sigma, best) - claimed_common, force=True)) == 0
    # The second line: sums of logarithms against the logarithm of the mean square.
    for seed in range(20):
        values = [float(v) for v in draws(seed, d)]
        gap = d * math.log(math.sqrt(sum(v**2 for v in values) / d)) - sum(map(math.log, values))
        assert gap > 0
    assert (
        sp.simplify(sp.expand_log(sum(sp.log(v) for v in e) - d * sp.log(best), force=True).subs({v: 2 for v in e}))
        == 0
    )


@pytest.mark.checks("eq-mutual_information-tight", how="exact")
@pytest.mark.parametrize("seed", range(3))
def test_where_the_linear_channel_makes_the_bound_tight(seed):
    A, _, S = linear_channel(seed)
    d = 3

    def values(S):
        trace = mp.fsum(S[i, i] for i in range(d))
        diagonal = -mp.fsum(mp.log(S[i, i]) for i in range(d)) / 2
        return -mp.log(mp.det(S)) / 2, diagonal, -mp.mpf(d) / 2 * mp.log(trace / d)

    full, diagonal, scalar = values(S)
    assert full > diagonal > scalar
    # The mean log-likelihood of z under N(E[z|x], S'), for the three S': mean of the quadratic form is tr S'^-1 S.
    h = d * mp.log(2 * mp.pi * mp.e) / 2
    trace = mp.fsum(S[i, i] for i in range(d))
    for value, cov in ((full, S), (diagonal, mp.diag([S[i, i] for i in range(d)])), (scalar, trace / d * mp.eye(d))):
        solved = mp.inverse(cov) * S
        form = mp.fsum(solved[i, i] for i in range(d))
        assert same(h - mp.log((2 * mp.pi) ** d * mp.det(cov)) / 2 - form / 2, value)
    # Rotated to the eigenvectors of A^T A the first inequality is an equality, and the trace stays.
    _, Q = mp.eigsy(A.T * A)
    rotated = values(Q.T * S * Q)
    assert same(rotated[1], full, 25)
    assert same(rotated[2], scalar, 25)
    equal = values(S[0, 0] * mp.eye(d))
    assert same(equal[0], equal[1])
    assert same(equal[1], equal[2])


def folded(tau):
    """Density of |z| + tau eps: a sum of two skewed halves, from completing the square."""
    var = 1 + tau**2
    return lambda x: 2 * normal(x, 0, var) * mp.ncdf(x / (tau * mp.sqrt(var)))


def folded_information(tau, knots=60):
    density = folded(tau)
    h = quad(lambda x: -density(x) * mp.log(density(x)) if density(x) else 0, mp.linspace(-12 * tau, 12, knots))
    return h - mp.log(2 * mp.pi * mp.e * tau**2) / 2


@pytest.mark.checks("eq-mutual_information-fold", how="exact")
def test_a_fold_costs_one_bit_of_entropy_and_the_whole_bound():
    h = quad(lambda x: -2 * normal(x) * mp.log(2 * normal(x)), mp.linspace(0, 20, 30))
    assert same(h, mp.log(2 * mp.pi * mp.e) / 2 - mp.log(2))
    tau = mp.mpf("0.2")
    for x in (mp.mpf("-0.3"), mp.mpf("0.1"), mp.mpf("1.7")):
        knots = [-15, -8, -abs(x) - 2, -abs(x), -abs(x) / 2, 0, abs(x) / 2, abs(x), abs(x) + 2, 8, 15]
        likelihood = lambda z, x=x: normal(z) * normal(x, abs(z), tau**2)
        assert same(quad(lambda z, f=likelihood: z * f(z), knots), 0)
        assert same(quad(likelihood, knots), folded(tau)(x), 20)  # the density used below


def test_raising_the_bound_is_not_raising_the_information():
    """The order of two generators reversed, which no equivalence of the two would allow."""
    fold, line = mp.mpf("0.2"), mp.mpf(1)
    with mp.workdps(15):
        information_fold = folded_information(fold)
    information_line = mp.log(1 + 1 / line**2) / 2
    bound_fold, bound_line = mp.mpf(0), -mp.log(mp.sqrt(line**2 / (1 + line**2)))
    assert information_fold > information_line + mp.mpf("0.5")
    assert same(bound_line, information_line)
    assert bound_fold < bound_line
    assert (mp.nstr(information_fold, 3), mp.nstr(information_line, 2)) == ("1.08", "0.35")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(100_000, 1, generator=generator, dtype=torch.float64)
    assert float(reconstruction_terms(z, torch.zeros_like(z)).mean()) == pytest.approx(0, abs=0.01)


def test_a_sigma_that_depends_on_x_sees_the_size_of_a_folded_code_and_no_more():
    """The best one leaves -E log E[z² | x] / 2: more than 0, and for every noise less than -E log z² / 2."""

    def bound(tau):
        density = folded(tau)
        s2 = tau**2 / (1 + tau**2)  # z = |z| is normal with this variance, cut off at 0, given x

        def square(x):
            m = x / (1 + tau**2)
            return m**2 + s2 + m * mp.sqrt(s2) * normal(m / mp.sqrt(s2)) / mp.ncdf(m / mp.sqrt(s2))

        return quad(lambda x: -density(x) * mp.log(square(x)) / 2, mp.linspace(-10 * tau, 12, 60))

    with mp.workdps(15):
        x, tau = mp.mpf("0.4"), mp.mpf("0.2")  # the second moment, by quadrature
        joint = lambda z: 2 * normal(z) * normal(x, z, tau**2)
        knots = mp.linspace(0, 3, 20)
        second = quad(lambda z: z * z * joint(z), knots) / quad(joint, knots)
        m, s = x / (1 + tau**2), tau / mp.sqrt(1 + tau**2)
        assert abs(second - m**2 - s**2 - m * s * normal(m / s) / mp.ncdf(m / s)) < 1e-12
        found = [bound(mp.mpf(t)) for t in ("1", "0.2", "0.05", "0.01")]
        limit = (mp.euler + mp.log(2)) / 2
        assert abs(quad(lambda z: -2 * normal(z) * mp.log(z), [0, "1e-6", "1e-3", 0.1, 1, 4, 12]) - limit) < 1e-5
        assert mp.nstr(limit, 3) == "0.635" and mp.nstr(found[1], 2) == "0.44"
        assert 0 < found[0] < found[1] < found[2] < found[3] < limit < found[3] + mp.mpf("0.03")
        line = mp.log(1 + 1 / mp.mpf("0.5") ** 2) / 2  # tight there, and more than the limit
        assert line > limit > found[2]
        assert folded_information(mp.mpf("0.05")) > line + mp.mpf("0.5")


@pytest.mark.parametrize(("fold", "line"), [("0.2", "1"), ("0.2", "0.2"), ("0.05", "0.3"), ("0.7", "2")])
def test_a_fold_with_less_noise_has_less_entropy_though_it_may_have_more_information(fold, line):
    """|z| + fold eps has a variance below 1 + line², and no density of that variance has more than the normal one."""
    fold, line = mp.mpf(fold), mp.mpf(line)
    with mp.workdps(15):
        entropy_fold = folded_information(fold) + mp.log(2 * mp.pi * mp.e * fold**2) / 2
    entropy_line = mp.log(2 * mp.pi * mp.e * (1 + line**2)) / 2
    normal_of_its_variance = mp.log(2 * mp.pi * mp.e * (1 - 2 / mp.pi + fold**2)) / 2
    assert entropy_fold < normal_of_its_variance < entropy_line
    if (fold, line) == (mp.mpf("0.2"), 1):  # as the chapter has it
        assert (mp.nstr(entropy_fold, 2), mp.nstr(entropy_line, 3)) == ("0.89", "1.77")
    # The same noise on both: the fold costs what its sign may tell, a bit at most (H(s y) <= H(y) + H(s)).
    if fold == line:
        lost = entropy_line - entropy_fold
        assert 0 < lost < mp.log(2)


# --- bounds by a critic ---


@pytest.mark.checks("eq-mutual_information-dv", how="exact")
@pytest.mark.checks("eq-mutual_information-nwj", how="exact")
@pytest.mark.parametrize("seed", range(3))
def test_the_gaps_of_donsker_varadhan_and_nwj(seed):
    p = table(seed)
    q, T = product(p), critic(seed, p)
    partition = mean(q, lambda *k: mp.exp(T[k]))
    tilted = {k: v * mp.exp(T[k]) / partition for k, v in q.items()}
    dv = mean(p, lambda *k: T[k]) - mp.log(partition)
    assert same(dv, information(p) - divergence(p, tilted))
    u = mean(q, lambda *k: mp.exp(T[k] - 1))
    nwj = mean(p, lambda *k: T[k]) - u
    assert same(nwj, dv - (u - 1 - mp.log(u)))
    assert nwj < dv < information(p)
    best = {k: mp.log(p[k] / q[k]) for k in p}
    for c in (mp.mpf(-2), mp.mpf(3)):
        value = mean(p, lambda *k: best[k] + c) - mp.log(mean(q, lambda *k: mp.exp(best[k] + c)))
        assert same(value, information(p))
        shifted = mean(p, lambda *k: best[k] + c) - mean(q, lambda *k: mp.exp(best[k] + c - 1))
        assert shifted < information(p)
    assert same(mean(p, lambda *k: best[k] + 1) - mean(q, lambda *k: mp.exp(best[k])), information(p))


@pytest.mark.checks("eq-mutual_information-nce", how="exact")
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("best", [True, False])
def test_nce_over_all_batches(size, best):
    """Every batch of pairs from a small joint distribution, with its probability."""
    p = {k: v for k, v in table(5, (2, 3)).items()}
    if best:  # nearly deterministic: the cap binds
        p = {(x, z): mp.mpf("0.4985") if x == z else mp.mpf("0.00075") for x in range(2) for z in range(3)}
        p = {k: v / mp.fsum(p.values()) for k, v in p.items()}
    q = product(p)
    T = {k: mp.log(p[k] / q[k]) for k in p} if best else critic(0, p)
    value = mp.mpf(0)
    for batch in itertools.product(p, repeat=size):
        term = mp.mpf(0)
        for x, z in batch:
            denominator = mp.fsum(mp.exp(T[x, other]) for _, other in batch) / size
            ratio = mp.exp(T[x, z]) / denominator
            assert ratio <= size * (1 + mp.mpf(10) ** -DIGITS)
            term += mp.log(ratio) / size
        value += mp.fprod(p[k] for k in batch) * term
    assert value < min(information(p), mp.log(size))


@pytest.mark.checks("eq-mutual_information-jsd", how="exact")
@pytest.mark.parametrize("seed", range(3))
def test_the_jensen_shannon_objective_and_its_gap(seed):
    p = table(seed)
    q, T = product(p), critic(seed, p)
    m = {k: (p[k] + q[k]) / 2 for k in p}
    jsd = (divergence(p, m) + divergence(q, m)) / 2
    sigma = lambda t: 1 / (1 + mp.exp(-t))
    objective = lambda T: mean(p, lambda *k: mp.log(sigma(T[k]))) + mean(q, lambda *k: mp.log(sigma(-T[k])))
    ratio = {k: mp.log(p[k] / q[k]) for k in p}

    def coins(*k):
        a, b = sigma(ratio[k]), sigma(T[k])
        return a * mp.log(a / b) + (1 - a) * mp.log((1 - a) / (1 - b))

    assert same(objective(T), 2 * jsd - mp.log(4) - 2 * mean(m, coins))
    assert same(objective(ratio), 2 * jsd - mp.log(4))
    assert -mp.log(4) <= objective(ratio) <= 0
    assert objective(T) < objective(ratio) < information(p)
    scores = torch.tensor([float(t) for t in T.values()], dtype=torch.float64)
    terms = jsd_terms(scores, scores)  # the same pairs on both sides, to weigh them by hand
    expected = [mp.log(sigma(t)) + mp.log(sigma(-t)) for t in T.values()]
    torch.testing.assert_close(terms, torch.tensor([float(e) for e in expected], dtype=torch.float64))


@pytest.mark.checks("eq-mutual_information-order", how="exact")
def test_the_divergence_puts_channels_in_another_order():
    def jsd(p):
        q = product(p)
        m = {k: (p[k] + q[k]) / 2 for k in p}
        return (divergence(p, m) + divergence(q, m)) / 2

    delta, K = mp.mpf("0.3"), 32
    erasure = {(x, z): delta / K if x == z else mp.mpf(0) for x in range(K) for z in range(K)}
    erasure |= {(K, z): (1 - delta) / K for z in range(K)}
    bit = {(x, z): mp.mpf(x == z) / 2 for x in range(2) for z in range(2)}
    assert same(information(erasure), delta * mp.log(K))
    assert same(information(bit), mp.log(2))
    assert same(jsd(bit), mp.mpf(3) / 4 * mp.log(mp.mpf(4) / 3))
    assert jsd(erasure) < delta * mp.log(2) < jsd(bit)
    assert information(erasure) > information(bit)
    assert (round(float(information(erasure)), 2), round(float(information(bit)), 2)) == (1.04, 0.69)


# --- what can be measured ---


@pytest.mark.checks("eq-mutual_information-variance", how="exact")
@pytest.mark.parametrize("rho", ["0.3", "0.6"])
def test_variance_of_the_ratio_under_the_product(rho):
    for seed in range(3):
        p = table(seed)
        q = product(p)
        variance = mean(q, lambda *k: (p[k] / q[k]) ** 2) - mean(q, lambda *k: p[k] / q[k]) ** 2
        assert same(variance, mean(p, lambda *k: p[k] / q[k]) - 1)
        assert variance > mp.exp(information(p)) - 1
    # Normal: E_q w^2 by the Gaussian integral of its quadratic form, a determinant; x in one dimension, z in two.
    rho, other = mp.mpf(rho), mp.mpf("0.5")
    cov = mp.matrix([[1, rho, 0], [rho, 2, other], [0, other, 1]])
    apart = mp.matrix([[1, 0, 0], [0, 2, other], [0, other, 1]])
    precision = 2 * mp.inverse(cov) - mp.inverse(apart)  # of p^2 / q
    second = mp.sqrt(mp.det(apart) / mp.det(precision)) / mp.det(cov)
    i = mp.log(mp.det(apart) / mp.det(cov)) / 2
    assert same(second - 1, mp.exp(2 * i) - 1)


def pairs(n, rho, generator):
    z = torch.randn(n, generator=generator, dtype=torch.float64)
    x = rho * z + math.sqrt(1 - rho**2) * torch.randn(n, generator=generator, dtype=torch.float64)
    return x, z


def log_ratio(x, z, rho):
    return -0.5 * math.log(1 - rho**2) - (rho**2 * (x**2 + z**2) - 2 * rho * x * z) / (2 * (1 - rho**2))


@pytest.mark.checks("eq-mutual_information-variance", how="statistical")
def test_variance_of_the_ratio_in_a_sample():
    rho, generator = 0.5, torch.Generator().manual_seed(0)
    variances = []
    for _ in range(400):
        x, z = pairs(1000, rho, generator)
        variances.append(log_ratio(x, permute_rows(z, generator=generator), rho).exp().var())
    assert_z(torch.stack(variances), 1 / (1 - rho**2) - 1)


@pytest.mark.checks("eq-mutual_information-dv-bias", how="exact")
def test_the_logarithm_of_a_batchs_mean_is_biased():
    """e^T with two values, so that the batch's mean is binomial: the expectation is a sum."""
    low, high, share = mp.mpf("0.4"), mp.mpf(3), mp.mpf("0.2")
    average, variance = share * high + (1 - share) * low, share * (1 - share) * (high - low) ** 2
    previous = None
    for m in (50, 100, 200, 400):
        expected = -mp.fsum(
            mp.binomial(m, k) * share**k * (1 - share) ** (m - k) * mp.log((k * high + (m - k) * low) / m)
            for k in range(m + 1)
        )
        bias = expected + mp.log(average)
        assert bias > 0
        rest = m**2 * abs(bias - variance / (2 * m * average**2))  # stays bounded: of order 1 / m^2
        assert rest < 1
        assert previous is None or abs(rest / previous - 1) < 0.2
        previous = rest


@pytest.mark.checks("eq-mutual_information-dv-bias", how="statistical")
def test_mine_is_too_high_and_nwj_is_not():
    rho, n, generator = 0.5, 20, torch.Generator().manual_seed(1)
    true = -0.5 * math.log(1 - rho**2)
    values = {"dv": [], "nwj": []}
    for _ in range(10_000):
        x, z = pairs(n, rho, generator)
        joint, apart = log_ratio(x, z, rho), log_ratio(*pairs(2 * n, 0.0, generator), rho)[:n]
        values["dv"].append(dv_terms(joint, apart).mean())
        values["nwj"].append(nwj_terms(joint + 1, apart + 1).mean())
    dv, nwj = (torch.stack(values[name]) for name in ("dv", "nwj"))
    assert_z(nwj, true)
    bias = (1 / (1 - rho**2) - 1) / (2 * n)  # 0.0083; the next order is near a tenth of it
    with pytest.raises(AssertionError):
        assert_z(dv, true)
    assert float(dv.mean()) - true == pytest.approx(bias, abs=0.25 * bias + 4 * float(dv.std()) / len(dv) ** 0.5)


@pytest.mark.parametrize("B", [4, 16])
def test_nce_is_low_on_average_and_below_its_cap_always(B):
    rho, generator = 0.9, torch.Generator().manual_seed(2)
    true = -0.5 * math.log(1 - rho**2)
    values = torch.stack(
        [
            info_nce_terms(log_ratio(x[:, None], z[None], rho)).mean()
            for x, z in (pairs(B, rho, generator) for _ in range(1000))
        ]
    )
    assert values.max() <= math.log(B)
    assert values.mean() + 4 * values.std() / len(values) ** 0.5 < true


@pytest.mark.checks("eq-mutual_information-log-n", how="exact")
@pytest.mark.parametrize("n", [2, 7, 30])
def test_without_limits_a_critic_finds_the_logarithm_of_the_sample(n):
    sample = {(i, j): mp.mpf(i == j) / n for i in range(n) for j in range(n)}
    assert same(information(sample), mp.log(n))  # which thm-...-critics makes the supremum
    for seed in range(3):
        T = {k: 8 * v for k, v in critic(seed, sample).items()}
        assert mean(sample, lambda *k: T[k]) - mp.log(mean(product(sample), lambda *k: mp.exp(T[k]))) < mp.log(n)
    for t in (mp.mpf(10), mp.mpf(60)):
        value = t - mp.log((n * mp.exp(t) + n**2 - n) / mp.mpf(n) ** 2)
        assert 0 < mp.log(n) - value < n * mp.exp(-t)
    # Without the diagonal there is no limit; the package's terms say the same.
    joint, apart = torch.full((n,), 500.0, dtype=torch.float64), torch.zeros(n, n - 1, dtype=torch.float64)
    assert float(dv_terms(joint, apart).mean()) == pytest.approx(500)
    scores = torch.zeros(n, n, dtype=torch.float64).fill_diagonal_(500.0)
    assert float(dv_terms(scores.diagonal(), scores).mean()) == pytest.approx(math.log(n))


@pytest.mark.checks("eq-mutual_information-permutation", how="exact")
@pytest.mark.parametrize("n", [2, 4, 5])
def test_a_permutation_leaves_a_row_in_place(n):
    f = dict(zip(itertools.product(range(n), range(n)), draws(n, n * n), strict=True))
    every = list(itertools.permutations(range(n)))
    average = mp.fsum(f[i, order[i]] for order in every for i in range(n)) / (n * len(every))
    others = mp.fsum(v for (i, j), v in f.items() if i != j) / (n * (n - 1))
    own = mp.fsum(f[i, i] for i in range(n)) / n
    assert same(average, (1 - mp.mpf(1) / n) * others + own / n)
    cycles = [order for order in every if len(orbit(order)) == n]
    assert same(mp.fsum(f[i, order[i]] for order in cycles for i in range(n)) / (n * len(cycles)), others)


def orbit(order):
    seen, at = [], 0
    while at not in seen:
        seen.append(at)
        at = order[at]
    return seen


@pytest.mark.checks("eq-mutual_information-shuffle", how="exact")
@pytest.mark.parametrize("seed", range(2))
def test_shuffled_coordinates_add_the_total_correlation(seed):
    p = table(seed, (3, 2, 4))  # x, z_1, z_2
    x, z, z1, z2 = marginal(p, 0), marginal(p, 1, 2), marginal(p, 1), marginal(p, 2)
    apart = {(i, j, k): x[i,] * z1[j,] * z2[k,] for i, j, k in p}
    whole = {(i, j, k): x[i,] * z[j, k] for i, j, k in p}
    total_correlation = divergence(z, {(j, k): z1[j,] * z2[k,] for j, k in z})
    assert same(divergence(p, apart), divergence(p, whole) + total_correlation)
    assert total_correlation > mp.mpf("1e-3")


# --- what information does not see ---


@pytest.mark.checks("eq-mutual_information-blind", how="exact")
def test_information_is_blind_to_invertible_maps():
    """The divergence of y = sinh(x), x = z + noise for z in four places, in the coordinates of y."""
    tau = mp.mpf("0.8")
    weights, places = atoms(9)
    density = lambda x, place: normal(x, place, tau**2)
    bent = lambda y, place: density(mp.asinh(y), place) / mp.sqrt(1 + y * y)
    knots = mp.linspace(-12, 12, 40)
    plain = mixed_information(density, weights, places, knots)
    assert same(mixed_information(bent, weights, places, [mp.sinh(k) for k in knots]), plain)
    assert same(mixed_information(density, weights[::-1], places[::-1], knots), plain)  # z under other names
    mix = lambda x: mp.fsum(w * density(x, place) for w, place in zip(weights, places, strict=True))
    gain = mp.quad(lambda x: mix(x) * mp.log(mp.cosh(x)), knots, maxdegree=4)
    assert gain > mp.mpf("0.3")  # what the entropy gains, and the information does not


def test_critics_and_encoders_are_blind_too():
    """The largest value over critics, by a table of scores that can be relabelled at will."""
    p = table(4)
    q = product(p)
    relabel = {0: 2, 1: 0, 2: 1}
    moved_p, moved_q = ({(relabel[i], j): v for (i, j), v in t.items()} for t in (p, q))
    T = {k: mp.log(p[k] / q[k]) for k in p}
    moved_T = {k: mp.log(moved_p[k] / moved_q[k]) for k in moved_p}
    sigma = lambda t: 1 / (1 + mp.exp(-t))
    values = [
        mean(a, lambda *k: mp.log(sigma(c[k]))) + mean(b, lambda *k: mp.log(sigma(-c[k])))
        for a, b, c in ((p, q, T), (moved_p, moved_q, moved_T))
    ]
    assert same(*values)


@pytest.mark.checks("eq-mutual_information-example", how="symbolic")
def test_the_example_of_a_scale():
    a = sp.symbols("a", positive=True)
    z, x = sp.symbols("z x", real=True)
    density = sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi)
    encoder = (a * z) / a
    assert sp.integrate((z - encoder) ** 2 * density, (z, -sp.oo, sp.oo)) == 0
    scaled = density.subs(z, x / a) / a
    assert sp.simplify(sp.integrate(scaled, (x, -sp.oo, sp.oo))) == 1
    h = -sp.integrate(sp.expand(scaled * sp.expand_log(sp.log(scaled), force=True)), (x, -sp.oo, sp.oo))
    h_z = sp.log(2 * sp.pi * sp.E) / 2
    assert sp.simplify(sp.expand_log(h - h_z - sp.log(a), force=True)) == 0


@pytest.mark.checks("eq-mutual_information-collapse", how="symbolic")
def test_the_divergence_keeps_the_scale_and_reconstruction_does_not():
    a, e = sp.symbols("a e", positive=True)
    x = sp.symbols("x", real=True)
    scaled = sp.exp(-(x**2) / (2 * a**2)) / (a * sp.sqrt(2 * sp.pi))
    log_ratio = -(x**2) / (2 * a**2) - sp.log(a) + x**2 / 2
    kl = sp.simplify(sp.integrate(sp.expand(scaled * log_ratio), (x, -sp.oo, sp.oo)))
    assert sp.simplify(kl - (a**2 / 2 - sp.log(a) - sp.Rational(1, 2))) == 0
    assert sp.solve(sp.diff(kl, a), a) == [1]
    assert sp.diff(kl, a, 2).is_positive
    source = a**2 / 2 + (1 - e * a) ** 2  # E z^2 = 1
    (best,) = sp.solve(sp.diff(source, e), e)
    assert best == 1 / a
    reduced = sp.simplify(source.subs(e, best))
    assert reduced == a**2 / 2
    assert sp.limit(reduced, a, 0) == 0
    assert sp.diff(reduced, a).is_positive  # falls all the way to a = 0


@pytest.mark.checks("eq-mutual_information-noisy", how="symbolic")
@pytest.mark.checks("eq-mutual_information-weight", how="symbolic")
def test_the_scale_with_noise():
    s, t, lam = sp.symbols("s t lambda", positive=True)  # s = a^2, t = tau^2: monotone in a
    e = sp.symbols("e", real=True)
    error = sp.expand(1 - 2 * e * sp.sqrt(s) + e**2 * (s + t))  # E (z - e x)^2
    (best,) = sp.solve(sp.diff(error, e), e)
    least = sp.simplify(error.subs(e, best))
    assert sp.simplify(least - t / (s + t)) == 0
    energy = (s + t) / 2
    with_information = energy - sp.log(1 + s / t) / 2
    assert sp.simplify(sp.solve(sp.diff(with_information, s), s)[0] - (1 - t)) == 0
    assert sp.simplify(sp.diff(with_information, s, 2)).is_positive
    slope_at_zero = sp.diff(with_information, s).subs(s, 0)
    assert sp.simplify(slope_at_zero - (1 - 1 / t) / 2) == 0  # for t >= 1 it rises from a = 0 on
    # The bound with its best sigma is the same function.
    assert sp.simplify(sp.expand_log(sp.log(1 + s / t) / 2 + sp.log(least) / 2, force=True).subs({s: 3, t: 2})) == 0
    weighted = energy + lam * least
    solutions = sp.solve(sp.diff(weighted, s), s)
    assert any(sp.simplify(v - (sp.sqrt(2 * lam * t) - t)) == 0 for v in solutions)
    assert sp.simplify(sp.diff(weighted, s, 2)).is_positive
    assert sp.simplify((sp.sqrt(2 * lam * t) - t).subs(lam, 1 / (2 * t)) - (1 - t)) == 0
    # The source's weight: for tau = 0.1 it makes samples of variance 0.14 in place of 1.
    variance = (sp.sqrt(2 * lam * t)).subs({lam: 1, t: sp.Rational(1, 100)})
    assert abs(float(variance) - 0.1414) < 1e-4


@pytest.mark.checks("eq-mutual_information-many", how="exact")
@pytest.mark.parametrize("seed", range(2))
def test_what_reconstruction_cannot_undercut(seed):
    """Discrete x, codes in the plane at random places."""
    p = table(seed)
    x = marginal(p, 0)
    places = [(2 * a, 3 * b) for a, b in zip(draws(seed + 5, 4), draws(seed + 6, 4), strict=True)]

    def error(encoder):
        return mean(p, lambda i, j: mp.fsum((u - v) ** 2 for u, v in zip(places[j], encoder[i], strict=True)))

    posterior = {i: [p[i, j] / x[i,] for j in range(4)] for (i,) in x}
    centre = {
        i: [mp.fsum(w * z[c] for w, z in zip(ws, places, strict=True)) for c in range(2)] for i, ws in posterior.items()
    }
    floor = mp.fsum(
        x[i,] * (mp.fsum(w * z[c] ** 2 for w, z in zip(ws, places, strict=True)) - centre[i][c] ** 2)
        for i, ws in posterior.items()
        for c in range(2)
    )
    assert same(error(centre), floor)
    for shift in ("0.1", "-0.2"):
        assert error({i: [v + mp.mpf(shift) for v in m] for i, m in centre.items()}) > floor


def test_the_papers_sign_of_the_critics_loss():
    """The loss log sigma(T) - log(1 - sigma(T')), as its first version has it, falls without end; minus J does not."""
    T = torch.tensor([-50.0, -5.0, 0.0, 5.0, 50.0], dtype=torch.float64)
    log_sigma = torch.nn.functional.logsigmoid
    papers = log_sigma(T) - log_sigma(-T)  # without information T = T'
    torch.testing.assert_close(papers, T)
    right = -jsd_terms(T, T)
    assert right.argmin() == 2
    assert right.min() == pytest.approx(math.log(4))
