"""The chapter on energies: its equations, the gradient penalties and the normaliser in the plane."""

import math

import mpmath as mp
import pytest
import sympy as sp
import torch
from helpers import assert_z

from gae_core import data
from gae_core.energy import gradient_penalty_r1, gradient_penalty_wgan, log_normalizer_2d

X = sp.symbols("x", real=True)
V, S, T, A, LAM = sp.symbols("v s t a lambda", positive=True)


def normal(variance, mean=0):
    """Density of N(mean, variance) at X."""
    return sp.exp(-((X - mean) ** 2) / (2 * variance)) / sp.sqrt(2 * sp.pi * variance)


def mean(f, density):
    return sp.integrate(sp.expand(f) * density, (X, -sp.oo, sp.oo))


def quad(f):
    return mp.quad(f, [-12, -3, -1, 0, 1, 3, 12])


class Quartic:
    """U = c x⁴ + b x on the line, at 30 digits; the data are an unequal mixture of two normal densities."""

    def __init__(self, c, b):
        self.c, self.b = mp.mpf(c), mp.mpf(b)
        self.z = quad(lambda x: mp.exp(-self.u(x)))

    def u(self, x):
        return self.c * x**4 + self.b * x

    def q(self, x):
        return mp.exp(-self.u(x)) / self.z


def p_data(x):
    return mp.mpf(1) / 4 * mp.npdf(x, -1, mp.mpf("0.5")) + mp.mpf(3) / 4 * mp.npdf(x, mp.mpf("0.7"), mp.mpf("0.6"))


def entropy(density):
    return -quad(lambda x: density(x) * mp.log(density(x)))


def nll(c, b):
    model = Quartic(c, b)
    return quad(lambda x: p_data(x) * model.u(x)) + mp.log(model.z)


def slope(f, c, b):
    """Gradient in (c, b) by central differences of 30-digit numbers."""
    h = mp.mpf(10) ** -10
    return [(f(c + h, b) - f(c - h, b)) / (2 * h), (f(c, b + h) - f(c, b - h)) / (2 * h)]


C, B = mp.mpf("0.3"), mp.mpf("-0.4")


@pytest.mark.checks("eq-energy-likelihood", how="exact")
@pytest.mark.checks("eq-energy-source", how="exact")
def test_the_likelihood_is_a_divergence_and_the_sources_objective_lacks_the_models_entropy():
    with mp.workdps(30):
        model, loss = Quartic(C, B), nll(C, B)
        kl = quad(lambda x: p_data(x) * mp.log(p_data(x) / model.q(x)))
        assert abs(loss - entropy(p_data) - kl) < mp.mpf(10) ** -15
        contrast = quad(lambda x: (p_data(x) - model.q(x)) * model.u(x))
        assert abs(contrast - (loss - entropy(model.q))) < mp.mpf(10) ** -15
        assert abs(contrast - loss) > 0.1


@pytest.mark.checks("eq-energy-phases", how="exact")
@pytest.mark.checks("eq-energy-stop", how="exact")
def test_two_phases_are_the_gradient_and_the_difference_of_means_has_another():
    """Against differences of the likelihood; the source's objective and the paper's exchanged signs fail."""

    def means(c, b):  # of the energy, under the data and the model
        model = Quartic(c, b)
        return quad(lambda x: p_data(x) * model.u(x)), quad(lambda x: model.q(x) * model.u(x))

    with mp.workdps(30):
        model, near = Quartic(C, B), mp.mpf(10) ** -12
        true = slope(nll, C, B)
        source = slope(lambda c, b: means(c, b)[0] - means(c, b)[1], C, B)
        model_mean = slope(lambda c, b: means(c, b)[1], C, B)
        energy = means(C, B)[1]
        for i, power in enumerate((4, 1)):  # the derivatives of U in c and b are x⁴ and x
            positive = quad(lambda x, k=power: p_data(x) * x**k)
            negative = quad(lambda x, k=power: model.q(x) * x**k)
            covariance = quad(lambda x, k=power: model.q(x) * model.u(x) * x**k) - energy * negative
            assert abs(true[i] - (positive - negative)) < near
            assert abs(true[i] - (negative - positive)) > 1e-2, "the paper's first version"
            assert abs(model_mean[i] - (negative - covariance)) < near
            assert abs(source[i] - (positive - negative + covariance)) < near
            assert abs(source[i] - true[i]) > 1e-2, "the source's objective has the gradient of the likelihood"


