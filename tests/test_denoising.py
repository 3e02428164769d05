"""Denoising: the chain on finite spaces, Tweedie's identity, score matching, walkback, contraction, Parzen."""

import dataclasses
import functools
import itertools
import math

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from helpers import ANOTHER_TRAINING, assert_z, begun_states, numbers_of

from gae_core import data, metrics, nets, train
from gae_core.models.denoising import ContractiveAutoencoder, DenoisingAutoencoder, gaussian_noise, salt_and_pepper
from gae_core.studies import denoising as studies
from gae_core.train import Training


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


@pytest.mark.checks("eq-denoising-rbm-sum", how="exact")
def test_the_energy_is_that_of_a_boltzmann_machine_for_whole_powers_alone():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    b, c = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 4))
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)

    def log_density(x, power):
        """-U for 1/sigma² = power."""
        return -power * ((x - b).square().sum(1) / 2 - torch.nn.functional.softplus(x @ W.T + c).sum(1))

    def machine(x, copies, power, units=W, offset=c):
        """Logarithm of the sum over all states of hidden units, each ``copies`` times."""
        states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4 * copies)), dtype=torch.float64)
        inputs = (x @ units.T + offset).repeat(1, copies)
        return (inputs @ states.T).logsumexp(1) - power * (x - b).square().sum(1) / 2

    torch.testing.assert_close(log_density(x, 1), machine(x, 1, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_density(x, 2), machine(x, 2, 2), rtol=0, atol=1e-12)
    for copies in (2, 3):  # sigma = 0.6: not even up to a factor
        difference = log_density(x, 1 / 0.36) - machine(x, copies, 1 / 0.36)
        assert difference.std() > 0.1
    # The machine whose visible units have the variance sigma², and its denoiser.
    point = x[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(machine(point[None], 1, 1 / 0.36, units=W / 0.36).sum(), point)
    restored = W.T @ torch.sigmoid(W @ point / 0.36 + c) + b
    torch.testing.assert_close(slope, (restored - point).detach() / 0.36, rtol=0, atol=1e-11)


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


def slowed(seed, share=0.98):
    """A problem whose chain is slow: the corruption leaves a state as it is with probability ``share``, at least."""
    p, C, _ = finite(seed)
    C = share * np.eye(len(p)) + (1 - share) * C
    return p, C, reverse(p, C)


def own_optimum(tau, k):
    """The solution of s = tau (1 + s + ... + s^(k-1)) / k in [0, 1), or 1 for tau = 1, at thirty digits."""
    tau = mp.mpf(tau)
    with mp.workdps(30):
        if tau == 1:
            return mp.mpf(1)
        low, high = mp.mpf(0), mp.mpf(1)
        for _ in range(110):
            s = (low + high) / 2
            low, high = (s, high) if tau * mp.fsum(s**j for j in range(k)) / k > s else (low, s)
        return low


def of_eigenvalues(p, T, function):
    """The matrix with the eigenvectors of T, which is reversible with respect to p, and other eigenvalues."""
    root = np.sqrt(p)
    values, vectors = np.linalg.eigh(root[:, None] * T / root)
    new = np.array([float(function(min(max(v, 0.0), 1.0) if v < 1 - 1e-12 else 1)) for v in values])
    return (vectors / root[:, None]) * new @ (vectors * root[:, None]).T, values


@pytest.mark.checks("eq-denoising-walkback-fixed", how="exact")
@pytest.mark.checks("eq-denoising-walkback-eigenvalue", how="exact")
@pytest.mark.parametrize("make", [finite, slowed])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_walkback_at_its_own_optimum_is_no_mean_of_powers(make, k):
    for seed in range(3):
        p, C, P = make(seed)
        T, best = C @ P, P
        for _ in range(6000):  # the best answer to its own walk, again and again
            before, (_, best) = best, walkback(p, C, best, k)
            if np.abs(best - before).max() < 1e-15:
                break
        S = C @ best
        # the matrix equation, and that it is its own best answer
        a = sum(np.linalg.matrix_power(S, j) for j in range(k)) / k
        np.testing.assert_allclose(S, T @ a, atol=1e-12)
        np.testing.assert_allclose(best, P @ a, atol=1e-12)
        np.testing.assert_allclose(p[:, None] * S, (p[:, None] * S).T, atol=1e-13)  # reversible
        # the eigenvalues, one by one
        expected, values = of_eigenvalues(p, T, lambda tau, k=k: own_optimum(tau, k))
        np.testing.assert_allclose(S, expected, atol=1e-11)
        assert values.min() > -1e-12 and values[-1] == pytest.approx(1)
        # and not those of the answer to the true chain's walk
        powers = sum(np.linalg.matrix_power(T, j) for j in range(1, k + 1)) / k
        second, mean = (np.sort(np.linalg.eigvals(M).real)[-2] for M in (S, powers))
        assert second < mean - 1e-3 and np.abs(S - powers).max() > 1e-3
        if make is slowed and k >= 4:
            assert values[-2] > 0.97 and mean > 0.9 and second < own_optimum(1 - mp.mpf(10) ** -25, k) + 1e-9


@pytest.mark.checks("eq-denoising-walkback-eigenvalue", how="exact")
def test_the_bounds_of_walkbacks_optimum():
    with mp.workdps(30):
        for tau in map(mp.mpf, ("0", "0.2", "0.7", "0.99", "0.9999")):
            assert abs(own_optimum(tau, 2) - tau / (2 - tau)) < mp.mpf(10) ** -28
            for k in range(1, 8):
                s = own_optimum(tau, k)
                assert abs(s - tau * mp.fsum(s**j for j in range(k)) / k) < mp.mpf(10) ** -28
                assert s <= mp.fsum(tau**j for j in range(1, k + 1)) / k + mp.mpf(10) ** -28
        end = [own_optimum(1 - mp.mpf(10) ** -24, k) for k in range(1, 6)]
        assert min(end[:3]) > 1 - mp.mpf(10) ** -11  # up to three steps a chain may still be as slow as one likes
        assert abs(end[3] - (mp.sqrt(2) - 1)) < mp.mpf(10) ** -20 and mp.nstr(end[4], 3) == "0.276"
        assert all(own_optimum(tau, k) < end[k - 1] for tau in (0.5, 0.99, 0.999999) for k in (4, 5))
        # the figures of the chapter at tau = 0.99, and of the exercise
        tau = mp.mpf("0.99")
        means = [mp.fsum(tau**j for j in range(1, k + 1)) / k for k in range(2, 6)]
        assert [mp.nstr(m, 3) for m in means] == ["0.985", "0.98", "0.975", "0.97"]
        assert [mp.nstr(own_optimum(tau, k), 3) for k in range(2, 6)] == ["0.98", "0.84", "0.404", "0.271"]
        worth = lambda s: (1 - s) / (1 + s)  # noqa: E731
        tau = 1 - mp.mpf(10) ** -9
        assert abs(worth(own_optimum(tau, 2)) / worth(tau) - (1 + tau)) < mp.mpf(10) ** -15
        assert abs(worth((tau + tau**2) / 2) / worth(tau) - 1.5) < 1e-8
        assert abs(worth(end[3]) - (mp.sqrt(2) - 1)) < mp.mpf(10) ** -20
        assert 500 < 1000 * worth(end[4]) < 600
        assert mp.nstr(worth(own_optimum(mp.mpf("0.99"), 5)), 2) == "0.57"
        # With two steps it gains a third on the mean of the powers, with three without bound.
        worths = [worth(own_optimum(tau, k)) / worth(mp.fsum(tau**j for j in range(1, k + 1)) / k) for k in (2, 3)]
        assert abs(worths[0] - mp.mpf(4) / 3) < 1e-8 and worths[1] > 1000


@pytest.mark.checks("eq-denoising-walkback-fixed", how="exact")
@pytest.mark.parametrize("make", [finite, slowed])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_no_other_answer_to_its_own_walk_reversible_or_not(make, k):
    """Started anywhere, best answers end at one chain; and the steps by which the proof excludes all others."""
    p, C, P = make(1)
    T, root = C @ P, np.sqrt(p)

    def norm(S):
        return np.linalg.norm(root[:, None] * (S - p) / root, 2)  # on the functions of mean 0

    ends, rng = [P, *np.random.default_rng(k).dirichlet(np.full(5, 0.3), (3, 5))], np.random.default_rng(k + 10)
    for _ in range(2000):
        ends = [walkback(p, C, end, k)[1] for end in ends]
    assert max(np.abs(end - ends[0]).max() for end in ends) < 1e-12
    tau, R = norm(T), C @ ends[0]
    s = float(own_optimum(tau, k))
    assert norm(R) == pytest.approx(s, abs=1e-10)
    assert tau * sum(j * s ** (j - 1) for j in range(1, k)) / k < 1
    # For any chain that leaves p invariant the best answer is P* a(S'), S' its adjoint.
    for _ in range(3):
        joint = rng.dirichlet(np.ones(25)).reshape(5, 5)
        for _ in range(500):  # both marginals p
            joint *= (p / joint.sum(1))[:, None]
            joint *= p / joint.sum(0)
        answer = P @ (joint / joint.sum(1, keepdims=True))
        S = C @ answer
        assert np.abs(p[:, None] * S - (p[:, None] * S).T).max() > 1e-3  # not reversible
        np.testing.assert_allclose(p @ S, p, atol=1e-12)
        adjoint = (p[:, None] * S).T / p[:, None]
        a = sum(np.linalg.matrix_power(adjoint, j) for j in range(k)) / k
        np.testing.assert_allclose(walkback(p, C, answer, k)[1], P @ a, atol=1e-11)


@pytest.mark.checks("eq-denoising-walkback-blur", how="exact")
@pytest.mark.parametrize("k", [2, 5])
def test_the_optimum_of_walkback_says_less_of_the_clean_state(k):
    p, C, P = slowed(0)
    T, best = C @ P, P
    for _ in range(6000):
        best = walkback(p, C, best, k)[1]
    root = np.sqrt(p)
    values, vectors = np.linalg.eigh(root[:, None] * T / root)
    for tau, f in zip(values[:-1], (vectors / root[:, None]).T, strict=False):
        share = float(own_optimum(tau, k) / tau)
        np.testing.assert_allclose(best @ f, share * (P @ f), atol=1e-10)
        assert abs(p @ f) < 1e-12 and np.abs(P @ f).max() > 0.1  # towards 0, the mean over the data
        if tau > 0.97:
            assert (share < 0.3) == (k == 5)


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


@pytest.mark.checks("eq-denoising-contraction", how="exact")
def test_two_derivatives_are_not_enough_for_the_fourth_order():
    """r(x) = 1 + |x|^(5/2) at x = 0, where its two derivatives are 0: what is left over is of the order 5/2."""
    with mp.workdps(30):
        moment = lambda n: 2 ** (mp.mpf(n) / 2) * mp.gamma((n + mp.mpf(1)) / 2) / mp.sqrt(mp.pi)  # noqa: E731
        for s in (mp.mpf("0.1"), mp.mpf("0.001")):
            exact = 1 + 2 * s ** mp.mpf("2.5") * moment(mp.mpf("2.5")) + s**5 * moment(5)
            direct = mp.quad(lambda e, s=s: (1 + abs(s * e) ** mp.mpf("2.5")) ** 2 * mp.npdf(e), [-14, -1, 0, 1, 14])
            assert abs(exact - direct) < mp.mpf(10) ** -18
            left_over = exact - 1  # the formula has 1 + 0 s²
            assert left_over / s ** mp.mpf("2.5") > 2 and left_over / s**4 > 50


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
    wide = sp.simplify(slope.subs(h, sp.Rational(6, 5)))  # a width above 1: the less variance the better, down to none
    assert all(wide.subs(s, v) < 0 for v in (sp.Rational(1, 10), 1, 5))
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
    found = [metrics.mixing(two_states(a, b, 2000, 50, seed), 2) for seed in range(10)]
    assert_z([f.stay for f in found], (a + b) / (2 * a * b))
    expected = 1000 * (a + b) / (2 - a - b)
    # the sum of correlations is cut where noise begins, which costs some per cent
    assert np.mean([f.ess for f in found]) == pytest.approx(expected, rel=0.05)
    share = a / (a + b)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert np.mean([f.entropy for f in found]) == pytest.approx(entropy, abs=0.02)


def test_mixing_of_chains_that_stay_and_of_classes_that_nobody_enters():
    stuck = torch.arange(10).repeat(100, 3)
    found = metrics.mixing(stuck, 10)
    assert found.ess == 0 and found.stay == 99 * 30 and found.entropy == pytest.approx(math.log(10))
    labels = two_states(0.5, 0.5, 500, 20, 0)
    assert metrics.mixing(labels, 10).ess == pytest.approx(metrics.mixing(labels, 2).ess / 5)
    late = torch.zeros(101, 4, dtype=torch.long)  # between the halves, where no half of a chain has seen it move
    late[51:] = 1
    late[50] = 0
    assert metrics.mixing(late, 2).ess == 0
    for bad in (labels[:7], labels[:, 0], labels + 1, labels - 1):
        with pytest.raises(ValueError, match="labels must be"):
            metrics.mixing(bad, 2)


class Counter:
    """A chain without chance: a step adds 1 to every entry, of which the sample has half more than the mean."""

    def chain(self, x, steps, *, generator):
        assert steps == 1
        means = x.floor() + 1
        return means[None], means[None] + 0.5


def of_value(x):
    """A judge that takes an image for the class of its first entry, and believes it the more the higher the class."""
    label = x.flatten(1)[:, 0].long()
    return torch.nn.functional.one_hot(label, 40) * (1.0 + label[:, None])


def walk_of(**lengths):
    """A recipe of chains that have no network to be trained."""
    return studies.Recipe(hidden=1, walkback=1, **lengths)


def test_the_burn_in_does_not_count_and_every_tenth_image_is_kept():
    size = walk_of(chains=7, burn_in=10, steps=20, every=5)
    first = torch.zeros(7, 1, 2, 2)
    walk = studies.follow(Counter(), first, of_value, size, generator=torch.Generator())
    steps = torch.arange(11, 31)  # the eleventh step is the first after ten of burn-in
    assert torch.equal(walk.labels, steps[:, None].expand(20, 7))
    belief = (1 + steps).exp() / ((1 + steps).exp() + 39)
    torch.testing.assert_close(walk.confidence, belief[:, None].expand(20, 7).float(), rtol=1e-5, atol=1e-6)
    assert walk.means[:, 0, 0, 0, 0].tolist() == [15, 20, 25, 30]
    assert walk.samples[:, 6, 0, 1, 1].tolist() == [15.5, 20.5, 25.5, 30.5]
    assert walk.course.shape == (7, 5, 1, 2, 2) and walk.course[:, 0, 0, 0, 0].tolist() == [0, 1, 6, 11, 16, 21, 26]


class TwoStates:
    """Chains of images that are all 0 or all 1, from 0 to 1 with probability a, back with b."""

    a, b = 0.05, 0.15

    def chain(self, x, steps, *, generator):
        up = x.flatten(1)[:, 0] > 0.5
        u = torch.rand(len(x), generator=generator)
        up = torch.where(up, u >= self.b, u < self.a)
        x = up.float()[:, None, None, None].expand(x.shape)
        return x[None], x[None]


def test_a_run_measures_chains_with_a_known_answer():
    """All chains start in one state; after the burn-in they have forgotten it, and the share is a / (a + b)."""
    a, b = TwoStates.a, TwoStates.b
    size = walk_of(chains=100, burn_in=60, steps=600, every=10)
    judge = lambda x: torch.stack([x.flatten(1)[:, 0] < 0.5, x.flatten(1)[:, 0] > 0.5], 1).float()  # noqa: E731
    shares, found = [], []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        walk = studies.follow(TwoStates(), torch.ones(100, 1, 1, 1), judge, size, generator=generator)
        shares.append(float(walk.labels[:10].double().mean()))  # where a burn-in that counts would show
        found.append(metrics.mixing(walk.labels, 2))
    assert_z(shares, a / (a + b))
    assert np.mean([f.ess for f in found]) == pytest.approx(1000 * (a + b) / (2 - a - b), rel=0.07)
    assert_z([f.stay for f in found], (a + b) / (2 * a * b))


def test_chains_start_at_test_images_and_are_compared_with_them(monkeypatch):
    """Training images are black and test images white: each shows where it is used."""
    labels = torch.arange(1200) % 10
    images = data.Images(
        "digits",
        *(torch.zeros(1200, 1, 8, 8), labels),
        *(torch.ones(60, 1, 8, 8), labels[:60]),
    )
    seen, compared = {}, []
    follow, parzen = studies.follow, metrics.parzen_log_likelihood

    class Judge(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10]

        def features(self, x):
            return x.flatten(1)

    def judge(images):
        seen["judged"] = True
        return Judge()

    def fit(model, x, y=None, **options):
        assert seen["judged"], "trained before there is a classifier"
        seen["trained on"] = x
        return Training({}, 1.0, 1.0, rows=len(x), parameters=1)

    def watched(model, first, *args, **options):
        seen["first"] = first
        return follow(model, first, *args, **options)

    def parzen_of(samples, x, *, width):
        compared.append((samples.mean().item(), x.mean().item(), len(x)))
        return parzen(samples, x, width=width)

    monkeypatch.setattr(studies.data, "load", lambda name: images)
    monkeypatch.setattr(studies.judge, "classifier", judge)
    monkeypatch.setattr(studies.judge, "about", lambda images: {"data": images.name, "accuracy": 0.75})
    monkeypatch.setattr(studies, "follow", watched)
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(studies.metrics, "parzen_log_likelihood", parzen_of)
    monkeypatch.setattr(
        studies.metrics, "frechet_distance", lambda a, b: float(seen.setdefault("real", []).append(b) or b.mean())
    )
    recipe = studies.recipe("dae_walkback5", "digits", "short")
    outcome = studies.run(recipe, "digits", 0, torch.device("cpu"))
    studies.plots.plt.close(outcome.figure)
    assert outcome.classifier == {"data": "digits", "accuracy": 0.75} and outcome.training.rows == 1200
    assert torch.equal(seen["first"], torch.ones(20, 1, 8, 8)) and seen["trained on"].max() == 0
    assert len(seen["real"]) == 4 and all((b == 1).all() for b in seen["real"])  # the features of test images
    chosen, told = ([c for c in compared if c[1] == white] for white in (0, 1))
    assert len(chosen) == 2 * len(recipe.widths) and {c[2] for c in chosen} == {1000}  # the width on training images
    assert len(told) == 2 and {c[2] for c in told} == {60}


def test_the_long_training_has_as_many_network_evaluations():
    for size in studies.SIZES:
        plain, long, walk = (studies.recipe(name, "mnist", size) for name in studies.VARIANTS)
        assert dataclasses.replace(long, epochs=plain.epochs) == plain == dataclasses.replace(walk, walkback=1)
        assert long.epochs == walk.epochs * walk.walkback > plain.epochs
    for name, size, message in (
        ("dae", "short", "name must be one of dae_walkback1, "),
        ("dae_walkback1", "tiny", "size must"),
    ):
        with pytest.raises(ValueError, match=message):
            studies.recipe(name, "mnist", size)


# A recipe is what is run, on few images of three classes.

BASE = studies.Recipe(
    epochs=2,
    batch_size=10,
    hidden=8,
    walkback=2,
    chains=6,
    burn_in=2,
    steps=10,
    every=5,
    held=4,
    widths=tuple(k / 50 for k in range(2, 60)),
)
TRAINS = {
    **ANOTHER_TRAINING,
    "hidden": 9,
    "walkback": 3,
    "level": 0.3,
    "threshold": 0.6,
}
MEASURES = {"chains": 7, "burn_in": 3, "steps": 12, "every": 4, "held": 30, "widths": (0.05,)}


def few_images(name):
    generator, labels = torch.Generator().manual_seed(0), torch.arange(60) % 3
    x = 0.7 * torch.rand(60, 1, 4, 4, generator=generator) + 0.3 * torch.nn.functional.one_hot(labels, 4)[:, None, None]
    return data.Images(name, x[:40], labels[:40], x[40:], labels[40:])


class ByColumn(torch.nn.Module):
    """A classifier by the brightest of the first three columns, and the image as its own features."""

    def forward(self, x):
        return x.mean((1, 2))[:, :3]

    def features(self, x):
        return x.flatten(1)


@functools.cache
def numbers_of_run(recipe):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies.data, "load", few_images)
        patch.setattr(studies.judge, "classifier", lambda images: ByColumn())
        return numbers_of(studies.run(recipe, "few", 0, torch.device("cpu")))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(BASE)])
