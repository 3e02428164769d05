"""The chapter on the entropic autoencoder: its equations, and the model."""

import math
import random

import mpmath as mp
import pytest
import sympy as sp
import torch
from helpers import assert_z

from gae_core import nets
from gae_core.entropy import knn_entropy, knn_local_entropy
from gae_core.gaussian import gaussian_entropy
from gae_core.models.eae import EAE
from gae_core.normalization import CodeBatchNorm


def batch_norm(u, eps=0):
    """Batch norm of one coordinate, written out; exact for SymPy and mpmath numbers alike."""
    n = len(u)
    mean = sum(u) / n
    variance = sum((v - mean) ** 2 for v in u) / n
    root = sp.sqrt if isinstance(variance, sp.Basic) else mp.sqrt
    return [(v - mean) / root(variance + eps) for v in u]


@pytest.mark.checks("eq-eae-moments", how="symbolic")
def test_batch_norm_gives_mean_zero_and_nearly_variance_one():
    u = sp.symbols("u0:4", real=True)
    eps = sp.symbols("epsilon", positive=True)
    z = batch_norm(u, eps)
    v = sum(w**2 for w in u) / 4 - (sum(u) / 4) ** 2  # not as in batch_norm
    assert sp.simplify(sum(z)) == 0
    assert sp.simplify(sum(w**2 for w in z) / 4 - v / (v + eps)) == 0
    assert sp.simplify((sum(w**2 for w in z) / 4 - 1).subs(dict(zip(u, [0, 1, 2, 5], strict=True)))) != 0


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_module_does_what_the_equation_says(scale):
    u = scale * torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, v = CodeBatchNorm(3).double()(u), u.var(0, correction=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=u.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.square().mean(0), v / (v + 1e-5), rtol=1e-12, atol=0)


@pytest.mark.checks("eq-eae-weight", how="exact")
@pytest.mark.parametrize(("n", "d"), [(10, 2), (40, 7)])
def test_the_sources_sum_of_logarithms_is_the_estimate_up_to_a_factor_that_depends_on_d(n, d):
    """Between two batches the constant cancels; 30 digits with mpmath from the coordinates on."""
    rng = random.Random(n)
    with mp.workdps(40):

        def log_sum(x):
            return mp.fsum(
                mp.log(min(mp.sqrt(mp.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True))) for q in x if q is not p))
                for p in x
            )

        batches = [[[mp.mpf(rng.gauss(0, 1)) for _ in range(d)] for _ in range(n)] for _ in range(2)]
        first, second = (log_sum(x) for x in batches)
        # The estimate by its definition: log p(z_i) = psi(1) - psi(n) - log V - d log eps, averaged.
        volume = mp.pi ** (mp.mpf(d) / 2) / mp.gamma(mp.mpf(d) / 2 + 1)
        estimate = [-(mp.psi(0, 1) - mp.psi(0, n) - mp.log(volume)) + mp.mpf(d) / n * s for s in (first, second)]
        assert abs((estimate[1] - estimate[0]) - mp.mpf(d) / n * (second - first)) < mp.mpf(10) ** -35
        tensor = torch.tensor([[[float(v) for v in p] for p in x] for x in batches], dtype=torch.float64)
        assert float(knn_entropy(tensor[0])) == pytest.approx(float(estimate[0]), abs=1e-12)
        assert abs(float(estimate[1] - estimate[0]) - float(second - first)) > 1e-3, "the bare sum is another weight"


DENSITIES = {  # on the line, with finite entropy; second moments as they come
    "uniform": (lambda z: 1 / sp.sqrt(12), -sp.sqrt(3), sp.sqrt(3)),
    "shifted exponential": (lambda z: sp.exp(-(z + 1)), -1, sp.oo),
}


def moments_and_entropy(name):
    z = sp.symbols("z", real=True)
    density, low, high = DENSITIES[name]
    p = density(z)
    m, second = (sp.integrate(z**k * p, (z, low, high)) for k in (1, 2))
    log_p = sp.expand_log(sp.log(p), force=True)
    entropy = -sp.integrate(sp.expand(p * log_p), (z, low, high))
    log_normal = -(z**2) / 2 - sp.log(2 * sp.pi) / 2
    kl = sp.integrate(sp.expand(p * (log_p - log_normal)), (z, low, high))
    return sp.simplify(m), sp.simplify(second - m**2), sp.simplify(entropy), sp.simplify(kl)


