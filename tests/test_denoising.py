"""Denoising: the chain on finite spaces, Tweedie's identity, score matching, walkback, contraction, Parzen."""

import itertools
import json
import math

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from helpers import assert_z

from gae_core import data, metrics, nets, train
from gae_core.models.denoising import ContractiveAutoencoder, DenoisingAutoencoder, gaussian_noise, salt_and_pepper
from gae_core.records import RESULTS
from gae_core.studies import denoising as studies


def finite(seed=0, states=5):
    """Probabilities p (n,), a corruption C (n, n) whose rows are C(. | x), and its reverse P (n, n), rows P(. | x~)."""
    rng = np.random.default_rng(seed)
    p, C = rng.dirichlet(np.ones(states)), rng.dirichlet(np.full(states, 0.7), states)
    return p, C, reverse(p, C)


def reverse(p, C):
    joint = p[:, None] * C
    return (joint / joint.sum(0)).T


def stationary(T):
    values, vectors = np.linalg.eig(T.T)
    pi = np.real(vectors[:, np.argmax(np.real(values))])
    return pi / pi.sum()


def tv(a, b):
    return 0.5 * np.abs(a - b).sum(-1)


@pytest.mark.checks("eq-denoising-reverse", how="exact")
def test_the_best_denoiser_is_the_reverse_of_the_corruption():
    p, C, P = finite()
    joint = p[:, None] * C
    best = -(joint * np.log(P.T)).sum()
    marginal = joint.sum(0)
    entropy = -(joint * np.log(joint)).sum() + (marginal * np.log(marginal)).sum()  # H(X | X~) = H(X, X~) - H(X~)
    assert best == pytest.approx(entropy, abs=1e-12)
    rng = np.random.default_rng(1)
    for _ in range(20):
        other = 0.99 * P + 0.01 * rng.dirichlet(np.ones(5), 5)
        assert -(joint * np.log(other.T)).sum() > best


@pytest.mark.checks("eq-denoising-stationary", how="exact")
@pytest.mark.parametrize("seed", range(5))
def test_corrupting_and_restoring_leaves_the_data_invariant(seed):
    p, C, P = finite(seed)
    T = C @ P
    flow = p[:, None] * T
    np.testing.assert_allclose(flow, flow.T, atol=1e-15)
    np.testing.assert_allclose(p @ T, p, atol=1e-15)
    np.testing.assert_allclose(np.linalg.matrix_power(T, 400), np.tile(p, (5, 1)), atol=1e-9)
    # Without full support it need not converge: a corruption that keeps two halves apart.
    apart = np.kron(np.eye(2), np.full((2, 2), 0.5))
    half = np.array([0.1, 0.2, 0.3, 0.4])
    T = apart @ reverse(half, apart)
    np.testing.assert_allclose(half @ T, half, atol=1e-15)
    assert np.linalg.matrix_power(T, 400)[0, 2:].max() == 0


@pytest.mark.checks("eq-denoising-step", how="exact")
@pytest.mark.checks("eq-denoising-drift", how="exact")
@pytest.mark.parametrize("seed", range(8))
def test_what_an_imperfect_denoiser_costs(seed):
    p, C, P = finite(seed)
    rng = np.random.default_rng(100 + seed)
    learned = 0.9 * P + 0.1 * rng.dirichlet(np.ones(5), 5)
    T = C @ learned
    epsilon = (p @ C) @ tv(P, learned)
    kappa = max(tv(T[i], T[j]) for i in range(5) for j in range(5))
    assert tv(p, p @ T) <= epsilon + 1e-15
    assert 0 < tv(p, stationary(T)) <= epsilon / (1 - kappa) + 1e-12
    lazy = 0.98 * np.eye(5) + 0.02 * C  # little corruption: nearly nothing is forgotten
    slow = lazy @ reverse(p, lazy)
    assert max(tv(slow[i], slow[j]) for i in range(5) for j in range(5)) > 0.9