@pytest.mark.checks("eq-energy-wrong", how="symbolic")
def test_the_sources_objective_prefers_the_flat_model():
    u = X**2 / (2 * S)
    z = sp.integrate(sp.exp(-u), (X, -sp.oo, sp.oo))
    loss = mean(u, normal(V)) + sp.log(z)
    contrast = sp.simplify(mean(u, normal(V)) - mean(u, sp.exp(-u) / z))
    assert sp.simplify(sp.expand_log(loss - V / (2 * S) - sp.log(2 * sp.pi * S) / 2, force=True)) == 0
    assert sp.simplify(contrast - V / (2 * S) + sp.Rational(1, 2)) == 0
    assert sp.solve(sp.diff(loss, S), S) == [V]
    assert sp.diff(loss, S, 2).subs(S, V).is_positive
    assert sp.simplify(sp.diff(contrast, S)).is_negative and sp.limit(contrast, S, sp.oo) == -sp.Rational(1, 2)


@pytest.mark.checks("eq-energy-kl", how="exact")
@pytest.mark.checks("eq-energy-game", how="exact")
@pytest.mark.checks("eq-energy-max", how="exact")
def test_the_contrast_with_a_generator_is_a_lower_bound_of_the_loss():
    """For generators of several kinds; with H in place of -H, as the paper's first version has it, it fails."""
    with mp.workdps(30):
        model, loss, near = Quartic(C, B), nll(C, B), mp.mpf(10) ** -15
        base = entropy(p_data) + quad(lambda x: p_data(x) * mp.log(p_data(x) / model.q(x)))
        for generator in (lambda x: mp.npdf(x, 0.2, 0.8), p_data, model.q):
            h, energy = entropy(generator), quad(lambda x, g=generator: g(x) * model.u(x))
            kl = quad(lambda x, g=generator: g(x) * mp.log(g(x) / model.q(x)))
            assert abs(kl - (-h + energy + mp.log(model.z))) < near
            assert abs(kl - (h + energy + mp.log(model.z))) > 0.1
            value = quad(lambda x: p_data(x) * model.u(x)) - energy + h
            assert abs(value - (loss - kl)) < near and abs(value - (base - kl)) < near
            assert value <= loss + near
            assert (abs(value - loss) < near) == (generator == model.q), "the maximum is at the model alone"


@pytest.mark.checks("eq-energy-saddle", how="symbolic")
def test_the_saddle_is_at_the_data_and_leaves_the_energy_indifferent():
    def value(u, generator):  # Gaussian generators, whose entropy is known
        h = sp.log(2 * sp.pi * sp.E * generator) / 2
        return mean(u, normal(V)) - mean(u, normal(generator)) + h

    star = X**2 / (2 * V) + sp.log(2 * sp.pi * V) / 2
    h_data = sp.log(2 * sp.pi * sp.E * V) / 2
    kl = (A / V - 1 - sp.log(A / V)) / 2  # of N(0, a) from N(0, v)
    assert sp.simplify(sp.expand_log(value(star, A) - (h_data - kl), force=True)) == 0
    assert sp.diff(kl, A).subs(A, V) == 0 and sp.diff(kl, A, 2).is_positive
    for u in (star, T * X**4 + X, 3 * X**2):
        assert sp.simplify(value(u, V) - h_data) == 0