@pytest.mark.checks("eq-eae-gap", how="symbolic")
@pytest.mark.checks("eq-eae-ideal", how="symbolic")
@pytest.mark.parametrize("name", DENSITIES)
def test_a_missing_nat_of_entropy_is_a_nat_of_divergence(name):
    """Both densities have mean 0 and variance 1; the divergence is integrated from its definition."""
    mean, variance, entropy, kl = moments_and_entropy(name)
    assert mean == 0 and variance == 1
    assert sp.simplify(kl - (sp.log(2 * sp.pi * sp.E) / 2 - entropy)) == 0
    error, weight = sp.symbols("R lambda", positive=True)
    ideal = error + weight * kl - weight * sp.log(2 * sp.pi * sp.E) / 2
    assert sp.simplify(error - weight * entropy - ideal) == 0


@pytest.mark.checks("eq-eae-gap", how="symbolic")
def test_the_gap_needs_the_second_moment_and_not_the_mean():
    """N(m, s²): the identity holds where m² + s² = 1, whatever m, and fails elsewhere."""
    m = sp.symbols("m", real=True)
    s = sp.symbols("s", positive=True)
    kl = (m**2 + s**2 - 1) / 2 - sp.log(s)
    gap = sp.log(2 * sp.pi * sp.E) / 2 - sp.log(2 * sp.pi * sp.E * s**2) / 2
    assert sp.simplify((kl - gap).subs(m, sp.sqrt(1 - s**2))) == 0
    assert sp.simplify(kl - gap) != 0


@pytest.mark.checks("eq-eae-promise", how="exact")
@pytest.mark.parametrize("seed", range(5))
def test_codes_near_the_maximum_are_decoded_nearly_as_normal_ones(seed):
    """Mixtures of two normals with variance 1, and D(z) = |z|, which keeps all of their total variation."""
    rng = random.Random(seed)
    with mp.workdps(30):
        a = mp.mpf(rng.uniform(0.2, 0.9))
        s = mp.sqrt(1 - a * a)

        def density(z):
            return (mp.npdf(z, a, s) + mp.npdf(z, -a, s)) / 2

        def mean(f):  # of an even function, from its right half
            return 2 * mp.quad(f, [0, a, 1, 2, 4, 12])

        assert abs(mean(lambda z: z * z * density(z)) - 1) < mp.mpf(10) ** -20
        delta = mp.log(2 * mp.pi * mp.e) / 2 + mean(lambda z: density(z) * mp.log(density(z)))
        total_variation = mean(lambda z: abs(2 * density(z) - 2 * mp.npdf(z)) / 2) / 2
        assert 0 < total_variation <= mp.sqrt(delta / 2)

        # On the line, W2² is E (T - Z)², T from q and Z the normal quantile at T's own: Phi(Z) = F_q(T).
        def normal_quantile(t):
            twice = (mp.erf((t - a) / (s * mp.sqrt(2))) + mp.erf((t + a) / (s * mp.sqrt(2)))) / 2  # 2 F_q(t) - 1
            return mp.sqrt(2) * mp.erfinv(twice)

        points = [mp.mpf(i) / 10 for i in range(1, 51)]  # both are 0 at 0, and beyond 5 there is next to nothing
        w2_squared = 2 * mp.fsum((t - normal_quantile(t)) ** 2 * density(t) / 10 for t in points)
        assert 0 < w2_squared <= 2 * delta