@pytest.mark.checks("eq-denoising-gaussian-chain", how="symbolic")
def test_the_chain_of_means_has_half_the_variance():
    S, s2, v, var = sp.symbols("S s2 v Var", positive=True)
    a = S / (S + s2)
    equilibrium = sp.solve(sp.Eq(var, a**2 * (var + s2) + v), var)[0]
    assert sp.simplify(equilibrium - (a**2 * s2 + v) / (1 - a**2)) == 0
    assert sp.simplify(equilibrium.subs(v, S * s2 / (S + s2)) - S) == 0
    assert sp.simplify(equilibrium.subs(v, 0) - S**2 / (2 * S + s2)) == 0
    assert sp.limit(equilibrium.subs(v, 0), s2, 0) == S / 2
    assert sp.simplify(equilibrium.subs({v: s2, S: 1}) - s2 * (1 + a.subs(S, 1) ** 2) / (1 - a.subs(S, 1) ** 2)) == 0


def mixture(s):
    """Density of 0.3 N(-1, 0.4²) + 0.7 N(1.5, 0.6²), smoothed by N(0, s²), and moments of x given y = x + s eps."""
    parts = [(mp.mpf(3) / 10, mp.mpf(-1), mp.mpf(4) / 10), (mp.mpf(7) / 10, mp.mpf(3) / 2, mp.mpf(6) / 10)]

    def smoothed(y):
        return mp.fsum(w * mp.npdf(y, m, mp.sqrt(c**2 + s**2)) for w, m, c in parts)

    def moment(y, power):  # by Bayes' rule for each component
        total = mp.mpf(0)
        for w, m, c in parts:
            mean, variance = (m * s**2 + y * c**2) / (c**2 + s**2), c**2 * s**2 / (c**2 + s**2)
            total += w * mp.npdf(y, m, mp.sqrt(c**2 + s**2)) * (mean if power == 1 else mean**2 + variance)
        return total / smoothed(y)

    return smoothed, moment


@pytest.mark.checks("eq-denoising-tweedie", how="exact")
@pytest.mark.parametrize("s", ["0.3", "2"])
@pytest.mark.parametrize("y", ["-1.7", "0.2"])
def test_tweedies_identity_for_mean_and_covariance(s, y):
    with mp.workdps(30):
        s, y = mp.mpf(s), mp.mpf(y)
        density, moment = mixture(s)
        first, second = (mp.diff(lambda u: mp.log(density(u)), y, n) for n in (1, 2))
        mean = moment(y, 1)
        assert abs(mean - (y + s**2 * first)) < mp.mpf(10) ** -20
        assert abs(moment(y, 2) - mean**2 - s**2 * (1 + s**2 * second)) < mp.mpf(10) ** -20


@pytest.mark.checks("eq-denoising-small-noise", how="exact")
def test_for_small_noise_it_is_the_score_of_the_data_to_fourth_order():
    with mp.workdps(30):
        y = mp.mpf("0.4")
        bare, _ = mixture(mp.mpf(0))
        score = mp.diff(lambda u: mp.log(bare(u)), y)

        def error(s):
            density, _ = mixture(s)
            return abs(s**2 * mp.diff(lambda u: mp.log(density(u)), y) - s**2 * score)

        ratio = error(mp.mpf("0.02")) / error(mp.mpf("0.01"))
        assert abs(ratio - 16) < 0.1  # sigma to the fourth
        assert error(mp.mpf(1)) > 0.1  # and nothing of the kind for large noise


@pytest.mark.checks("eq-denoising-score-matching", how="exact")
@pytest.mark.parametrize("guess", [lambda y: -y, mp.sin], ids=["linear", "sine"])
def test_denoising_is_score_matching_up_to_a_constant(guess):
    with mp.workdps(30):
        s = mp.mpf("0.7")
        density, moment = mixture(s)

        def terms(y):
            mean = moment(y, 1)
            variance = moment(y, 2) - mean**2
            slope = mp.diff(density, y) / density(y)
            # E over x given y of (s(y) - (x - y)/sigma²)²
            denoising = (guess(y) - (mean - y) / s**2) ** 2 + variance / s**4
            return density(y) * mp.matrix([(guess(y) - slope) ** 2, denoising, variance / s**4])

        h, low = mp.mpf(1) / 16, -9  # the trapezoidal rule on an analytic function that falls off on both sides
        left, right, constant = h * sum((terms(low + i * h) for i in range(20 * 16)), mp.matrix(3, 1))
        assert abs(left - (right - constant)) < mp.mpf(10) ** -20
        assert constant > 0.1