@pytest.mark.checks("eq-energy-gaussian", how="symbolic")
def test_with_the_generator_held_still_the_bound_has_no_minimum():
    z = sp.symbols("z", real=True)
    u = T * X**2 / 2
    of_samples = sp.integrate(u.subs(X, A * z) * sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi), (z, -sp.oo, sp.oo))
    value = mean(u, normal(V)) - of_samples + sp.log(2 * sp.pi * sp.E * A**2) / 2
    claim = T * (V - A**2) / 2 + sp.log(2 * sp.pi * sp.E * A**2) / 2
    assert sp.simplify(value - claim) == 0
    assert sp.limit(value.subs({V: 1, A: 2}), T, sp.oo) == -sp.oo
    assert sp.solve(sp.diff(value, A), A) == [1 / sp.sqrt(T)], "the generator's best answer is the model"
    assert (
        sp.simplify(sp.expand_log(value.subs(A, 1 / sp.sqrt(T)) - (T * V + sp.log(2 * sp.pi / T)) / 2, force=True)) == 0
    )


def test_the_critics_second_term_is_of_samples():
    """The source writes E_z[D(x)]: nothing in it depends on z, and the critic's objective vanishes for every D."""
    z = sp.symbols("z", real=True)
    critic = T * X**2 / 2

    def over_codes(f):
        return sp.integrate(f * sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi), (z, -sp.oo, sp.oo))

    source = mean(critic - over_codes(critic), normal(V))
    right = mean(critic, normal(V)) - over_codes(critic.subs(X, A * z))
    assert sp.simplify(source) == 0
    assert sp.simplify(sp.diff(right, T) - (V - A**2) / 2) == 0


@pytest.mark.checks("eq-energy-temperature", how="exact")
@pytest.mark.parametrize("tau", ["1", "0.2", "0.01"])
def test_a_cold_generator_goes_to_the_minimum(tau):
    with mp.workdps(30):
        tau = mp.mpf(tau)
        deep = [-1 - mp.sqrt(tau), -1, -1 + mp.sqrt(tau), 0, 1 - mp.sqrt(tau), 1, 1 + mp.sqrt(tau)]
        points = sorted({mp.mpf(-5), *deep, mp.mpf(5)})

        def u(x):
            return (x * x - 1) ** 2

        z = mp.quad(lambda x: mp.exp(-u(x) / tau), points)

        def generator(x):
            return mp.npdf(x, 0.9, 0.3)

        h = mp.log(2 * mp.pi * mp.e * mp.mpf(0.3) ** 2) / 2
        energy = mp.quad(lambda x: generator(x) * u(x), points)
        kl = mp.quad(lambda x: generator(x) * (mp.log(generator(x)) + u(x) / tau + mp.log(z)), points)
        assert abs(energy - tau * h - (-tau * mp.log(z) + tau * kl)) < 1e-12 and kl > 0
        mean_energy = mp.quad(lambda x: mp.exp(-u(x) / tau) / z * u(x), points)
        assert mean_energy < 0.8 * tau  # half a temperature for each quadratic well, to first order


@pytest.mark.checks("eq-energy-equipartition", how="exact")
@pytest.mark.parametrize(("k", "d"), [(2, 2), (4, 1), (1, 3)])
def test_a_sample_lies_above_the_minimum(k, d):
    """By quadrature over the radius, for two scales; the source would have data at the minimum, 0."""
    with mp.workdps(30):
        for c in (mp.mpf("0.7"), mp.mpf(5)):
            z = mp.quad(lambda r, c=c: r ** (d - 1) * mp.exp(-c * r**k), [0, 1, 3, 20, 200])
            energy = mp.quad(lambda r, c=c: r ** (d - 1) * c * r**k * mp.exp(-c * r**k), [0, 1, 3, 20, 200]) / z
            assert abs(energy - mp.mpf(d) / k) < mp.mpf(10) ** -12


@pytest.mark.checks("eq-energy-linear", how="symbolic")
def test_penalties_of_a_linear_energy():
    m, w = sp.symbols("m w", positive=True)  # for m < 0 mirror the line
    r1 = -w * m + LAM * w**2
    best = sp.solve(sp.diff(r1, w), w)
    assert best == [m / (2 * LAM)] and sp.simplify(r1.subs(w, best[0]) + m**2 / (4 * LAM)) == 0
    one = -w * m + LAM * (w - 1) ** 2  # |w| = w; a negative w has a larger value, by 2 |w| m
    best = sp.solve(sp.diff(one, w), w)
    assert len(best) == 1 and sp.simplify(best[0] - 1 - m / (2 * LAM)) == 0
    assert sp.simplify(one.subs(w, best[0]) + m + m**2 / (4 * LAM)) == 0
    assert sp.limit(best[0], m, 0) == 1, "not that of R1, which is 0: they are no equivalent penalties"


