"""The chapter on autoencoders: its equations, and the model."""

import itertools
import random
from fractions import Fraction

import mpmath as mp
import pytest
import sympy as sp
import torch

from gae_core import nets
from gae_core.models.autoencoder import Autoencoder


def rationals(n, rng, positive=False):
    return [Fraction(rng.randint(1 if positive else -9, 9), rng.randint(1, 9)) for _ in range(n)]


@pytest.mark.checks("eq-autoencoder-conditional-mean", how="exact")
@pytest.mark.parametrize("seed", range(5))
def test_squared_error_splits_into_what_the_code_forgets_and_what_the_decoder_misses(seed):
    """On a finite distribution with rational numbers, where every mean is an exact sum."""
    rng = random.Random(seed)
    data = [rationals(2, rng) for _ in range(7)]
    weight = rationals(7, rng, positive=True)
    total = sum(weight)
    code = [rng.randrange(3) for _ in data]
    decoded = {c: rationals(2, rng) for c in range(3)}

    def squared(a, b):
        return sum((u - v) ** 2 for u, v in zip(a, b, strict=True))

    mean = {}
    for c in set(code):
        members = [i for i in range(7) if code[i] == c]
        mass = sum(weight[i] for i in members)
        mean[c] = [sum(weight[i] * data[i][j] for i in members) / mass for j in range(2)]
    error, forgotten, missed = (
        sum(w * squared(a, b) for w, a, b in zip(weight, first, second, strict=True)) / total
        for first, second in (
            (data, [decoded[c] for c in code]),
            (data, [mean[c] for c in code]),
            ([mean[c] for c in code], [decoded[c] for c in code]),
        )
    )
    assert error == forgotten + missed
    assert missed > 0


def random_covariance(n, seed):
    rng = random.Random(seed)
    a = mp.matrix(n, n)
    for i, j in itertools.product(range(n), range(n)):
        a[i, j] = mp.mpf(rng.uniform(-1, 1))
    return a * a.T


@pytest.mark.checks("eq-autoencoder-pca", how="exact")
@pytest.mark.parametrize("seed", range(3))
def test_the_best_linear_autoencoder_leaves_the_last_eigenvalues(seed):
    with mp.workdps(40):
        cov, d = random_covariance(5, seed), 2
        values, vectors = mp.eigsy(cov)  # ascending

        def loss(w):
            rest = (mp.eye(5) - w) * cov * (mp.eye(5) - w).T
            return sum(rest[i, i] for i in range(5))

        first = vectors[:, 3:]
        tail = sum(values[i] for i in range(5 - d))
        assert abs(loss(first * first.T) - tail) < mp.mpf(10) ** -35
        rng = random.Random(seed)
        for _ in range(20):  # the best decoder for a random encoder is a regression on its code
            encoder = mp.matrix([[rng.gauss(0, 1) for _ in range(5)] for _ in range(d)])
            decoder = cov * encoder.T * (encoder * cov * encoder.T) ** -1
            assert loss(decoder * encoder) > tail
        # Any other pair of components is worse, by what it swaps.
        other = vectors[:, 2:4]
        assert loss(other * other.T) - tail > mp.mpf(10) ** -5


def test_for_a_singular_covariance_the_best_map_is_free_where_no_data_are():
    """Three coordinates, the last always 0: two minimisers that agree on the data, and one is no projection on them."""
    cov = sp.diag(3, 1, 0)
    projection = sp.diag(1, 0, 0)
    other = projection + sp.Matrix([[0, 0, 5], [0, 0, 0], [0, 0, 0]])  # also of rank 1
    for w in (projection, other):
        rest = sp.eye(3) - w
        assert w.rank() == 1 and (rest * cov * rest.T).trace() == 1  # what the second component carries
        assert w * cov == projection * cov
    assert other != projection


@pytest.mark.checks("eq-autoencoder-gauge", how="symbolic")
def test_an_invertible_map_of_the_code_changes_no_reconstruction():
    x, a, b = sp.symbols("x a b", real=True, nonzero=True)
    encoder, decoder = sp.Function("E", real=True), sp.Function("D", real=True)
    there_and_back = [(lambda z: a * z + b, lambda z: (z - b) / a), (sp.exp, sp.log), (lambda z: z, lambda z: z)]
    loss = (x - decoder(encoder(x))) ** 2
    for there, back in there_and_back:
        assert sp.simplify((x - decoder(sp.simplify(back(there(encoder(x)))))) ** 2 - loss) == 0
    assert sp.simplify((x - decoder(a * encoder(x))) ** 2 - loss) != 0, "without its inverse it does"


def bures_squared(a, b):
    """W2 squared of two centred Gaussians in the plane; tr sqrt(M) of a 2x2 matrix is sqrt(tr M + 2 sqrt det M)."""
    product = a * b  # same eigenvalues as a^(1/2) b a^(1/2)
    trace, det = product[0, 0] + product[1, 1], product[0, 0] * product[1, 1] - product[0, 1] * product[1, 0]
    return a[0, 0] + a[1, 1] + b[0, 0] + b[1, 1] - 2 * mp.sqrt(trace + 2 * mp.sqrt(max(det, 0)))