@pytest.mark.checks("eq-denoising-rbm", how="exact")
def test_a_tied_denoiser_is_the_gradient_of_an_energy_and_an_untied_one_is_not():
    generator = torch.Generator().manual_seed(0)
    W, V = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    b, c = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 5))
    x = torch.randn(3, generator=generator, dtype=torch.float64)
    sigma = 0.6

    def energy(x):
        return ((x - b).square().sum() / 2 - torch.nn.functional.softplus(W @ x + c).sum()) / sigma**2

    def r(x, decoder):
        return decoder.T @ torch.sigmoid(W @ x + c) + b

    slope = torch.func.grad(energy)(x)
    torch.testing.assert_close((r(x, W) - x) / sigma**2, -slope, rtol=0, atol=1e-12)
    for decoder, symmetric in ((W, True), (V, False)):
        jacobian = torch.func.jacrev(lambda u, d=decoder: r(u, d))(x)
        assert torch.allclose(jacobian, jacobian.T) == symmetric


@pytest.mark.checks("eq-denoising-error", how="exact")
def test_the_error_of_the_best_denoiser_vanishes_in_the_valley_too():
    with mp.workdps(30):
        s = mp.mpf("0.4")
        density, moment = mixture(s)

        def slope(y):
            return mp.diff(lambda u: mp.log(density(u)), y)

        valley = mp.findroot(slope, (mp.mpf("-0.3"), mp.mpf("0.3")))
        peak = mp.findroot(slope, (mp.mpf("1.3"), mp.mpf("1.6")))
        assert density(valley) < density(peak) / 3
        for y in (valley, peak):
            assert abs(moment(y, 1) - y) < mp.mpf(10) ** -20
        y = mp.mpf("0.7")
        assert abs((moment(y, 1) - y) ** 2 - s**4 * slope(y) ** 2) < mp.mpf(10) ** -20


def walkback(p, C, P, k):
    """The best denoiser for walks of k rounds with P."""
    walk, total = np.eye(len(p)), 0
    for _ in range(k):
        total = total + walk @ C / k  # the t-th corrupted state
        walk = walk @ C @ P
    return total, reverse(p, total)


@pytest.mark.checks("eq-denoising-walkback", how="exact")
@pytest.mark.parametrize("seed", range(5))
def test_walkback_takes_several_steps_in_one(seed):
    p, C, P = finite(seed)
    T = C @ P
    _, longer = walkback(p, C, P, 4)
    powers = [np.linalg.matrix_power(T, t) for t in range(1, 5)]
    np.testing.assert_allclose(C @ longer, sum(powers) / 4, atol=1e-14)
    np.testing.assert_allclose(p @ C @ longer, p, atol=1e-15)
    assert np.abs(longer - P).max() > 0.01  # it is not the reverse of C
    slowest = [np.sort(np.abs(np.linalg.eigvals(K)))[-2] for K in (T, C @ longer)]
    assert slowest[1] < slowest[0]
    for _ in range(100):  # walks of its own: the walk depends on what is learned, and that on the walk
        total, longer = walkback(p, C, longer, 4)
    np.testing.assert_allclose(p @ total, p @ C, atol=1e-14)
    np.testing.assert_allclose(stationary(C @ longer), p, atol=1e-12)
    # The walk of a chain that does not leave p invariant is another matter.
    wrong = 0.5 * P + 0.5 * np.random.default_rng(seed).dirichlet(np.ones(5), 5)
    assert tv(p @ C @ walkback(p, C, wrong, 4)[1], p) > 1e-3