@pytest.mark.checks("eq-energy-one-centred", how="symbolic")
def test_the_one_centred_penalty_pulls_to_a_width_that_depends_on_the_unit():
    def absolute(variance):
        return 2 * sp.integrate(X * normal(variance), (X, 0, sp.oo))

    u = T * X**2 / 2
    z = sp.integrate(sp.exp(-u), (X, -sp.oo, sp.oo))
    penalty = mean(T**2 * X**2, normal(V)) - 2 * T * absolute(V) + 1
    value = mean(u, normal(V)) + sp.log(z) + LAM * penalty
    claim = V / 2 - 1 / (2 * T) + 2 * LAM * (T * V - sp.sqrt(2 * V / sp.pi))
    assert sp.simplify(sp.diff(value, T) - claim) == 0
    stationary = sp.limit(claim / LAM, LAM, sp.oo)
    assert sp.simplify(1 / sp.solve(stationary, T)[0] - sp.sqrt(sp.pi * V / 2)) == 0
    assert sp.simplify(claim.subs(T, 1 / V).subs(V, sp.pi / 2)) == 0
    for v, wider in ((sp.Rational(1, 10), True), (10, False)):
        t = sp.nsolve(claim.subs({V: v, LAM: 1}), T, 1 / v)
        assert (1 / t > v) == wider
    r1 = sp.diff(mean(u, normal(V)) + sp.log(z) + LAM * mean(T**2 * X**2, normal(V)), T)
    assert sp.simplify(r1.subs(T, 1 / V)).is_positive, "R1 wants a smaller precision for every v"


@pytest.mark.checks("eq-energy-heat", how="symbolic")
def test_the_penalty_blurs_by_four_lambda_to_first_order():
    """A perturbation of the stationary condition, and the derivative of the blurred density, for a mixture."""
    tau = sp.symbols("tau", positive=True)

    def density(blur):
        return sp.Rational(1, 3) * normal(1 + blur, -1) + sp.Rational(2, 3) * normal(sp.Rational(1, 4) + blur, 2)

    p = density(0)
    flow = -2 * sp.diff(p * sp.diff(-sp.log(p), X), X)  # of q = p - 2 lam (p U')' at U = -log p
    first = 2 * sp.diff(p, X, 2)
    blurred = sp.diff(density(4 * tau), tau).subs(tau, 0)
    wrong = sp.diff(density(2 * tau), tau).subs(tau, 0)
    for x in (-3, 0, sp.Rational(7, 4), 3):
        assert abs(sp.N((flow - first).subs(X, x), 30)) < 1e-25
        assert abs(sp.N((blurred - first).subs(X, x), 30)) < 1e-25
        assert abs(sp.N((wrong - first).subs(X, x), 30)) > 1e-4
    # Among Gaussians the optimum, s² = v s + 4 lam v, has the same first order.
    s = (V + sp.sqrt(V**2 + 16 * LAM * V)) / 2
    assert sp.simplify(sp.series(s, LAM, 0, 2).removeO() - V - 4 * LAM) == 0


@pytest.mark.checks("eq-energy-score-matching", how="symbolic")
@pytest.mark.parametrize("u", [X**2 / 6, X**4 / 4 - X, X**3 / 3 + X**2])
def test_the_penalty_is_the_first_half_of_score_matching(u):
    p = normal(2, 1)
    score = sp.diff(sp.log(p), X)
    left = mean((sp.diff(u, X) + score) ** 2, p)
    right = mean(sp.diff(u, X) ** 2 - 2 * sp.diff(u, X, 2), p) + mean(score**2, p)
    assert abs(sp.N(left - right, 30)) < 1e-25