@pytest.mark.checks("eq-autoencoder-two-gaps", how="exact")
def test_the_two_gaps_bound_the_distance_of_samples_from_data():
    """Gaussian data in the plane, linear maps to and from one code: every term is known in closed form."""
    rng = random.Random(0)
    with mp.workdps(40):
        for seed in range(50):
            cov = random_covariance(2, seed)
            encoder = mp.matrix([[rng.gauss(0, 1), rng.gauss(0, 1)]])
            decoder = mp.matrix([[rng.gauss(0, 1)], [rng.gauss(0, 1)]])
            rest = mp.eye(2) - decoder * encoder
            error = rest * cov * rest.T
            loss = error[0, 0] + error[1, 1]
            code_std = mp.sqrt((encoder * cov * encoder.T)[0, 0])
            lipschitz = mp.sqrt((decoder.T * decoder)[0, 0])
            left = mp.sqrt(bures_squared(cov, decoder * decoder.T))
            right = mp.sqrt(loss) + lipschitz * abs(code_std - 1)  # W2 of N(0, s²) and N(0, 1) is |s - 1|
            assert left <= right + mp.mpf(10) ** -30
        assert bures_squared(mp.eye(2), 4 * mp.eye(2)) == 2  # (1 - 2)² in each of two coordinates
        # Equality: lossless code in one dimension, E x = a x and D z = z / a, data N(0, s²).
        a, s = mp.mpf("0.7"), mp.mpf("2.3")
        assert abs(abs(s - 1 / a) - (1 / a) * abs(a * s - 1)) < mp.mpf(10) ** -38


@pytest.mark.checks("eq-autoencoder-data-processing", how="exact")
@pytest.mark.parametrize("seed", range(10))
def test_decoding_never_increases_the_divergence(seed):
    """Finite codes: a decoder that merges codes loses divergence, one that is injective keeps it."""
    rng = random.Random(seed)
    with mp.workdps(40):
        q, p = ([mp.mpf(v.numerator) / v.denominator for v in rationals(6, rng, positive=True)] for _ in range(2))
        q, p = [v / mp.fsum(q) for v in q], [v / mp.fsum(p) for v in p]

        def kl(q, p):
            return mp.fsum(a * mp.log(a / b) for a, b in zip(q, p, strict=True))

        def push(density, decoder):
            return [mp.fsum(v for v, image in zip(density, decoder, strict=True) if image == x) for x in set(decoder)]

        merging, injective = [0, 0, 1, 1, 2, 2], [3, 1, 4, 0, 5, 2]
        assert kl(push(q, merging), push(p, merging)) < kl(q, p)
        assert abs(kl(push(q, injective), push(p, injective)) - kl(q, p)) < mp.mpf(10) ** -35


@pytest.mark.checks("eq-autoencoder-gaussian-fit", how="symbolic")
@pytest.mark.parametrize("name", ["uniform", "exponential"])
def test_the_best_gaussian_has_the_moments_and_leaves_the_negentropy(name):
    z, mu = sp.symbols("z mu", real=True)
    variance = sp.symbols("v", positive=True)
    density, low, high = {"uniform": (sp.Rational(1, 3), 0, 3), "exponential": (sp.exp(-z), 0, sp.oo)}[name]

    def mean(f):
        return sp.integrate(sp.expand(f) * density, (z, low, high))

    entropy = sp.simplify(-sp.integrate(density * sp.expand_log(sp.log(density), force=True), (z, low, high)))
    kl = -entropy + sp.log(2 * sp.pi * variance) / 2 + mean((z - mu) ** 2) / (2 * variance)
    (best,) = sp.solve([sp.diff(kl, mu), sp.diff(kl, variance)], [mu, variance], dict=True)
    m, c = mean(z), mean(z**2) - mean(z) ** 2
    assert sp.simplify(best[mu] - m) == 0 and sp.simplify(best[variance] - c) == 0
    left = sp.simplify(kl.subs(best) - (sp.log(2 * sp.pi * sp.E * c) / 2 - entropy))
    assert left == 0
    assert sp.hessian(kl, (mu, variance)).subs(best).is_positive_definite


def model(dim=3):
    torch.manual_seed(0)
    return Autoencoder(*nets.mlp_pair((1, 4, 4), dim, hidden=(16,)), dim)


def test_loss_is_the_squared_error_summed_over_each_sample():
    x = torch.rand(5, 1, 4, 4)
    loss = model().loss(x)
    expected = torch.stack([((a - b) ** 2).sum() for a, b in zip(x, model()(x), strict=True)])
    torch.testing.assert_close(loss.reconstruction, expected)
    torch.testing.assert_close(loss.total, expected)
    assert loss.total.shape == (5,)


def test_gradients_reach_encoder_and_decoder():
    m = model()
    m.loss(torch.rand(5, 1, 4, 4)).total.mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in m.parameters())


def test_samples_are_decoded_codes_and_depend_on_the_generator_alone():
    m = model()
    state = torch.random.get_rng_state()
    first, second = (m.sample(4, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (4, 1, 4, 4) and not first.requires_grad
    assert torch.equal(torch.random.get_rng_state(), state)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(first, m.decode(z).detach())