@pytest.mark.checks("eq-denoising-contraction", how="symbolic")
def test_noise_at_the_input_is_a_penalty_on_the_jacobian():
    x, y, s, e, f = sp.symbols("x y s e f")
    # A reconstruction of two coordinates, with second derivatives; the Gaussian mean of a polynomial is exact.
    r = sp.Matrix([x**2 / 3 + x * y - y / 2, y**3 / 5 - x * y / 7 + x])
    moved = r.subs({x: x + s * e, y: y + s * f}, simultaneous=True) - sp.Matrix([x, y])
    moment = {0: 1, 2: 1, 4: 3, 6: 15}
    mean = sum(
        term * moment.get(i, 0) * moment.get(j, 0)
        for (i, j), term in sp.Poly(sp.expand(moved.dot(moved)), e, f).terms()
    )
    start = r - sp.Matrix([x, y])
    jacobian = r.jacobian([x, y])
    laplacian = sp.Matrix([sp.diff(c, x, 2) + sp.diff(c, y, 2) for c in r])
    expected = start.dot(start) + s**2 * (sum(v**2 for v in jacobian) + start.dot(laplacian))
    left = sp.Poly(sp.expand(mean - expected), s)
    assert all(power >= 4 for (power,), value in left.terms() if sp.simplify(value) != 0)
    linear = r.subs({x: x, y: y}).jacobian([x, y]).subs({x: 1, y: 2}) * sp.Matrix([x, y])
    moved = linear.subs({x: x + s * e, y: y + s * f}, simultaneous=True) - sp.Matrix([x, y])
    exact = sum(
        t * moment.get(i, 0) * moment.get(j, 0) for (i, j), t in sp.Poly(sp.expand(moved.dot(moved)), e, f).terms()
    )
    start = linear - sp.Matrix([x, y])
    assert sp.expand(exact - start.dot(start) - s**2 * sum(v**2 for v in linear.jacobian([x, y]))) == 0


@pytest.mark.checks("eq-denoising-parzen", how="symbolic")
def test_a_parzen_estimate_prefers_too_little_variance():
    s, h = sp.symbols("s h", positive=True)
    x = sp.symbols("x", real=True)
    smoothed = sp.exp(-(x**2) / (2 * (s**2 + h**2))) / sp.sqrt(2 * sp.pi * (s**2 + h**2))
    standard = sp.exp(-(x**2) / 2) / sp.sqrt(2 * sp.pi)
    value = sp.integrate(standard * sp.expand_log(sp.log(smoothed), force=True), (x, -sp.oo, sp.oo))
    claimed = -(sp.log(2 * sp.pi * (s**2 + h**2)) + 1 / (s**2 + h**2)) / 2
    assert sp.simplify(value - claimed) == 0
    slope = sp.simplify(sp.diff(claimed, s))
    assert sp.simplify(slope.subs(s, sp.sqrt(1 - h**2))) == 0
    assert sp.simplify(sp.diff(claimed, s, 2).subs(s, sp.sqrt(1 - h**2))) != 0
    at = {h: sp.Rational(3, 5)}
    assert claimed.subs(at).subs(s, sp.Rational(4, 5)) > claimed.subs(at).subs(s, 1)


@pytest.mark.checks("eq-denoising-parzen", how="statistical")
def test_the_parzen_estimate_of_many_samples_has_this_limit():
    values = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        samples, unseen = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (20_000, 500))
        values.append(float(metrics.parzen_log_likelihood(0.8 * samples, unseen, width=0.6).mean()))
    assert_z(torch.tensor(values), -(math.log(2 * math.pi) + 1))


def test_the_parzen_estimate_is_the_mixtures_likelihood():
    generator = torch.Generator().manual_seed(0)
    samples, x = (torch.rand(n, 3, generator=generator, dtype=torch.float64) for n in (7, 4))
    parts = torch.distributions.MultivariateNormal(samples[:, None], 0.04 * torch.eye(3, dtype=torch.float64))
    expected = parts.log_prob(x).logsumexp(0) - math.log(7)
    torch.testing.assert_close(metrics.parzen_log_likelihood(samples, x, width=0.2, chunk_size=3), expected)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="width"):
            metrics.parzen_log_likelihood(samples, x, width=bad)
    with pytest.raises(ValueError, match="same shape"):
        metrics.parzen_log_likelihood(samples, x[:, :2], width=0.2)