@pytest.mark.checks("eq-energy-dirac", how="symbolic")
@pytest.mark.checks("eq-energy-dirac-one", how="symbolic")
def test_the_dirac_game_settles_with_r1_and_is_driven_out_by_the_one_centred_penalty():
    psi, theta = sp.symbols("psi vartheta", real=True)
    # E_p U - E_q U for data at 0 and samples at theta, and the samples' energy.
    energy, samples = -psi * theta + LAM * psi**2, psi * theta
    flow = sp.Matrix([-sp.diff(energy, psi), -sp.diff(samples, theta)])
    assert flow == sp.Matrix([theta - 2 * LAM * psi, -psi])
    found = set(flow.jacobian([psi, theta]).eigenvals())
    assert {sp.simplify(e + LAM) for e in found} == {sp.sqrt(LAM**2 - 1), -sp.sqrt(LAM**2 - 1)}
    assert {e.subs(LAM, 0) for e in found} == {sp.I, -sp.I}
    step = sp.eye(2) + S * flow.jacobian([psi, theta])
    assert sp.expand(step.det() - (1 - 2 * LAM * S + S**2)) == 0  # the exercise on steps
    w = sp.symbols("w", positive=True)  # |psi|, on either side of 0
    for sign in (1, -1):
        penalty = LAM * (sign * psi - 1) ** 2
        push = theta - sp.diff(penalty, psi)
        growth = (psi * push - theta * psi).subs(psi, sign * w)
        assert sp.simplify(growth - 2 * LAM * w * (1 - w)) == 0


@pytest.mark.checks("eq-energy-gaussian-flow", how="symbolic")
def test_the_entropy_makes_the_gaussian_game_settle_at_the_density():
    w, t = sp.symbols("w t", real=True)
    lam = sp.symbols("lambda", nonnegative=True)
    energy = t * (V - A**2) / 2 + lam * t**2 * V  # t² v is the mean squared slope at the data
    samples = t * A**2 / 2 - w * sp.log(A)
    flow = sp.Matrix([-sp.diff(energy, t), -sp.diff(samples, A)])
    jacobian = flow.jacobian([t, A])
    general = sp.Matrix([[-2 * lam * V, A], [-A, -t - w / A**2]])
    assert sp.simplify(jacobian - general) == sp.zeros(2)
    cases = [
        ({w: 0, lam: 0, t: 0}, sp.I * sp.sqrt(V), 0),
        ({w: 0, t: 0}, sp.sqrt(lam**2 * V**2 - V), -lam * V),
        ({w: 1, lam: 0, t: 1 / V}, sp.sqrt(1 / V**2 - V), -1 / V),
    ]
    for values, root, centre in cases:
        place = {**values, A: sp.sqrt(V)}
        assert sp.simplify(flow.subs(place)) == sp.zeros(2, 1), "an equilibrium"
        mu = sp.symbols("mu")
        polynomial = sp.expand(jacobian.subs(place).charpoly(mu).as_expr())
        assert sp.simplify(sp.expand(polynomial - ((mu - centre) ** 2 - root**2))) == 0


# ---- the code ------------------------------------------------------------------------------------------------------


def quadratic(x):
    return 1.5 * x.flatten(1).square().sum(1)


def parameters_alone(x):
    return torch.ones(len(x), requires_grad=True)


torch.manual_seed(0)
LAYER = torch.nn.Linear(2, 1)


def single(x):
    """A network of float32, as they are unless one asks."""
    return LAYER(x)[:, 0].detach()


def double_of_single(x):
    return single(x.float()).double()


@pytest.mark.parametrize("shape", [(5,), (3, 4, 4)])
def test_penalties_take_the_slope_of_the_whole_sample(shape):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, *shape, dtype=torch.float64, generator=rng)
    squared = 9 * x.flatten(1).square().sum(1)
    torch.testing.assert_close(gradient_penalty_r1(quadratic, x), squared, rtol=1e-12, atol=0)
    same = gradient_penalty_wgan(quadratic, x, x, generator=rng)  # every place between equals is the same
    torch.testing.assert_close(same, (squared.sqrt() - 1) ** 2, rtol=1e-10, atol=0)
    if len(shape) == 3:  # the norm over axis 1 that the authors' code takes
        (gradient,) = torch.autograd.grad(quadratic(leaf := x.clone().requires_grad_()).sum(), leaf)
        over_channels = gradient.norm(dim=1).square().flatten(1).mean(1)
        torch.testing.assert_close(over_channels, squared / 16, rtol=1e-12, atol=0)