def test_what_a_recipe_says_is_what_is_run_and_recorded(field):
    changed = dataclasses.replace(BASE, **{field: (TRAINS | MEASURES)[field]})
    before, after = BASE.settings(), changed.settings()
    assert len([key for key in before if before[key] != after[key]]) == 1
    (metrics_, _, history), (other, _, its_history) = numbers_of_run(BASE), numbers_of_run(changed)
    assert metrics_ != other and (history != its_history) == (field in TRAINS)


def test_no_two_uses_of_a_seed_share_a_state(monkeypatch):
    monkeypatch.setattr(studies.data, "load", few_images)
    monkeypatch.setattr(studies.judge, "classifier", lambda images: ByColumn())
    begun = begun_states(monkeypatch, studies)
    studies.run(BASE, "few", 3, torch.device("cpu"))
    assert len(begun) == len(set(begun)) == 6  # weights; order and noise; chains; corruption; choice of real images


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


def affine(factor, **options):
    """A denoiser of numbers whose mean is factor times the corrupted number."""
    encoder = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(encoder.weight, factor)
    options = {"likelihood": "gaussian", "corruption": gaussian_noise(0.6), **options}
    return DenoisingAutoencoder(encoder, torch.nn.Identity(), 1, **options)


@pytest.mark.checks("eq-denoising-gaussian-chain", how="statistical")
@pytest.mark.parametrize("v", [0.36 / 1.36, 0.1])
def test_the_gaussian_chain_has_the_variance_of_its_equilibrium(v):
    """Of data N(0, 1), corruption of variance 0.36 and restorations N(r*, v)."""
    a = 1 / 1.36
    expected = (a**2 * 0.36 + v) / (1 - a**2)
    start = math.sqrt(expected) * torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0))
    means, samples = affine(a, sigma=math.sqrt(v)).chain(start, 12, generator=torch.Generator().manual_seed(1))
    assert_z(samples[-1, :, 0].square(), expected)
    assert_z(means[-1, :, 0].square(), expected - v)  # shown without the last draw