# Labels along a chain.


def two_states(a, b, steps, chains, seed):
    """Labels (steps, chains) of stationary chains that go from 0 to 1 with probability a, and back with b."""
    rng = np.random.default_rng(seed)
    state, found = rng.random(chains) < a / (a + b), []
    for _ in range(steps):
        state = np.where(state, rng.random(chains) >= b, rng.random(chains) < a)
        found.append(state)
    return torch.from_numpy(np.stack(found)).long()


@pytest.mark.checks("eq-denoising-two-state", how="exact")
def test_the_mixing_of_two_states_in_closed_form():
    with mp.workdps(40):
        a, b = mp.mpf("0.07"), mp.mpf("0.21")
        T, p = mp.matrix([[1 - a, a], [b, 1 - b]]), a / (a + b)  # p is the share of state 1
        power, total = mp.eye(2), mp.mpf(0)
        for t in range(1, 600):
            power = power * T
            rho = (p * power[1, 1] - p**2) / (p * (1 - p))
            assert abs(rho - (1 - a - b) ** t) < mp.mpf(10) ** -35
            total += rho
        assert abs(1 / (1 + 2 * total) - (a + b) / (2 - a - b)) < mp.mpf(10) ** -35
        assert abs(1 / (p * b + (1 - p) * a) - (a + b) / (2 * a * b)) < mp.mpf(10) ** -35


@pytest.mark.checks("eq-denoising-two-state", how="statistical")
@pytest.mark.parametrize(("a", "b"), [(0.1, 0.3), (0.5, 0.5), (0.02, 0.02)])
def test_mixing_measures_that_of_two_states(a, b):
    found = [studies.mixing(two_states(a, b, 2000, 50, seed), 2) for seed in range(10)]
    assert_z([f.stay for f in found], (a + b) / (2 * a * b))
    expected = 1000 * (a + b) / (2 - a - b)
    # the sum of correlations is cut where noise begins, which costs some per cent
    assert np.mean([f.ess for f in found]) == pytest.approx(expected, rel=0.05)
    share = a / (a + b)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert np.mean([f.entropy for f in found]) == pytest.approx(entropy, abs=0.02)


def test_mixing_of_chains_that_stay_and_of_classes_that_nobody_enters():
    stuck = torch.arange(10).repeat(100, 3)
    found = studies.mixing(stuck, 10)
    assert found.ess == 0 and found.stay == 99 * 30 and found.entropy == pytest.approx(math.log(10))
    labels = two_states(0.5, 0.5, 500, 20, 0)
    assert studies.mixing(labels, 10).ess == pytest.approx(studies.mixing(labels, 2).ess / 5)
    late = torch.zeros(101, 4, dtype=torch.long)  # between the halves, where no half of a chain has seen it move
    late[51:] = 1
    late[50] = 0
    assert studies.mixing(late, 2).ess == 0
    for bad in (labels[:7], labels[:, 0], labels + 1, labels - 1):
        with pytest.raises(ValueError, match="labels must be"):
            studies.mixing(bad, 2)


# The model.


def small(**options):
    torch.manual_seed(0)
    encoder, decoder = nets.mlp_pair((1, 8, 8), 16, hidden=(32,), output=torch.nn.Identity)
    return DenoisingAutoencoder(encoder, decoder, 16, **{"corruption": salt_and_pepper(0.4), **options})


def test_corruptions_have_their_moments():
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0))[:, None]
    noisy = salt_and_pepper(0.4)(x, generator=torch.Generator().manual_seed(1))
    changed = noisy != x
    for share, expected in ((changed, 0.4), ((noisy == 1) & changed, 0.2)):
        assert_z(share.double().reshape(20, -1).mean(1), expected)
    assert set(noisy[changed].tolist()) == {0.0, 1.0}
    noisy = gaussian_noise(0.3)(x, generator=torch.Generator().manual_seed(1))
    assert_z((noisy - x).square().reshape(20, -1).mean(1), 0.09)