def test_penalties_have_gradients_in_the_parameters():
    w = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(gradient_penalty_r1(lambda x: x @ w, x).mean(), w)
    torch.testing.assert_close(slope, 2 * w.detach())
    (slope,) = torch.autograd.grad(gradient_penalty_wgan(lambda x: x @ w, x, -x).mean(), w)
    torch.testing.assert_close(slope, 2 * 4 / 5 * w.detach(), rtol=1e-9, atol=0)
    with torch.no_grad():
        assert gradient_penalty_r1(lambda x: x @ w, x).tolist() == [25.0] * 4


def test_the_one_centred_penalty_is_taken_between_data_and_samples():
    """U = x³/3 between 0 and 1 has the slope a² at a uniform place: E (a² - 1)² = 8/15; at the data it is 1 or 0."""
    real = torch.zeros(40_000, 1, dtype=torch.float64)
    penalty = gradient_penalty_wgan(
        lambda x: x[:, 0] ** 3 / 3, real, real + 1, generator=torch.Generator().manual_seed(1)
    )
    assert_z(penalty.detach().numpy(), 8 / 15)


@pytest.mark.parametrize("variance", [0.3, 1.0])
def test_normaliser_and_density_in_the_plane(variance):
    grid = log_normalizer_2d(lambda x: x.square().sum(1) / (2 * variance) + 7, -8, 8, 100)
    assert float(grid.log_z) == pytest.approx(math.log(2 * math.pi * variance) - 7, abs=1e-11)
    assert float((grid.log_density.exp() * grid.area).sum()) == pytest.approx(1, abs=1e-12)
    assert grid.x.shape == (10_000, 2) and grid.edge < 1e-9

    def standard(x):
        return -x.square().sum(1) / 2 - math.log(2 * math.pi)

    assert float(grid.kl_from(standard)) == pytest.approx(1 / variance - 1 + math.log(variance), abs=1e-10)


def test_toys_are_normalised_and_match_themselves():
    toy = data.toy("eight_gaussians")
    grid = log_normalizer_2d(lambda x: -toy.log_prob(x), -3, 3, 120)
    assert float(grid.log_z) == pytest.approx(0, abs=1e-9)
    assert float(grid.kl_from(toy.log_prob)) == pytest.approx(0, abs=1e-9)