@pytest.mark.checks("eq-eae-parts", how="symbolic")
@pytest.mark.parametrize("name", DENSITIES)
def test_the_divergence_splits_into_moments_and_shape(name):
    """Scaled and shifted by symbols, so that mean and variance are arbitrary; H(a Z + b) = H(Z) + log a."""
    a, b = sp.symbols("a b", positive=True)
    z = sp.symbols("z", real=True)
    density, low, high = DENSITIES[name]
    p = density(z)
    log_p = sp.expand_log(sp.log(p), force=True) - sp.log(a)  # of a Z + b, at the image of z
    log_normal = -((a * z + b) ** 2) / 2 - sp.log(2 * sp.pi) / 2
    kl = sp.integrate(sp.expand(p * (log_p - log_normal)), (z, low, high))
    entropy = -sp.integrate(sp.expand(p * log_p), (z, low, high))
    moments = (b**2 + a**2 - 1 - sp.log(a**2)) / 2  # mean b, variance a²
    shape = sp.log(2 * sp.pi * sp.E * a**2) / 2 - entropy
    assert sp.simplify(sp.expand_log(kl - moments - shape, force=True)) == 0
    assert sp.simplify(shape).subs(a, 3) > 0


@pytest.mark.checks("eq-eae-correlation", how="symbolic")
def test_for_normalised_codes_the_moment_part_is_correlation():
    """From the definition of the divergence between normal densities in the plane, by moments of order two."""
    r = sp.symbols("rho", real=True)
    x, y = sp.symbols("x y", real=True)
    correlation = sp.Matrix([[1, r], [r, 1]])
    v = sp.Matrix([x, y])
    log_ratio = -sp.log(correlation.det()) / 2 - (v.T * correlation.inv() * v)[0] / 2 + (v.T * v)[0] / 2
    moments = {x**2: 1, y**2: 1, x * y: r}
    expanded = sp.Poly(sp.expand(sp.simplify(log_ratio + sp.log(correlation.det()) / 2)), x, y)
    mean = sum(c * moments[x**i * y**j] for (i, j), c in expanded.terms()) - sp.log(correlation.det()) / 2
    assert sp.simplify(mean + sp.log(1 - r**2) / 2) == 0


@pytest.mark.checks("eq-eae-invariance", how="symbolic")
def test_batch_norm_undoes_scale_and_position():
    u = sp.symbols("u0:3", real=True)
    a = sp.symbols("a", positive=True)
    b = sp.symbols("b", real=True)
    values = dict(zip(u, [0, 1, 5], strict=True))
    for plain, moved in zip(batch_norm(u), batch_norm([a * v + b for v in u]), strict=True):
        assert sp.simplify(plain - moved) == 0
        mirrored = batch_norm([-v for v in u])
        assert sp.simplify((mirrored[0] - batch_norm(u)[0]).subs(values)) != 0, "a negative factor is a reflection"