def test_the_loss_is_the_likelihood_of_the_clean_image_at_each_step():
    x = (torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    model = small(walkback=2)
    found = model.loss(x, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    noisy = model.corruption(x, generator=generator)
    first = model(noisy)
    sampled = (torch.rand(first.shape, generator=generator) < first).float()
    second = model(model.corruption(sampled, generator=generator))

    def nll(mean):
        return -(x * mean.log() + (1 - x) * (1 - mean).log()).sum((1, 2, 3))

    torch.testing.assert_close(found.first, nll(first))
    torch.testing.assert_close(found.total, (nll(first) + nll(second)) / 2)
    wrong = -(sampled * second.log() + (1 - sampled) * (1 - second).log()).sum(
        (1, 2, 3)
    )  # against the walk's own image
    assert (found.total - (nll(first) + wrong) / 2).abs().max() > 0.1


def test_the_gaussian_likelihood_has_its_constants():
    model = small(likelihood="gaussian", corruption=gaussian_noise(0.5), sigma=0.4)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = model.loss(x, generator=torch.Generator().manual_seed(1)).total
    mean = model(x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    expected = (x - mean).square().sum((1, 2, 3)) / 0.32 + 32 * math.log(2 * math.pi * 0.16)
    torch.testing.assert_close(found, expected)


def test_a_trained_denoiser_gives_the_score_of_the_smoothed_density():
    toy = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.3, 0.7])),
        torch.distributions.Normal(torch.tensor([-1.0, 1.5]), torch.tensor([0.4, 0.6])),
    )
    torch.manual_seed(0)
    x = toy.sample((8000, 1))
    sigma = 0.5
    encoder, decoder = nets.mlp([1, 32, 32], activation=torch.nn.Tanh), nets.mlp([32, 1])
    model = DenoisingAutoencoder(encoder, decoder, 32, corruption=gaussian_noise(sigma), likelihood="gaussian")
    train.fit(model, x, epochs=30, lr=5e-3, schedule=lambda t: 1 - t, device="cpu", progress=False)
    at = torch.linspace(-1.5, 2.5, 9)[:, None].requires_grad_()
    smooth = torch.distributions.MixtureSameFamily(
        toy.mixture_distribution,
        torch.distributions.Normal(torch.tensor([-1.0, 1.5]), torch.tensor([0.41, 0.61]).sqrt()),
    )
    (exact,) = torch.autograd.grad(smooth.log_prob(at).sum(), at)
    (bare,) = torch.autograd.grad(toy.log_prob(at).sum(), at)
    error = (model.score(at, sigma) - exact).detach().abs().mean()
    assert error < 0.25 < (bare - exact).abs().mean()


def test_the_chain_alternates_and_repeats():
    model = small()
    x = (torch.rand(4, 1, 8, 8) < 0.3).float()
    first, again = (model.chain(x, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a.shape == (3, 4, 1, 8, 8)
        torch.testing.assert_close(a, b)
    assert set(first[1].unique().tolist()) <= {0.0, 1.0} and 0 < first[0].min()
    with pytest.raises(ValueError, match="steps must be at least 1"):
        model.chain(x, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, 'likelihood must be "bernoulli" or "gaussian"'),
        ({"walkback": 0}, "walkback must be at least 1"),
        ({"sigma": 0.0}, "sigma positive"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_corruptions_are_named():
    for level in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="level must be in"):
            salt_and_pepper(level)
    with pytest.raises(ValueError, match="sigma must be positive"):
        gaussian_noise(0.0)
    with pytest.raises(ValueError, match="lam must be at least 0"):
        ContractiveAutoencoder(torch.nn.Identity(), torch.nn.Identity(), 2, lam=-1.0)


def contractive(lam=0.1):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.Sigmoid())
    decoder = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.Unflatten(1, (1, 8, 8)))
    return ContractiveAutoencoder(encoder, decoder, 6, lam=lam)