def test_the_normaliser_has_the_gradient_of_the_negative_phase():
    t = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    grid = log_normalizer_2d(lambda x: t * x.square().sum(1) / 2, -8, 8, 100)
    grid.log_z.backward()
    assert float(t.grad) == pytest.approx(-1 / 2, abs=1e-10)  # -E_q |x|²/2 = -1/t
    cut = log_normalizer_2d(lambda x: x.square().sum(1) / 8, -2, 2, 50)
    assert cut.edge > 0.05, "the square cuts off"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_penalty_r1(lambda x: x, torch.ones(3, 2)), "energy must map"),
        (lambda: gradient_penalty_r1(lambda x: torch.zeros(len(x)), torch.ones(3, 2)), "energy must depend on x"),
        (lambda: gradient_penalty_r1(lambda x: quadratic(x.detach()), torch.ones(3, 2)), "energy must depend on x"),
        (lambda: gradient_penalty_r1(torch.no_grad()(quadratic), torch.ones(3, 2)), "energy must depend on x"),
        (lambda: gradient_penalty_r1(parameters_alone, torch.ones(3, 2)), "energy must depend on x"),
        (lambda: gradient_penalty_r1(quadratic, torch.ones(3, 2).byte()), "x must be floating point.*uint8.*by 255"),
        (lambda: gradient_penalty_r1(quadratic, torch.ones(3)), r"x must be floating point of shape \(n, ...\)"),
        (lambda: gradient_penalty_wgan(quadratic, torch.ones(3, 2).long(), torch.ones(3, 2)), "real must be floating"),
        (lambda: gradient_penalty_wgan(quadratic, torch.ones(3, 2), torch.ones(3, 2).double()), "one shape and type"),
        (lambda: log_normalizer_2d(quadratic, 0, 1, 50.5), "points a whole number.*got low=0, high=1, points=50.5"),
        (lambda: log_normalizer_2d(quadratic, 0, 1, 10, dtype=torch.int64), "dtype must be floating point"),
        (
            lambda: log_normalizer_2d(single, -1, 1, 9),
            "dtype must be that of the energy's parameters, got torch.float64",
        ),
        (
            lambda: log_normalizer_2d(quadratic, 0, 1, 10).kl_from(lambda x: x[:, :1]),
            "log_prob must map .* got .*100, 1",
        ),
        (lambda: gradient_penalty_wgan(quadratic, torch.ones(3, 2), torch.ones(2, 2)), "one shape"),
        (
            lambda: gradient_penalty_wgan(quadratic, torch.ones(3, 2), torch.ones(3, 2), place=torch.ones(2)),
            r"place must have one number for each row of real, \(3,\), got \(2,\)",
        ),
        (lambda: log_normalizer_2d(quadratic, 1, 1, 10), "low must be below high"),
        (lambda: log_normalizer_2d(quadratic, 0, 1, 1), "points a whole number, at least 2"),
        (lambda: log_normalizer_2d(lambda x: x, 0, 1, 10), "energy must map"),
        (lambda: log_normalizer_2d(lambda x: x[:, 0].log(), -1, 1, 10), "NaN or -inf"),
        (lambda: log_normalizer_2d(lambda x: -x[:, 0] / 0, 0, 1, 10), "NaN or -inf"),
        (lambda: log_normalizer_2d(lambda x: x[:, 0].abs() / 0, 0, 1, 10), "finite somewhere"),
        (lambda: log_normalizer_2d(quadratic, 0, 1, 10).kl_from(lambda x: -quadratic(x)), "mass 1 on the grid"),
    ],
)
def test_errors_say_what_to_mend(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mistake_of_the_energy_itself_is_not_taken_for_one_of_the_grid():
    with pytest.raises(RuntimeError, match="must match the size"):
        log_normalizer_2d(lambda x: quadratic(x) + torch.zeros(3), 0, 1, 10)


def test_a_network_of_single_precision_takes_a_grid_of_its_own_type():
    grid = log_normalizer_2d(single, -1, 1, 20, dtype=torch.float32)
    assert float(grid.log_z) == pytest.approx(float(log_normalizer_2d(double_of_single, -1, 1, 20).log_z), abs=1e-5)


def test_a_row_with_a_nan_has_a_penalty_of_nan_and_leaves_the_others():
    x = torch.ones(4, 2)
    x[1, 0] = math.nan
    for penalty in (gradient_penalty_r1(quadratic, x), gradient_penalty_wgan(quadratic, x, torch.ones(4, 2))):
        assert torch.isnan(penalty).tolist() == [False, True, False, False]


def test_draws_of_a_density_on_a_grid_have_its_moments():
    """Coarse cells, in which a draw is as likely at any place, and fine ones of a Gaussian that is not centred."""
    flat = log_normalizer_2d(lambda x: 0 * x.sum(1), -1, 1, 2).sample(
        20_000, generator=torch.Generator().manual_seed(0)
    )
    assert flat.shape == (20_000, 2) and flat.dtype == torch.float64
    assert_z(flat.flatten().numpy(), 0.0)
    assert_z(flat.square().flatten().numpy(), 1 / 3)
    assert_z(flat.prod(1).numpy(), 0.0)
    centre, width = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64)
    grid = log_normalizer_2d(lambda x: ((x - centre) / width).square().sum(1) / 2, -5, 5, 400)
    for x, m, s in zip(grid.sample(20_000, generator=torch.Generator().manual_seed(1)).T, centre, width, strict=True):
        assert_z(x.numpy(), float(m))
        assert_z((x - m).square().numpy(), float(s) ** 2 + 0.025**2 / 12)  # and of the place in a cell
    assert torch.equal(
        grid.sample(9, generator=torch.Generator().manual_seed(2)),
        grid.sample(9, generator=torch.Generator().manual_seed(2)),
    )