@pytest.mark.checks("eq-eae-gradient", how="exact")
def test_the_encoders_gradient_neither_shifts_nor_scales():
    """The gradient of the nearest-neighbour term through batch norm, by differences of 50-digit numbers."""
    rng = random.Random(1)
    with mp.workdps(50):
        u = [[mp.mpf(rng.gauss(0, 1)) for _ in range(2)] for _ in range(6)]

        def loss(u):
            columns = [batch_norm([p[j] for p in u]) for j in range(2)]
            z = list(zip(*columns, strict=True))
            return mp.fsum(mp.log(min((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 for q in z if q is not p)) for p in z)

        h = mp.mpf(10) ** -20
        for j in range(2):
            slope = []
            for i in range(6):
                up, down = ([list(p) for p in u] for _ in range(2))
                up[i][j] += h
                down[i][j] -= h
                slope.append((loss(up) - loss(down)) / (2 * h))
            assert abs(mp.fsum(slope)) < mp.mpf(10) ** -28
            assert abs(mp.fsum(p[j] * g for p, g in zip(u, slope, strict=True))) < mp.mpf(10) ** -28
            assert max(abs(g) for g in slope) > 0.1


def test_the_module_cuts_the_same_directions_from_the_gradient():
    u = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    z = CodeBatchNorm(3, eps=1e-14).double()(u)  # torch asks for a positive one
    (gradient,) = torch.autograd.grad(knn_entropy(z), u)
    zero = torch.zeros(3, dtype=u.dtype)
    torch.testing.assert_close(gradient.sum(0), zero, rtol=0, atol=1e-11)
    torch.testing.assert_close((u.detach() * gradient).sum(0), zero, rtol=0, atol=1e-11)
    assert gradient.abs().max() > 0.01


@pytest.mark.checks("eq-eae-batch-identity", how="symbolic")
def test_the_distance_to_the_codes_of_ideal_statistics_is_an_identity():
    u = sp.symbols("u0:4", real=True)
    z, v = batch_norm(u), sum(w**2 for w in u) / 4 - (sum(u) / 4) ** 2
    left = sum((a - b) ** 2 for a, b in zip(z, u, strict=True)) / 4
    difference = left - (1 + sum(w**2 for w in u) / 4 - 2 * sp.sqrt(v))
    assert sp.simplify(difference) == 0


@pytest.mark.checks("eq-eae-batch-noise", how="exact")
def test_the_noise_of_normal_codes_has_its_leading_term_and_an_error_of_second_order():
    """B v follows chi-squared with B - 1 degrees of freedom, so the mean of its root is a ratio of Gamma functions."""
    with mp.workdps(40):
        errors = []
        for size in (mp.mpf(10) ** k for k in (2, 3, 4)):
            root = mp.sqrt(2 / size) * mp.gammaprod([size / 2], [(size - 1) / 2])
            errors.append(abs(2 - 2 * root - (1 + mp.mpf(3 - 1) / 4) / size) * size**2)
        assert all(0.01 < error < 10 for error in errors)
        assert abs(errors[1] - errors[2]) < 0.01 * errors[2], "it settles: the error is of the order 1 / B²"


def test_running_averages_add_their_own_share_to_the_noise():
    """Training against evaluation: 2 / (2 - w) times the noise against ideal statistics, w the newest batch's weight.

    The weight is the module's default, which the test finds by what it does.
    """
    size, batches, w = 128, 4000, 0.1
    generator = torch.Generator().manual_seed(5)
    norm, differences = CodeBatchNorm(4).double(), []
    for _ in range(batches):
        u = torch.randn(size, 4, dtype=torch.float64, generator=generator)
        expected = norm.eval()(u)
        differences.append((norm.train()(u) - expected).square().mean())
    against_ideal = 2 - 2 * float(mp.sqrt(2 / mp.mpf(size)) * mp.gammaprod([size / 2], [(size - 1) / 2]))
    settled = torch.stack(differences[100:]).reshape(-1, 50).mean(1)  # means of 50, as neighbours share averages
    assert_z(settled, against_ideal * 2 / (2 - w))
    with pytest.raises(AssertionError):
        assert_z(settled, against_ideal)
    with pytest.raises(AssertionError):
        assert_z(settled, against_ideal * 2 / (2 - 0.2))


def test_the_measure_of_shape_is_for_few_dimensions():
    """For normal codes it should give 0: it does so within a tenth of a nat at 8 dimensions, and not at 32."""

    def shape(d):
        z = torch.randn(5000, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
        return float(gaussian_entropy(torch.cov(z.T)) - knn_entropy(z, 3))

    assert 0 < shape(8) < 0.1
    assert -3 < shape(32) < -2, "a quantity that is never negative"


@pytest.mark.checks("eq-eae-batch-noise", how="statistical")
@pytest.mark.parametrize(("name", "kurtosis"), [("normal", 3.0), ("uniform", 1.8), ("sign", 1.0)])
def test_codes_of_a_batch_differ_from_those_of_evaluation_by_the_stated_noise(name, kurtosis):
    """Batches of 800, where the terms of second order are below the standard error of 3,000 batches."""
    generator = torch.Generator().manual_seed(3)
    size, replicates = 800, 3000
    draw = {
        "normal": lambda: torch.randn(replicates, size, generator=generator, dtype=torch.float64),
        "uniform": lambda: (torch.rand(replicates, size, generator=generator, dtype=torch.float64) - 0.5) * 12**0.5,
        "sign": lambda: torch.randint(2, (replicates, size), generator=generator).double() * 2 - 1,
    }[name]
    u = draw()
    z = (u - u.mean(1, keepdim=True)) / u.std(1, keepdim=True, correction=0)
    difference = (z - u).square().mean(1)
    assert_z(difference, (1 + (kurtosis - 1) / 4) / size)
    with pytest.raises(AssertionError):
        assert_z(difference, (1 + (kurtosis + 2 - 1) / 4) / size)  # the wrong kurtosis is seen


def model(lam=1.0, **options):
    torch.manual_seed(0)
    return EAE(*nets.mlp_pair((1, 4, 4), 3, hidden=(16,)), 3, lam=lam, **options).double()


def images(n=20):
    return torch.rand(n, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_reconstruction_minus_weighted_entropy_of_normalised_codes():
    m, x = model(lam=0.7, k=2), images()
    loss = m.loss(x)
    u = m.encoder(x)
    z = (u - u.mean(0)) / (u.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(loss.reconstruction, (x - m.decoder(z)).square().sum((1, 2, 3)))
    torch.testing.assert_close(loss.entropy, knn_local_entropy(z, 2))
    torch.testing.assert_close(loss.total, loss.reconstruction - 0.7 * loss.entropy)
    assert loss.total.shape == loss.entropy.shape == (20,)


def test_the_entropy_reaches_the_encoder_and_not_the_decoder():
    m = model()
    m.loss(images()).entropy.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.encoder.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in m.decoder.parameters())


def test_with_weight_zero_the_gradient_is_that_of_the_autoencoder_with_batch_norm():
    m, x = model(lam=0.0), images()
    with_term = torch.autograd.grad(m.loss(x).total.mean(), list(m.parameters()))
    without = torch.autograd.grad(m.loss(x).reconstruction.mean(), list(m.parameters()))
    for a, b in zip(with_term, without, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_raising_the_entropy_alone_removes_correlation():
    """The term by itself, on free codes in the plane: nine tenths of the moment part are gone."""
    generator = torch.Generator().manual_seed(4)
    u = torch.randn(400, 2, dtype=torch.float64, generator=generator)
    u[:, 1] = 0.95 * u[:, 0] + 0.3 * u[:, 1]  # correlation about 0.95
    u.requires_grad_()
    norm, optimizer = CodeBatchNorm(2).double(), torch.optim.Adam([u], lr=0.02)

    def moment_part(z):
        return float(-0.5 * torch.logdet(torch.corrcoef(z.T)))

    before = moment_part(u.detach())
    for _ in range(1000):
        rows = torch.randperm(400, generator=generator)[:100]
        optimizer.zero_grad()
        (-knn_entropy(norm(u[rows]))).backward()
        optimizer.step()
    after = moment_part(u.detach())
    assert before > 0.8, "a correlation of 0.9 or more at the start"
    assert after < 0.1 * before


def test_evaluation_does_not_depend_on_the_company():
    m, x = model(), images()
    m.loss(x)
    m.eval()
    torch.testing.assert_close(m.encode(x)[:1], m.encode(x[:1]))
    m.train()
    assert not torch.allclose(m.encode(x)[:2], m.encode(x[:2]))


@pytest.mark.parametrize("lam", [-1.0, math.nan])
def test_a_weight_that_is_negative_or_no_number_is_refused(lam):
    with pytest.raises(ValueError, match="lam must be"):
        model(lam=lam)


def test_the_documented_defaults_are_a_weight_of_one_and_the_nearest_neighbour():
    torch.manual_seed(0)
    default = EAE(*nets.mlp_pair((1, 4, 4), 3, hidden=(16,)), 3).double()
    loss, explicit = default.loss(images()), model(lam=1.0, k=1).loss(images())
    torch.testing.assert_close(loss.total, explicit.total, rtol=0, atol=0)
    torch.testing.assert_close(loss.total, loss.reconstruction - loss.entropy)
    assert loss.entropy.abs().min() > 0


def test_in_evaluation_the_loss_has_the_same_terms_and_signs():
    m, x = model(lam=0.7, k=2), images()
    for _ in range(3):
        m.loss(x)
    m.eval()
    loss, z = m.loss(x), m.encode(x)
    torch.testing.assert_close(loss.reconstruction, (x - m.decode(z)).square().sum((1, 2, 3)))
    torch.testing.assert_close(loss.entropy, knn_local_entropy(z, 2))
    torch.testing.assert_close(loss.total, loss.reconstruction - 0.7 * loss.entropy)


def test_equal_images_stop_with_a_reason():
    x = images()
    x[1] = x[0]
    with pytest.raises(ValueError, match="coincide"):
        model().loss(x)