def test_the_contraction_of_one_layer_in_closed_form():
    model, x = contractive(), torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    h, W = model.encode(x), model.encoder[1].weight
    expected = ((h * (1 - h)).square() * W.square().sum(1)).sum(1)
    found = model.loss(x)
    torch.testing.assert_close(found.contraction, expected)
    torch.testing.assert_close(found.total, (x - model(x)).square().sum((1, 2, 3)) + 0.1 * expected)


def test_the_contractive_chain_moves_along_the_jacobian():
    model, x = contractive(), torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    n = 4000
    moved = model.chain(x.expand(n, 1, 8, 8), 1, sigma=0.5, generator=torch.Generator().manual_seed(1))[0]
    J = model.jacobian(x)[0]
    assert J.shape == (6, 64)
    code = torch.linalg.lstsq(model.decoder[0].weight, (moved.flatten(1) - model.decoder[0].bias).T).solution.T
    delta = (code - model.encode(x)).detach().double()
    expected = (0.25 * (J @ J.T) @ (J @ J.T)).detach().double()
    direction = torch.linalg.eigh(expected).eigenvectors[:, -1]
    assert_z(((delta @ direction) ** 2).reshape(20, -1).mean(1), float(direction @ expected @ direction))


def test_both_train_in_the_common_loop():
    x = (data.load("digits").x_train[:256] > 0.5).float()
    history = train.fit(small(walkback=2), x, epochs=15, batch_size=64, lr=3e-3, device="cpu", progress=False)
    assert history["total"][-4:].mean() < 0.8 * history["total"][:4].mean()
    assert history["first"][-4:].mean() < history["total"][-4:].mean()  # later steps start further away
    history = train.fit(contractive(), x, epochs=5, batch_size=64, lr=3e-3, device="cpu", progress=False)
    assert history["total"][-4:].mean() < history["total"][:4].mean()


def test_the_chapters_reading_of_the_recorded_chains():
    plain, long, walk = (
        json.loads((RESULTS / f"dae_walkback{n}" / "mnist-medium.json").read_text(encoding="utf-8"))
        for n in ("1", "1_long", "5")
    )
    assert [(run["walkback"], run["epochs"]) for run in (plain, long, walk)] == [(1, 4), (1, 20), (5, 4)]
    for run in (plain, long, walk):
        about = [run[key] for key in ("hidden", "chains", "burn_in", "steps", "every", "salt and pepper")]
        assert about == [1000, 100, 200, 1000, 10, 0.4]
    assert [run["seeds"] for run in (plain, long, walk)] == [[0, 1, 2], [0, 1], [0, 1, 2]]

    def of(run, key):
        return run["metrics"][key]["by seed"]

    def below(key, *runs):
        """Whether every seed of each run has less than every seed of the next."""
        return all(max(of(a, key)) < min(of(b, key)) for a, b in itertools.pairwise(runs))

    ess = "ESS of the label in 1,000 steps"
    assert below(ess, plain, walk) and below(ess, long, walk)
    assert all(below(f"Fréchet, {what}", plain, walk) for what in ("means", "samples"))
    assert below("Fréchet, samples", walk, long) and below("Fréchet, means", long, walk)
    assert below("confident, %", walk, plain)
    assert below("denoising loss", long, plain)
    assert all(below(f"Fréchet, {what}", plain, long) for what in ("means", "samples"))
    # a walk of the true chain is the mean of one to five steps; measured is less than that, and more than none
    assert max(of(walk, ess)) < 3 * min(of(plain, ess))
    assert below("label entropy", walk, plain) and below("label entropy", walk, long)
    assert min(of(walk, "Parzen")) > 40 + max(of(plain, "Parzen") + of(long, "Parzen"))
    assert min(a - b for a, b in zip(of(walk, "Parzen"), of(walk, "Parzen: training images"), strict=True)) > 0