def test_no_gradient_passes_through_the_walk():
    """The samples of the walk count as data: the second step's loss moves the second restoration alone."""
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    model = affine(0.7, sigma=0.5, walkback=2)
    model.loss(x, generator=torch.Generator().manual_seed(1)).total.sum().backward()
    found = float(model.encoder.weight.grad)

    def by_hand(stopped):
        generator = torch.Generator().manual_seed(1)
        e1, xi, e2 = (torch.randn(x.shape, generator=generator) for _ in range(3))
        w = torch.tensor(0.7, requires_grad=True)
        y1 = x + 0.6 * e1
        second = (w.detach() if stopped else w) * y1 + 0.5 * xi
        errors = (x - w * y1).square() + (x - w * (second + 0.6 * e2)).square()
        return float(torch.autograd.grad(errors.sum() / (2 * 2 * 0.25), w)[0])

    assert found == pytest.approx(by_hand(True), rel=1e-5)
    assert abs(found - by_hand(False)) > 0.05 * abs(found)


def test_images_of_another_shape_or_range_are_refused():
    """Images (n, h, w) minus the decoder's (n, 1, h, w) are (n, n, h, w), without a word."""
    x = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    noisy = {"likelihood": "gaussian", "corruption": gaussian_noise(0.5)}
    message = r"x must have the shape that the decoder gives, \(n, 1, 8, 8\), got \(n, 8, 8\)"
    for model in (small(), small(**noisy), contractive()):
        with pytest.raises(ValueError, match=message):
            model.loss(x)
        assert model.loss(x[:, None]).total.shape == (5,)
    with pytest.raises(ValueError, match=message):
        small(**noisy).score(x, 0.5)
    for bad in (2 * x[:, None] - 1, 255 * x[:, None], x[:, None] * math.nan):
        with pytest.raises(ValueError, match=r"x must be in \[0, 1\] for the Bernoulli likelihood, got (-?\d|nan)"):
            small().loss(bad)
        if bad.isfinite().all():
            assert small(**noisy).loss(bad).total.shape == (5,)
    assert small().loss(torch.full((5, 1, 8, 8), 0.5)).total.shape == (5,)  # grey is a choice, and said to be one


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
    x = torch.rand(2, 1, 8, 8)
    for steps, sigma in ((0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, math.nan)):
        with pytest.raises(ValueError, match="steps must be at least 1 and sigma positive"):
            contractive().chain(x, steps, sigma=sigma)
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="sigma must be positive"):
            small(likelihood="gaussian").score(x, sigma)


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
    history = train.fit(small(walkback=2), x, epochs=15, batch_size=64, lr=3e-3, device="cpu", progress=False).history
    assert history["total"][-4:].mean() < 0.8 * history["total"][:4].mean()
    assert history["first"][-4:].mean() < history["total"][-4:].mean()  # later steps start further away
    history = train.fit(contractive(), x, epochs=5, batch_size=64, lr=3e-3, device="cpu", progress=False).history
    assert history["total"][-4:].mean() < history["total"][:4].mean()
