"""The chapter on the VAE: its equations, the model and its likelihood.

The models' likelihood is known: a linear-Gaussian one, and quadrature.
"""

import dataclasses
import itertools
import math
import random
import types

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from helpers import assert_z
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import stats
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from gae_core import data, metrics, nets, train
from gae_core.gaussian import standard_normal_log_prob
from gae_core.metrics import PROPOSALS, WIDTHS, active_units, encoder_information, importance_weighted_nll
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.vae import IWAE, VAE
from gae_core.studies import vae as studies


@pytest.fixture(autouse=True)
def float64_and_fixed_weights():
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
    torch.set_default_dtype(torch.float32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


DIM, PIXELS, SIGMA = 2, 5, 0.6
SCALES = torch.tensor([1.5, 0.7], dtype=torch.float64)
PRECISION = 1 + SCALES**2 / SIGMA**2  # of the posterior: diagonal, for the decoder's columns are orthogonal


def linear_gaussian(shift=0.0, log_ratio=0.0):
    """Probabilistic PCA as a VAE, and its p(x).

    Its q(z | x) is the posterior, but for ``shift`` of the means and ``log_ratio`` of the logarithms of the variances.
    """
    columns = torch.linalg.qr(torch.randn(PIXELS, DIM, generator=seeded(1)))[0] * SCALES
    offset = torch.randn(PIXELS, generator=seeded(2))
    encoder, decoder = nn.Linear(PIXELS, 2 * DIM), nn.Linear(DIM, PIXELS)
    with torch.no_grad():
        decoder.weight.copy_(columns)
        decoder.bias.copy_(offset)
        means = columns.T / SIGMA**2 / PRECISION[:, None]
        encoder.weight.copy_(torch.cat([means, torch.zeros(DIM, PIXELS)]))
        encoder.bias.copy_(torch.cat([shift - means @ offset, log_ratio - PRECISION.log()]))
    model = VAE(encoder, decoder, DIM, likelihood="gaussian", sigma=SIGMA).eval()
    return model, MultivariateNormal(offset, columns @ columns.T + SIGMA**2 * torch.eye(PIXELS))


def gap(shift, log_ratio):
    """KL(q(z | x) || p(z | x)) of that model."""
    return 0.5 * float((math.expm1(log_ratio) - log_ratio + shift**2 * PRECISION).sum())


WRONG = {"shift": 0.3, "log_ratio": 0.4}


# --- importance-weighted likelihood ---


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_with_the_posterior_as_proposal_the_likelihood_is_exact_for_any_number_of_samples(samples):
    model, density = linear_gaussian()
    x = 2 * torch.randn(20, PIXELS)
    nll = importance_weighted_nll(model, x, samples=samples, generator=seeded(), proposal="posterior").nll
    torch.testing.assert_close(nll, -density.log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("samples", [1, 3, 5])
def test_the_weights_mean_is_unbiased_for_the_density(samples, proposal):
    model, density = linear_gaussian(**WRONG)
    x = 0.5 * torch.randn(1, PIXELS).expand(4000, -1)
    nll = importance_weighted_nll(model, x, samples=samples, proposal=proposal, generator=seeded()).nll
    assert_z((-nll - density.log_prob(x)).exp(), 1.0)


def test_with_a_wrong_proposal_it_falls_to_the_likelihood_from_above():
    model, density = linear_gaussian(**WRONG)
    x = torch.randn(1, PIXELS).expand(1000, -1)
    truth = float(-density.log_prob(x[0]))
    excess = {
        s: importance_weighted_nll(model, x, samples=s, generator=seeded(s), proposal="posterior").nll - truth
        for s in (1, 3, 12, 100)
    }
    assert_z(excess[1], gap(**WRONG))  # one sample: the evidence lower bound
    for few, many in itertools.pairwise(excess.values()):
        difference = few - many
        assert difference.mean() > 4 * difference.std() / math.sqrt(1000)
    # To first order in 1 / S the excess is half the variance of the weights, over S; here from the Gaussian integral.
    ratio = math.exp(WRONG["log_ratio"])
    terms = ratio / math.sqrt(2 * ratio - 1) * (WRONG["shift"] ** 2 * PRECISION / (2 * ratio - 1)).exp()
    assert_z(excess[100], (float(terms.prod()) - 1) / 200)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("chunk_size", [1, 7, 60, 61])
def test_chunks_do_not_change_the_value(chunk_size, proposal):
    model, _ = linear_gaussian(**WRONG)
    x = torch.randn(11, PIXELS)
    whole, parts = (
        importance_weighted_nll(model, x, samples=20, proposal=proposal, chunk_size=c, generator=seeded()).nll
        for c in (10_000, chunk_size)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_bytes_are_binary_images():
    model = bernoulli_vae().float()
    black_and_white = (255 * BINARY).to(torch.uint8)
    nll = [
        importance_weighted_nll(model, x, samples=3, generator=seeded(), proposal="posterior").nll
        for x in (black_and_white, BINARY.float())
    ]
    assert torch.equal(*nll)
    with pytest.raises(ValueError, match="x must have entries 0 and 1 alone"):
        importance_weighted_nll(model, black_and_white // 2)


def test_the_likelihood_stays_finite_where_the_density_underflows():
    model, density = linear_gaussian()
    x = torch.full((1, PIXELS), 1e3)
    truth = -density.log_prob(x)
    assert truth > 1e5
    torch.testing.assert_close(importance_weighted_nll(model, x, samples=3, proposal="posterior").nll, truth)


def bernoulli_vae():
    encoder, decoder = nets.mlp_pair((1, 2, 2), 1, hidden=(8,), heads=2, output=nn.Identity)
    return VAE(encoder, decoder, 1).eval()


BINARY = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64).view(16, 1, 2, 2)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("samples", [1, 10])
def test_bernoulli_likelihood_agrees_with_quadrature_over_the_code(samples, proposal):
    model = bernoulli_vae()
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
    mean = model.decode(nodes[:, None]).detach()  # (80, 1, 2, 2)
    p = torch.where(BINARY[:, None] == 1, mean, 1 - mean).flatten(2).prod(2) @ (weights / weights.sum())
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    x = BINARY.repeat(500, 1, 1, 1)
    estimates = (
        (-importance_weighted_nll(model, x, samples=samples, proposal=proposal, generator=seeded()).nll)
        .exp()
        .view(500, 16)
    )
    for estimate, exact in zip(estimates.T, p, strict=True):
        assert_z(estimate, float(exact))


@pytest.mark.parametrize("name", ["samples", "chunk_size"])
def test_importance_weighted_nll_rejects_numbers_below_one(name):
    with pytest.raises(ValueError, match=f"{name}.* must be at least 1"):
        importance_weighted_nll(linear_gaussian()[0], torch.zeros(2, PIXELS), **{name: 0})
    with pytest.raises(ValueError, match="x must have rows"):
        importance_weighted_nll(linear_gaussian()[0], torch.zeros(0, PIXELS))


def test_a_weight_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="model must give finite weights, it does not for 1 rows"):
        importance_weighted_nll(linear_gaussian()[0], torch.tensor([[0.0] * PIXELS, [math.nan] * PIXELS]))


SPIKE = {"shift": 0.0, "log_ratio": 2 * math.log(1e-3)}  # the right mean, a thousandth of the right width


@pytest.mark.checks("def-bn_vae-mixture", how="statistical")
def test_a_spike_for_a_proposal_hides_the_likelihood_and_a_mixture_finds_it():
    model, density = linear_gaussian(**SPIKE)
    x = 0.5 * torch.randn(200, PIXELS)
    truth = -density.log_prob(x)
    spike, mixture = (
        importance_weighted_nll(model, x, samples=512, proposal=proposal, generator=seeded())
        for proposal in ("posterior", "mixture")
    )
    assert float((spike.nll - truth).mean()) > 4 * DIM  # nats, and the doubling does not notice
    assert float((spike.halved - spike.nll).mean()) < 1
    assert float((mixture.nll - truth).mean()) < 0.2
    assert_z((truth - mixture.nll).exp(), 1.0)


@pytest.mark.checks("eq-bn_vae-spike", how="statistical")
@pytest.mark.parametrize("samples", [8, 512])
def test_what_a_spike_costs(samples):
    """One coordinate, seen without noise but for its own; the law of the excess has no free parameter."""
    model, density = linear_gaussian(**SPIKE)
    x = 0.5 * torch.randn(400, PIXELS)
    excess = importance_weighted_nll(model, x, samples=samples, proposal="posterior", generator=seeded()).nll
    excess = excess + density.log_prob(x)
    eps = torch.randn(4000, samples, DIM, generator=seeded(1), dtype=torch.float64)
    gain = (0.5 * eps.square().sum(2)).logsumexp(1) - math.log(samples)
    expected = -0.5 * DIM * SPIKE["log_ratio"] - float(gain.mean())
    noise = math.hypot(float(excess.std()) / 20, float(gain.std()) / math.sqrt(4000))
    assert abs(float(excess.mean()) - expected) < 4 * noise
    assert noise < 0.3 < expected


@pytest.mark.checks("eq-bn_vae-defensive", how="exact")
def test_a_mixtures_second_moment_is_at_most_four_times_the_best():
    """By quadrature over a code of one dimension: p(x | z) a bump, q a spike beside it."""
    z = torch.linspace(-12, 12, 240_001)

    def normal(m, s):
        return torch.distributions.Normal(m, s).log_prob(z)

    def second(joint, log_r):  # of the weight under draws from r
        return float(torch.trapezoid((2 * joint - log_r).clamp(max=500).exp(), z))

    for mean, sigma, width, place in ((0.4, 1e-2, 0.5, 0.3), (2.0, 0.8, 0.2, -1.0), (0.0, 1.0, 3.0, 0.0)):
        joint = normal(place, width) + normal(0.0, 1.0)  # log p(x | z) p(z)
        each = [normal(mean, s) for s in (sigma, max(sigma, WIDTHS[0]), max(sigma, WIDTHS[1]))] + [normal(0.0, 1.0)]
        mixture = torch.stack(each).logsumexp(0) - math.log(4)
        of_each = [second(joint, log_r) for log_r in each]
        assert second(joint, mixture) <= 4 * min(of_each) * (1 + 1e-9)
        assert float((joint - mixture).max()) <= float(normal(place, width).max()) + math.log(4) + 1e-12
        if sigma == 1e-2:
            assert of_each[0] > 1e6 * second(joint, mixture)  # the spike alone


def test_a_mixture_misses_a_posterior_that_all_its_parts_are_too_wide_or_too_narrow_for():
    """Sixteen coordinates, posterior of width 0.05 and q of a hundredth of it: the docstring's warning."""

    class Exact(nn.Module):  # p(x) = 1 for the one x
        dim = 16

        def __init__(self, width, narrow):
            super().__init__()
            self.width, self.narrow, self.anything = width, narrow, nn.Parameter(torch.zeros(()))

        def prior(self, y, like):
            zeros = torch.zeros(len(like), self.dim)
            return zeros, zeros

        def posterior(self, x, y):
            mu = torch.zeros(len(x), self.dim)
            return mu, torch.full_like(mu, 2 * math.log(self.width * self.narrow))

        def log_joint(self, x, z, y):
            return standard_normal_log_prob(z / self.width) - self.dim * math.log(self.width)

    def excess(width, narrow):
        return float(importance_weighted_nll(Exact(width, narrow), torch.zeros(40, 1), generator=seeded()).nll.mean())

    assert excess(0.05, 0.01) > 30
    assert abs(excess(0.6, 0.03)) < 0.1


def test_doubling_never_raises_the_estimate_on_its_own_draws():
    model, _ = linear_gaussian(**WRONG)
    for samples in (2, 8, 64):
        found = importance_weighted_nll(model, torch.randn(50, PIXELS), samples=samples, generator=seeded())
        assert (found.halved >= found.nll).all() and (found.halved > found.nll).any()
    assert importance_weighted_nll(model, torch.randn(3, PIXELS), samples=1).halved is None


def test_another_proposal_or_model_is_refused():
    with pytest.raises(ValueError, match="proposal must be one of mixture, posterior, prior, got 'uniform'"):
        importance_weighted_nll(linear_gaussian()[0], torch.zeros(2, PIXELS), proposal="uniform")
    with pytest.raises(ValueError, match=r"model must have log_joint\(x, z\), as a VAE has, got a Linear"):
        importance_weighted_nll(torch.nn.Linear(2, 2), torch.zeros(2, 2))


# --- constants ---


def test_gaussian_reconstruction_has_its_constants():
    model, _ = linear_gaussian()
    z = torch.randn(3, DIM)
    mean = model.decode(z)
    expected = 0.5 * PIXELS * math.log(2 * math.pi * SIGMA**2)
    torch.testing.assert_close(-model.log_likelihood(mean, z), torch.full((3,), expected))
    x = torch.randn(3, PIXELS)
    torch.testing.assert_close(model.log_likelihood(x, z), Normal(mean, SIGMA).log_prob(x).sum(1))


def test_erratum_squared_error_plus_divergence_names_a_noise():
    """Summed over pixels it is the negative bound, but for a constant, of sigma² = 1/2; averaged, of sigma² = D/2."""
    for mean, right in ((False, 0.5), (True, PIXELS / 2)):
        spreads = {}
        for variance in (0.5, 1.0, PIXELS / 2):
            model = linear_gaussian(**WRONG)[0]
            model = VAE(model.encoder, model.decoder, DIM, likelihood="gaussian", sigma=math.sqrt(variance))
            x = torch.randn(20, PIXELS, generator=seeded(3))
            loss = model.loss(x, generator=seeded())
            mu, logvar = model.posterior(x)
            z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=seeded())
            error = (x - model.decode(z)).square().sum(1)
            source = error / (PIXELS if mean else 1) + loss.kl
            spreads[variance] = float((loss.total - source).std().detach())
        assert spreads.pop(right) < 1e-9 and min(spreads.values()) > 0.1


def test_bernoulli_likelihood_sums_to_one_over_binary_images():
    model = bernoulli_vae()
    for z in (-2.0, 0.0, 3.0):
        total = model.log_likelihood(BINARY, torch.full((16, 1), z)).detach().exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("logit", [-3.0, 0.5, 2.0])
def test_cross_entropy_of_grey_values_is_no_density(logit):
    """Its exponential integrates over [0, 1] to (2p - 1) / logit, which is the constant of the continuous Bernoulli."""
    model = VAE(nn.Linear(1, 2), nn.Linear(1, 1), 1)
    nn.init.zeros_(model.decoder.weight)
    nn.init.constant_(model.decoder.bias, logit)
    x = ((torch.arange(10_000) + 0.5) / 10_000)[:, None]
    integral = float(model.log_likelihood(x, torch.zeros(10_000, 1)).detach().exp().mean())
    assert integral == pytest.approx(math.tanh(logit / 2) / logit, rel=1e-7)
    assert integral < 0.51


def test_grey_values_train_but_have_no_likelihood():
    model = bernoulli_vae()
    x = torch.rand(4, 1, 2, 2)
    assert torch.isfinite(model.loss(x).total).all()
    with pytest.raises(ValueError, match="x must have entries 0 and 1 alone"):
        importance_weighted_nll(model, x, samples=2)


# --- the loss ---


def test_expected_loss_is_the_likelihood_plus_the_gap():
    model, density = linear_gaussian(**WRONG)
    x = torch.randn(1, PIXELS).expand(4000, -1)
    loss = model.loss(x, generator=seeded())
    assert_z(loss.total.detach(), float(-density.log_prob(x[0])) + gap(**WRONG))


def test_terms_and_beta():
    encoder, decoder = nets.mlp_pair((1, 4, 4), 3, hidden=(8,), heads=2, output=nn.Identity)
    x = torch.rand(6, 1, 4, 4)
    plain, weighted = (VAE(encoder, decoder, 3, beta=b).loss(x, generator=seeded()) for b in (1.0, 4.0))
    for term in (plain.total, plain.reconstruction, plain.kl):
        assert term.shape == (6,)
    torch.testing.assert_close(plain.total, plain.reconstruction + plain.kl)
    torch.testing.assert_close(weighted.total, plain.reconstruction + 4 * plain.kl)
    mu, logvar = VAE(encoder, decoder, 3).posterior(x)
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(plain.kl, expected)


def test_gradient_of_the_loss_is_that_of_the_gap():
    """In expectation over the noise: the likelihood does not depend on the encoder."""
    model, _ = linear_gaussian(**WRONG)
    x = torch.randn(1, PIXELS).expand(300, -1)
    gradients = []
    for seed in range(40):
        total = model.loss(x, generator=seeded(seed)).total.mean()
        gradients.append(torch.autograd.grad(total, model.encoder.bias)[0])
    ratio = 0.5 * math.expm1(WRONG["log_ratio"])
    expected = torch.cat([WRONG["shift"] * PRECISION, torch.full((DIM,), ratio)])
    for gradient, value in zip(torch.stack(gradients).T, expected, strict=True):
        assert_z(gradient, float(value))


def test_noise_comes_from_the_generator_alone():
    model, x = bernoulli_vae(), torch.rand(5, 1, 2, 2)
    before = torch.random.get_rng_state()
    first, again, other = (model.loss(x, generator=seeded(s)).total for s in (0, 0, 1))
    samples = [model.sample(3, generator=seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_terms_keep_the_precision_of_x_under_autocast():
    model = bernoulli_vae().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(torch.rand(5, 1, 2, 2, dtype=torch.float32))
    assert {term.dtype for term in vars(loss).values()} == {torch.float32}


def test_training_reaches_the_maximum_of_the_likelihood():
    """A linear VAE with learned sigma is probabilistic PCA, whose maximum is known (Tipping and Bishop, 1999)."""
    mixing = torch.randn(5, 5) * torch.tensor([2.0, 1.0, 0.4, 0.3, 0.2])
    x = torch.randn(300, 5) @ mixing.T
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    log_det = eigenvalues[:2].log().sum() + 3 * eigenvalues[2:].mean().log()
    best = 0.5 * float(5 * math.log(2 * math.pi) + log_det + 5)
    model = VAE(nn.Linear(5, 4), nn.Linear(2, 5), 2, likelihood="gaussian", sigma=None)
    optimizer, noise = torch.optim.Adam(model.parameters(), lr=0.1), seeded()
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1000)
        optimizer.zero_grad()
        model.loss(x, generator=noise).total.mean().backward()
        optimizer.step()
    nll = importance_weighted_nll(model, x, samples=50, generator=noise, proposal="posterior").nll.mean()
    assert best - 1e-3 < nll < best + 0.01


# --- the rest of the model ---


def test_encode_decode_forward_and_sample_give_means():
    x, z = torch.rand(5, 1, 2, 2), torch.randn(3, 1)
    for likelihood in ("bernoulli", "gaussian"):
        model = bernoulli_vae() if likelihood == "bernoulli" else linear_gaussian()[0]
        x, z = (x, z) if likelihood == "bernoulli" else (torch.randn(5, PIXELS), torch.randn(3, DIM))
        output = model.decoder(z)
        torch.testing.assert_close(model.decode(z), 1 / (1 + (-output).exp()) if output.ndim == 4 else output)
        mu, logvar = model.posterior(x)
        torch.testing.assert_close(torch.cat([mu, logvar], 1), model.encoder(x))
        torch.testing.assert_close(model.encode(x), mu)
        torch.testing.assert_close(model(x), model.decode(mu))
        z = torch.randn(4, model.dim, generator=seeded())
        torch.testing.assert_close(model.sample(4, generator=seeded()), model.decode(z))


def test_sigma_is_a_parameter_only_where_it_is_learned_and_its_optimum_is_the_root_mean_square_residual():
    fixed, _ = linear_gaussian()
    name = "likelihood.log_sigma"
    assert name in fixed.state_dict() and name not in dict(fixed.named_parameters())
    learned = VAE(fixed.encoder, fixed.decoder, DIM, likelihood="gaussian", sigma=None)
    log_sigma = dict(learned.named_parameters())[name]
    assert log_sigma.item() == 0
    x, z = torch.randn(30, PIXELS), torch.randn(30, DIM)
    with torch.no_grad():
        log_sigma.copy_((x - learned.decode(z)).square().mean().log() / 2)
    (gradient,) = torch.autograd.grad(learned.log_likelihood(x, z).sum(), log_sigma)
    assert abs(float(gradient)) < 1e-10


def test_the_posterior_spends_what_the_code_carries_where_the_aggregate_is_the_prior():
    """Probabilistic PCA with its own data: q(z) = N(0, I), and I(x; z) = half the log of the posterior's precision."""
    model, density = linear_gaussian()
    results = []
    for seed in range(12):
        torch.default_generator.manual_seed(seed)
        mu, logvar = metrics.in_batches(model.posterior, density.sample((1500,)), batch_size=400)
        results.append(encoder_information(mu, logvar, generator=seeded(seed)))
    assert_z([r.mutual_information for r in results], 0.5 * float(PRECISION.log().sum()))
    assert_z([r.kl_aggregate for r in results], 0.0)


@pytest.mark.parametrize("pair", [nets.mlp_pair, nets.conv_pair])
def test_the_networks_fit(pair):
    encoder, decoder = pair((1, 8, 8), 3, heads=2, output=nn.Identity)
    assert not any(isinstance(m, nn.Sigmoid) for m in decoder.modules())
    model, x = VAE(encoder, decoder, 3), torch.rand(4, 1, 8, 8)
    model.loss(x).total.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    assert model.sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "mse"}, "likelihood must be"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"beta": math.nan}, "beta must be at least 0"),
        ({"sigma": 0.5}, "sigma must be left out"),
        ({"sigma": None}, "sigma must be left out"),
        ({"likelihood": "gaussian", "sigma": 0.0}, "sigma must be a positive number"),
        ({"likelihood": "gaussian", "sigma": math.inf}, "sigma must be a positive number"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VAE(nn.Linear(4, 2), nn.Linear(1, 4), 1, **options)


def test_networks_of_other_shapes_are_named():
    x = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"encoder must give shape \(3, 2\), got \(3, 1\)"):
        VAE(nn.Linear(4, 1), nn.Linear(1, 4), 1).loss(x)
    with pytest.raises(ValueError, match=r"decoder must give the shape of x, \(3, 4\), got \(3, 1\)"):
        VAE(nn.Linear(4, 2), nn.Linear(1, 1), 1, likelihood="gaussian").loss(x)


# --- the equations of the chapter ---


def finite(seed, codes=3, data=4):
    """p(z), p(x | z), q(z | x) and a distribution of data on finite sets, 40 digits: sums stand for the integrals."""
    rng = random.Random(seed)

    def simplex(n):
        weights = [mp.mpf(rng.randrange(1, 10**9)) for _ in range(n)]
        return [w / mp.fsum(weights) for w in weights]

    return simplex(codes), [simplex(data) for _ in range(codes)], [simplex(codes) for _ in range(data)], simplex(data)


def kl(p, q):
    return mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True))


def elbo(prior, likelihood, q, x):
    return mp.fsum(q[z] * mp.log(likelihood[z][x]) for z in range(len(q))) - kl(q, prior)


@pytest.mark.checks("eq-vae-elbo-gap", how="exact")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_bound_misses_the_likelihood_by_the_divergence_from_the_posterior(seed):
    with mp.workdps(40):
        prior, likelihood, encoder, _ = finite(seed)
        for x, q in enumerate(encoder):
            joint = [prior[z] * likelihood[z][x] for z in range(3)]
            evidence = mp.fsum(joint)
            posterior = [j / evidence for j in joint]
            bound = elbo(prior, likelihood, q, x)
            assert abs(mp.log(evidence) - bound - kl(q, posterior)) < mp.mpf(10) ** -35
            assert abs(elbo(prior, likelihood, posterior, x) - mp.log(evidence)) < mp.mpf(10) ** -35
            assert mp.log(evidence) - bound > 1e-3
            assert abs(mp.log(evidence) - bound - kl(posterior, q)) > 1e-4, "the other divergence is another gap"


@pytest.mark.checks("eq-vae-split", how="exact")
@pytest.mark.checks("eq-vae-two-gaps", how="exact")
@pytest.mark.parametrize("seed", [2, 3])
def test_what_the_divergence_pays_for_and_what_samples_then_are(seed):
    with mp.workdps(40):
        tiny = mp.mpf(10) ** -35
        prior, likelihood, encoder, data = finite(seed)
        pairs = [[data[x] * encoder[x][z] for z in range(3)] for x in range(4)]  # of data and codes
        model = [[prior[z] * likelihood[z][x] for z in range(3)] for x in range(4)]
        aggregate = [mp.fsum(row[z] for row in pairs) for z in range(3)]
        entropy = -mp.fsum(p * mp.log(p) for p in data)
        h_z = -mp.fsum(p * mp.log(p) for p in aggregate)
        h_pairs = -mp.fsum(p * mp.log(p) for row in pairs for p in row)
        information = entropy + h_z - h_pairs  # not as in the proof
        cost = mp.fsum(data[x] * kl(encoder[x], prior) for x in range(4))
        assert abs(cost - information - kl(aggregate, prior)) < tiny

        evidence = [mp.fsum(row) for row in model]
        first = kl([p for row in pairs for p in row], [p for row in model for p in row])
        decoder_gap = mp.fsum(
            aggregate[z] * kl([pairs[x][z] / aggregate[z] for x in range(4)], likelihood[z]) for z in range(3)
        )
        bound = mp.fsum(data[x] * elbo(prior, likelihood, encoder[x], x) for x in range(4))
        assert abs(first - kl(aggregate, prior) - decoder_gap) < tiny
        assert abs(first + entropy + bound) < tiny
        assert kl(data, evidence) < first


def test_the_sources_assumption_leaves_a_code_that_says_nothing():
    """p(z) = N(0, I) by q(z | x) = N(0, I) for all x: true, and no information. An aggregate can match without."""
    prior = [mp.mpf(1) / 2] * 2
    collapsed, useful = [prior, prior], [[mp.mpf(9) / 10, mp.mpf(1) / 10], [mp.mpf(1) / 10, mp.mpf(9) / 10]]
    for encoder, carries in ((collapsed, False), (useful, True)):
        aggregate = [(a + b) / 2 for a, b in zip(*encoder, strict=True)]
        information = mp.fsum(kl(q, aggregate) for q in encoder) / 2
        assert kl(aggregate, prior) < 1e-12
        assert (information > 0.3) == carries


@pytest.mark.checks("eq-vae-restricted", how="symbolic")
def test_the_bound_misleads_about_the_model_where_q_cannot_be_the_posterior():
    u, a, variance, s2, v = sp.symbols("u a S s2 v", positive=True)  # u = w^2; the best a has the sign of w
    w = sp.sqrt(u)
    # E over x of E_q[(x - w z)^2 / 2 s2] + KL, with constants that depend on neither
    z2 = a**2 * variance + v
    negative = (variance - 2 * w * a * variance + w**2 * z2) / (2 * s2) + (z2 - sp.log(v)) / 2
    best_a = sp.solve(sp.diff(negative, a), a)[0]
    fixed = sp.simplify(negative.subs(a, best_a))
    slope = sp.diff(fixed, u)
    assert sp.simplify(slope.subs(u, sp.sqrt(s2 * variance / v) - s2)) == 0
    free = sp.simplify(fixed.subs(v, sp.solve(sp.diff(fixed, v), v)[0]))
    likelihood = (variance / (u + s2) + sp.log(u + s2)) / 2
    assert sp.simplify(sp.diff(free - likelihood, u)) == 0
    assert sp.simplify(sp.diff(likelihood, u).subs(u, variance - s2)) == 0
    values = {variance: 4, s2: 1, v: 1}
    assert slope.subs(values).subs(u, 1) == 0 and slope.subs(values).subs(u, 3) > 0, "1 by the bound, 3 in truth"
    assert slope.subs({**values, v: 9}).subs(u, 0) > 0, "and 0 where the variance held fixed is too large"


@pytest.mark.checks("eq-vae-kl", how="symbolic")
def test_divergence_of_two_gaussians_by_integration():
    z, mu = sp.symbols("z mu", real=True)
    sigma = sp.symbols("sigma", positive=True)
    density = stats.density(stats.Normal("q", mu, sigma))(z)
    log_ratio = sp.expand(-((z - mu) ** 2) / (2 * sigma**2) - sp.log(sigma) + z**2 / 2)
    integral = sp.simplify(sp.integrate(density * log_ratio, (z, -sp.oo, sp.oo)))
    assert sp.simplify(integral - (mu**2 + sigma**2 - sp.log(sigma**2) - 1) / 2) == 0
    reading_of_the_source = (mu**2 + sigma - sp.log(sigma) - 1) / 2  # N(mu, sigma I^2) has the variance sigma
    assert sp.simplify(integral - reading_of_the_source) != 0


def test_the_second_half_of_the_encoders_output_is_the_log_variance():
    model, _ = linear_gaussian()
    _, second = model.posterior(torch.randn(1, PIXELS))
    assert (second < 0).all(), "as a variance it would not even be possible"
    covariance = torch.linalg.inv(torch.eye(DIM) + model.decoder.weight.T @ model.decoder.weight / SIGMA**2)
    torch.testing.assert_close(second[0].exp(), covariance.diagonal())
    half = 0.5 * second  # the source's code names this sd, and takes its exponential as standard deviation
    torch.testing.assert_close(half.exp().square()[0], covariance.diagonal())
    assert (half.exp()[0] - covariance.diagonal()).abs().min() > 0.05, "it is no variance"


@pytest.mark.checks("eq-vae-isotropic", how="exact")
def test_one_variance_for_all_coordinates_costs_the_ratio_of_means():
    with mp.workdps(40):
        rng = random.Random(0)
        for d in (2, 5):
            v = [mp.mpf(rng.randrange(1, 10**6)) / 10**5 for _ in range(d)]

            def divergence(s2, v=v):
                return mp.fsum(s2 / w - mp.log(s2 / w) - 1 for w in v) / 2

            s2 = mp.findroot(lambda s, f=divergence: mp.diff(f, s), min(v))
            ratio = mp.exp(mp.fsum(mp.log(w) for w in v) / d) / (d / mp.fsum(1 / w for w in v))
            assert abs(divergence(s2) - mp.mpf(d) / 2 * mp.log(ratio)) < mp.mpf(10) ** -30
            assert divergence(1.01 * s2) > divergence(s2) < divergence(0.99 * s2)
        v = [mp.mpf("0.01"), mp.mpf(1)]
        assert 1.6 < divergence(2 / mp.fsum(1 / w for w in v), v) < 1.65


def gaussian_mean(expression, eps):
    """Mean of a polynomial in independent standard normal symbols."""
    for e in eps:
        powers = sp.Poly(sp.expand(expression), e).as_dict()
        expression = sum(c * (sp.factorial2(n - 1) if n else 1) for (n,), c in powers.items() if n % 2 == 0)
    return sp.expand(expression)


@pytest.mark.checks("eq-vae-gradients", how="symbolic")
def test_both_gradients_are_those_of_the_mean():
    mu, eps, z = sp.symbols("mu epsilon z", real=True)
    sigma = sp.symbols("sigma", positive=True)
    c = sp.symbols("c0:5", real=True)
    f = sum(ck * z**k for k, ck in enumerate(c))
    at = mu + sigma * eps
    mean = gaussian_mean(f.subs(z, at), [eps])
    slope = sp.diff(f, z).subs(z, at)
    for parameter, score, path in (
        (mu, eps / sigma, 1),
        (sigma, (eps**2 - 1) / sigma, eps),
    ):
        expected = sp.diff(mean, parameter)
        assert sp.expand(gaussian_mean(sp.expand(f.subs(z, at) * score), [eps]) - expected) == 0
        assert sp.expand(gaussian_mean(slope * path, [eps]) - expected) == 0
    assert sp.expand(gaussian_mean(slope, [eps]) - sp.diff(mean, sigma)) != 0


@pytest.mark.checks("eq-vae-variance", how="symbolic")
def test_variances_of_the_two_gradients():
    sigma = sp.symbols("sigma", positive=True)
    for d in (1, 2, 3):
        a, eps = sp.symbols(f"a0:{d}", real=True), sp.symbols(f"e0:{d}", real=True)
        f = sum((ai + sigma * e) ** 2 for ai, e in zip(a, eps, strict=True)) / 2
        path, score = a[0] + sigma * eps[0], sp.expand(f * eps[0] / sigma)
        variances = [sp.expand(gaussian_mean(g**2, eps) - gaussian_mean(g, eps) ** 2) for g in (path, score)]
        norm = sum(ai**2 for ai in a)
        claimed = norm**2 / (4 * sigma**2) + sp.Rational(d + 4, 2) * norm + a[0] ** 2
        claimed += sp.Rational((d + 2) * (d + 4), 4) * sigma**2
        assert variances[0] == sigma**2
        assert sp.expand(variances[1] - claimed) == 0


@pytest.mark.checks("eq-vae-baseline", how="symbolic")
def test_variance_of_the_score_function_with_the_mean_as_a_baseline():
    """Linear in d and finite for sigma to 0, where without the baseline it is quadratic and infinite."""
    sigma = sp.symbols("sigma", positive=True)
    for d in (1, 2, 4):
        a, eps = sp.symbols(f"a0:{d}", real=True), sp.symbols(f"e0:{d}", real=True)
        f = sum((ai + sigma * e) ** 2 for ai, e in zip(a, eps, strict=True)) / 2
        score = sp.expand((f - gaussian_mean(f, eps)) * eps[0] / sigma)
        assert sp.expand(gaussian_mean(score, eps) - a[0]) == 0  # unbiased
        variance = gaussian_mean(score**2, eps) - a[0] ** 2
        claimed = sum(ai**2 for ai in a) + a[0] ** 2 + sp.Rational(d + 4, 2) * sigma**2
        assert sp.expand(variance - claimed) == 0


def test_the_score_function_trains_where_the_source_says_that_there_is_no_gradient():
    """Sampled without a path, q has no gradient to give; the score function has, and descends to the optimum."""
    noise = seeded()
    mu = torch.tensor([2.0, -1.0], requires_grad=True)
    optimizer = torch.optim.Adam([mu], lr=0.02)
    for _ in range(600):
        q = Normal(mu, 0.5)
        with torch.no_grad():
            z = mu + 0.5 * torch.randn(200, 2, generator=noise)
            f = (z - torch.tensor([-0.5, 0.5])).square().sum(1)
        assert not f.requires_grad
        optimizer.zero_grad()
        ((f - f.mean())[:, None] * q.log_prob(z)).sum(1).mean().backward()
        optimizer.step()
    torch.testing.assert_close(mu.detach(), torch.tensor([-0.5, 0.5]), atol=0.1, rtol=0)


@pytest.mark.checks("eq-vae-wiggle", how="exact")
def test_the_pathwise_gradient_is_not_always_the_better_one():
    with mp.workdps(30):
        omega = mp.mpf(3)

        def mean(f):
            return mp.quad(lambda z: f(z) * mp.npdf(z), mp.linspace(-14, 14, 29))

        path, score = (lambda z: -omega * mp.sin(omega * z)), (lambda z: mp.cos(omega * z) * z)
        for g, claimed in (
            (path, omega**2 / 2 * (1 - mp.exp(-2 * omega**2))),
            (score, (1 + (1 - 4 * omega**2) * mp.exp(-2 * omega**2)) / 2),
        ):
            variance = mean(lambda z, g=g: g(z) ** 2) - mean(g) ** 2
            assert abs(variance - claimed) < mp.mpf(10) ** -25
        assert mean(lambda z: path(z) ** 2) > 8 * mean(lambda z: score(z) ** 2)


@pytest.mark.checks("eq-vae-noise-linear", how="symbolic")
def test_what_noise_costs_a_linear_decoder():
    eps, mu = sp.symbols("e0:2", real=True), sp.symbols("m0:2", real=True)
    sigma = sp.symbols("s0:2", positive=True)
    weight, x = sp.Matrix(3, 2, sp.symbols("w0:6", real=True)), sp.Matrix(sp.symbols("x0:3", real=True))
    b = sp.Matrix(sp.symbols("b0:3", real=True))
    z = sp.Matrix([m + s * e for m, s, e in zip(mu, sigma, eps, strict=True)])
    error = sum(v**2 for v in x - weight * z - b)
    without = sum(v**2 for v in x - weight * sp.Matrix(mu) - b)
    noise = sum(sigma[j] ** 2 * sum(weight[i, j] ** 2 for i in range(3)) for j in range(2))
    assert sp.expand(gaussian_mean(error, eps) - without - noise) == 0


@pytest.mark.checks("eq-vae-noise-hessian", how="symbolic")
def test_what_little_noise_costs_a_curved_decoder():
    """Of polynomials of two codes the mean is exact; its terms of second order are the claim, all four derivatives."""
    z, eps = sp.symbols("z0:2", real=True), sp.symbols("e0:2", real=True)
    sigma, scale = sp.symbols("s0:2", positive=True), sp.symbols("t", positive=True)
    coefficients = iter(sp.symbols("c0:40", real=True))
    g = sp.Matrix([sum(next(coefficients) * z[0] ** i * z[1] ** j for i in range(3) for j in range(3))] * 1)
    g = g.col_join(sp.Matrix([sum(next(coefficients) * z[0] ** i * z[1] ** j for i in range(3) for j in range(3))]))
    x = sp.Matrix(sp.symbols("x0:2", real=True))
    mu = {z[0]: sp.Rational(1, 3), z[1]: sp.Rational(-2, 5)}
    noisy = g.subs({zj: mu[zj] + scale * sj * ej for zj, sj, ej in zip(z, sigma, eps, strict=True)}, simultaneous=True)
    error = sp.Poly(sp.expand(sum(v**2 for v in x - noisy)), scale)
    second = gaussian_mean(error.coeff_monomial(scale**2), eps)
    claimed = sum(
        sj**2 * (g.diff(zj).dot(g.diff(zj)) - (x - g).dot(g.diff(zj, 2))) for zj, sj in zip(z, sigma, strict=True)
    )
    assert sp.expand(second - claimed.subs(mu)) == 0
    assert gaussian_mean(error.coeff_monomial(scale), eps) == gaussian_mean(error.coeff_monomial(scale**3), eps) == 0
    jacobian = sum(sj**2 * g.diff(zj).dot(g.diff(zj)) for zj, sj in zip(z, sigma, strict=True))
    assert sp.expand(second - jacobian.subs(mu)) != 0, "its columns alone are not enough"


def test_noise_may_lower_the_error_of_a_curved_decoder_and_cost_nothing_where_the_slope_is_one():
    """The chapter's examples: g(z) = z² for x = 1 at mu = 0, and the circle for x = 0."""
    s, eps, m = sp.symbols("s", positive=True), sp.symbols("epsilon", real=True), sp.symbols("m", real=True)
    error = gaussian_mean((1 - (m + s * eps) ** 2) ** 2, [eps])
    assert sp.expand(error.subs(m, 0) - (1 - 2 * s**2 + 3 * s**4)) == 0
    assert error.subs({m: 0, s: sp.Rational(1, 2)}) < error.subs({m: 0, s: 0})
    assert sp.diff(error, s).subs({m: 1, s: sp.Rational(1, 100)}) > 0  # the right place: noise costs
    z = torch.randn(1000, generator=seeded())
    circle = torch.stack([z.cos(), z.sin()], 1)
    slope = torch.stack([-z.sin(), z.cos()], 1).norm(dim=1)
    torch.testing.assert_close(circle.square().sum(1), torch.ones(1000))  # the error at every code, so at every sigma
    torch.testing.assert_close(slope, torch.ones(1000))


@pytest.mark.checks("eq-vae-noise-expanding", how="exact")
@pytest.mark.parametrize("sigma", ["0.3", "2"])
def test_a_decoder_that_keeps_codes_apart_pays_for_noise(sigma):
    """g(z) = (2 z + sin z, z² / 4) moves codes apart at least as far as they are, L = 1; by quadrature."""
    with mp.workdps(30):
        sigma = mp.mpf(sigma)
        rng = random.Random(3)
        for _ in range(200):
            a, b = mp.mpf(rng.uniform(-5, 5)), mp.mpf(rng.uniform(-5, 5))
            assert mp.hypot(2 * (a - b) + mp.sin(a) - mp.sin(b), (a**2 - b**2) / 4) >= abs(a - b)
        for x in ((0, 0), (3, -2)):
            for mu in (mp.mpf(0), mp.mpf("1.7")):

                def error(e, x=x, mu=mu):
                    z = mu + sigma * e
                    return ((x[0] - 2 * z - mp.sin(z)) ** 2 + (x[1] - z**2 / 4) ** 2) * mp.npdf(e)

                assert mp.quad(error, mp.linspace(-14, 14, 15)) >= sigma**2
        # Equality is reached: by the identity, for x = mu.
        assert abs(mp.quad(lambda e: (sigma * e) ** 2 * mp.npdf(e), mp.linspace(-14, 14, 15)) - sigma**2) < 1e-25


def test_one_datum_proves_nothing_about_the_noise():
    """The source's proof takes one: with the constant decoder, the best there is, every sigma gives the error 0."""
    x = torch.randn(1, PIXELS)
    decoder = nn.Linear(DIM, PIXELS)
    nn.init.zeros_(decoder.weight)
    decoder.requires_grad_(False).bias.copy_(x[0])
    for sigma in (0.0, 1.0, 10.0):
        z = torch.randn(100, DIM) * sigma
        assert float((decoder(z) - x).square().max()) < 1e-30


def test_without_a_bound_on_the_codes_the_noise_need_not_vanish():
    """Two data, sigma = 1 for good: the error falls to 0 as the codes move apart, and only their ratio counts."""
    x, noise = torch.tensor([-1.0, 1.0]), torch.randn(2, 20_000)
    errors = []
    for distance in (1.0, 4.0, 16.0):
        z = distance * x[:, None] + noise
        errors.append(float((x[:, None] - z.sign()).square().mean()))
        scaled = (x[:, None] - (0.1 * distance * x[:, None] + 0.1 * noise).sign()).square().mean()
        assert errors[-1] == float(scaled)
    assert errors[0] > 0.5 and errors[1] < 1e-3 and errors[2] == 0


@pytest.mark.checks("eq-vae-overlap", how="exact")
@pytest.mark.checks("eq-vae-sigma-bound", how="exact")
@pytest.mark.parametrize("sigma", ["0.4", "2.5"])
def test_overlapping_posteriors_cost_any_decoder(sigma):
    with mp.workdps(30):
        sigma, radius, distance = mp.mpf(sigma), mp.mpf("1.3"), mp.mpf("0.7")
        x = (mp.mpf(0), distance)

        def q(i, z):
            return mp.npdf(z, radius * (2 * i - 1), sigma)

        def integral(f):
            ends = [k * sigma for k in range(-15, 16, 3)]
            return mp.quad(f, [-radius + e for e in ends if e <= 0] + [0] + [radius + e for e in ends if e >= 0])

        def error(g):
            return integral(lambda z: (q(0, z) * (x[0] - g(z)) ** 2 + q(1, z) * (x[1] - g(z)) ** 2) / 2)

        def best(z):  # a logistic function, for posteriors of one variance
            return distance / (1 + mp.exp(-2 * radius * z / sigma**2))

        harmonic = distance**2 / 2 * integral(lambda z: q(0, z) * q(1, z) / (q(0, z) + q(1, z)))
        overlap = 2 * mp.ncdf(-radius / sigma)  # 1 - TV
        smallest = error(best)
        assert abs(smallest - harmonic) < mp.mpf(10) ** -25
        assert smallest >= distance**2 / 4 * overlap
        for other in (lambda z: best(z) + mp.mpf("0.05"), lambda z: best(2 * z), lambda z: distance * mp.ncdf(z)):
            assert error(other) > smallest
        assert sigma <= radius / mp.erfinv(1 - 4 * smallest / distance**2) / mp.sqrt(2)  # Phi^-1(1 - 2 delta / D^2)


@pytest.mark.checks("eq-vae-sigma-optimum", how="symbolic")
def test_the_noise_that_the_divergence_leaves():
    v, w2, s2, beta = sp.symbols("v w2 s2 beta", positive=True)
    (best,) = sp.solve(sp.diff(v * w2 / (2 * s2) + beta * (v - sp.log(v)) / 2, v), v)
    assert sp.simplify(best - beta * s2 / (beta * s2 + w2)) == 0
    assert sp.limit(best / beta, beta, 0) == s2 / w2
    model, density = linear_gaussian()
    _, logvar = model.posterior(density.loc[None])
    lengths = model.decoder.weight.square().sum(0)
    torch.testing.assert_close(logvar[0].exp(), SIGMA**2 / (SIGMA**2 + lengths))  # of the posterior


@pytest.mark.checks("eq-vae-moments", how="symbolic")
@pytest.mark.checks("eq-vae-moments-counterexample", how="symbolic")
def test_moments_of_the_aggregate_and_that_they_do_not_suffice():
    eps = sp.symbols("epsilon", real=True)
    mu, p = sp.symbols("m0:3", real=True), sp.symbols("p0:3", positive=True)
    sigma = sp.symbols("s0:3", positive=True)

    def aggregate(power, mu=mu, sigma=sigma, p=p):
        return sum(pi * gaussian_mean((m + s * eps) ** power, [eps]) for pi, m, s in zip(p, mu, sigma, strict=True))

    assert sp.expand(aggregate(1) - sum(pi * m for pi, m in zip(p, mu, strict=True))) == 0
    second = sum(pi * (m**2 + s**2) for pi, m, s in zip(p, mu, sigma, strict=True))
    assert sp.expand(aggregate(2) - second) == 0
    m = sp.symbols("m", positive=True)
    half, s = sp.Rational(1, 2), sp.sqrt(1 - m**2)
    first, second, fourth = (aggregate(k, (m, -m), (s, s), (half, half)) for k in (1, 2, 4))
    assert first == 0 and sp.simplify(second - 1) == 0
    assert sp.simplify(fourth - (3 - 2 * m**4)) == 0


@pytest.mark.checks("eq-vae-inactive", how="symbolic")
def test_unused_codes_of_the_linear_model():
    t, lam, s2 = sp.symbols("t lambda s2", positive=True)
    (best,) = sp.solve(sp.diff((lam / t + sp.log(t)) / 2, t), t)
    assert best == lam  # above s2 it is allowed; below, the slope at t = s2 points up
    assert sp.simplify(sp.diff((lam / t + sp.log(t)) / 2, t).subs(t, s2) * 2 * s2**2) == s2 - lam
    w2, variance = lam - s2, s2 / lam
    spread = w2 * lam / lam**2
    assert sp.simplify(spread + variance - 1) == 0
    divergence = (spread + variance - sp.log(variance) - 1) / 2
    assert sp.simplify(sp.expand_log(divergence - sp.log(lam / s2) / 2, force=True)) == 0


def test_a_rotation_of_the_codes_keeps_the_likelihood_and_lowers_the_bound():
    """Unless it mixes equal eigenvalues alone: a q with independent coordinates is then the posterior still."""
    s2 = 0.5

    def missed(eigenvalues, angle):
        """KL of the best diagonal q from the posterior N(., P^-1): half of sum log P_jj - log det P."""
        columns = torch.diag((torch.tensor(eigenvalues) - s2).clamp_min(0).sqrt())
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        w = columns @ turn
        torch.testing.assert_close(w @ w.T, columns @ columns)  # p(x) is the same
        precision = torch.eye(2) + w.T @ w / s2
        return float(0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)))

    assert missed([4.0, 2.0], 0.5) > 0.03 and missed([4.0, 0.2], 0.5) > 0.1
    for eigenvalues, angle in (([4.0, 2.0], 0.0), ([4.0, 2.0], math.pi / 2), ([3.0, 3.0], 0.5), ([0.3, 0.2], 0.5)):
        assert missed(eigenvalues, angle) == pytest.approx(0, abs=1e-12)


def test_a_linear_vae_switches_off_the_codes_that_it_does_not_need():
    """Five codes, two eigenvalues above the noise: three units go quiet, and the likelihood is that of two codes."""
    eigenvalues = torch.tensor([4.0, 2.0, 0.5, 0.5, 0.5, 0.5])
    x = torch.randn(512, 6)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T, correction=0)).T)
    x = x * eigenvalues.sqrt()  # its covariance is exactly diagonal
    bounds = []
    for dim in (2, 5):
        model = VAE(nn.Linear(6, 2 * dim), nn.Linear(dim, 6), dim, likelihood="gaussian", sigma=1.0)
        noise, optimizer = seeded(), torch.optim.Adam(model.parameters(), lr=0.05)
        for step in range(800):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 800)
            optimizer.zero_grad()
            model.loss(x, generator=noise).total.mean().backward()
            optimizer.step()
        mu, logvar = model.posterior(x)
        assert active_units(mu) == 2
        each = 0.5 * (mu.square() + logvar.exp() - logvar - 1).mean(0)
        expected = 0.5 * eigenvalues[:2].log().sum()
        torch.testing.assert_close(each.sum().detach(), expected, atol=0.05, rtol=0)
        bounds.append(
            float(importance_weighted_nll(model, x, samples=20, generator=noise, proposal="posterior").nll.mean())
        )
    assert bounds[1] == pytest.approx(bounds[0], abs=0.02)


def weights_of_two_values(k, low, high, share):
    """L_k and log p for weights that are ``low`` with probability ``share`` and else ``high``, exactly."""
    bound = mp.fsum(
        mp.binomial(k, j) * share**j * (1 - share) ** (k - j) * mp.log((j * low + (k - j) * high) / k)
        for j in range(k + 1)
    )
    return bound, mp.log(share * low + (1 - share) * high)


def test_an_autoencoder_reconstructs_new_data_and_what_fails_is_sampling():
    """Against the source, by which a new datum is likely to come out quite different."""
    _, density = linear_gaussian()
    torch.default_generator.manual_seed(1)
    x, new = density.sample((400,)), density.sample((4000,))
    model = Autoencoder(nn.Linear(PIXELS, DIM), nn.Linear(DIM, PIXELS), DIM)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(800):
        optimizer.zero_grad()
        model.loss(x).total.mean().backward()
        optimizer.step()
    seen, held_out = (float(metrics.squared_error(model, v).mean()) for v in (x, new))
    assert held_out == pytest.approx((PIXELS - DIM) * SIGMA**2, rel=0.1)  # the noise outside the plane of the data
    assert held_out < 1.15 * seen
    scale = 30.0  # of the codes, which the loss does not see
    model.encoder.weight.data.mul_(scale)
    model.encoder.bias.data.mul_(scale)
    model.decoder.weight.data.div_(scale)
    assert float(metrics.squared_error(model, new).mean()) == pytest.approx(held_out)
    fake = model.sample(4000, generator=seeded())
    assert float(fake.var(0).sum()) < 0.05 * float(new.var(0).sum())


@pytest.mark.checks("eq-vae-iw-order", how="exact")
@pytest.mark.checks("eq-vae-iw-gap", how="exact")
@pytest.mark.parametrize(("low", "high", "share"), [("0.2", "3", "0.6"), ("0.01", "1.5", "0.3")])
def test_the_bounds_rise_to_the_likelihood_with_a_gap_of_one_over_k(low, high, share):
    with mp.workdps(40):
        low, high, share = mp.mpf(low), mp.mpf(high), mp.mpf(share)
        found = [weights_of_two_values(k, low, high, share) for k in range(1, 40)]
        bounds, truth = [bound for bound, _ in found], found[0][1]
        assert all(a < b for a, b in itertools.pairwise([*bounds, truth]))
        mean = share * low + (1 - share) * high
        variance = share * (low - mean) ** 2 + (1 - share) * (high - mean) ** 2
        first = variance / (2 * mean**2)
        errors = []
        for k in (400, 800):
            bound, _ = weights_of_two_values(k, low, high, share)
            errors.append(k * (truth - bound) - first)
        assert abs(errors[0]) < first / 20
        assert abs(errors[1] / errors[0] - mp.mpf(1) / 2) < 0.02, "what is left is of the next order"


@pytest.mark.checks("eq-vae-iw-gap", how="exact")
def test_the_gap_needs_no_finite_mean_of_the_inverse_weight():
    """Weights uniform on [0, 1]: E 1/w is infinite, E w^(-1/2) is 2, and the gap is 1/(6k) to first order."""
    with mp.workdps(25):

        def bound(k):  # log s is the integral of (e^-t - e^-ts)/t, and E e^-tw = (1 - e^-t)/t
            knots = [mp.mpf(10) ** -15, 1e-6, 0.01, 0.1, 1, 3, 10, 30, 100, 1000, mp.mpf(10) ** 5, mp.mpf(10) ** 8]
            return mp.quad(lambda t: (mp.exp(-t) - (-k * mp.expm1(-t / k) / t) ** k) / t, knots)

        assert abs(bound(1) + 1) < 1e-7 and abs(bound(2) - mp.log(2) + mp.mpf(3) / 2) < 1e-10
        errors = [k * (mp.log(mp.mpf(1) / 2) - bound(k)) - mp.mpf(1) / 6 for k in (20, 40, 80)]
        assert abs(errors[0]) < 0.01
        for wide, narrow in itertools.pairwise(errors):
            assert abs(narrow / wide - mp.mpf(1) / 2) < 0.05
        # The step of the proof: for two weights and a = 1/2 the mean inverse of the mean is finite.
        inverse = mp.quad(lambda s: 2 / s * (s if s < 1 else 2 - s), [0, 1, 2])
        assert abs(inverse - 4 * mp.log(2)) < 1e-15 and inverse <= mp.quad(lambda w: w**-0.5, [0, 1]) ** 2


def test_more_linear_codes_than_pixels_are_unused():
    """The largest mean ELBO of three codes for two pixels is that of the formula with a third eigenvalue of 0."""
    s2, covariance = 0.5, torch.diag(torch.tensor([4.0, 0.3], dtype=torch.float64))

    def best_elbo(w):
        """With the best encoder, up to a constant: the likelihood, less what a diagonal q misses of the posterior."""
        marginal = w @ w.T + s2 * torch.eye(2, dtype=torch.float64)
        precision = torch.eye(3, dtype=torch.float64) + w.T @ w / s2
        missed = precision.diagonal().log().sum() - torch.logdet(precision)
        return float(-0.5 * (torch.trace(torch.linalg.solve(marginal, covariance)) + torch.logdet(marginal) + missed))

    best = torch.zeros(2, 3, dtype=torch.float64)
    best[0, 0] = math.sqrt(4 - s2)
    for trial in range(300):
        noise = torch.randn(2, 3, generator=seeded(trial), dtype=torch.float64)
        for w in (best + 0.01 * noise, best + 0.3 * noise, 2 * noise):
            assert best_elbo(w) < best_elbo(best)


@pytest.mark.checks("eq-vae-iw-tail", how="exact")
@pytest.mark.parametrize("k", [1, 7, 60])
def test_the_lower_tail_of_a_mean_of_weights_is_exponential(k):
    """Weights of two values, one of them rare and large, and exponential ones, whose sum has a gamma distribution."""
    with mp.workdps(30):
        for share in (mp.mpf("0.99"), mp.mpf("0.5")):  # of the weight 1/10; the mean is 1
            high = (1 - share / 10) / (1 - share)
            below = mp.fsum(
                mp.binomial(k, j) * share**j * (1 - share) ** (k - j)
                for j in range(k + 1)
                if (mp.mpf(j) / 10 + (k - j) * high) < mp.mpf(k) / 2
            )
            assert below <= mp.exp(-k / (8 * (share / 100 + (1 - share) * high**2)))
        assert mp.gammainc(k, 0, mp.mpf(k) / 2, regularized=True) <= mp.exp(-mp.mpf(k) / 16)  # E w² = 2
        # The steps of the proof.
        for u in mp.linspace(mp.mpf("0.001"), mp.mpf("0.5"), 200):
            assert mp.log(u) ** 2 <= 1 / u
            assert mp.exp(-4 * u) <= 1 - 4 * u + 8 * u**2


def test_solutions_of_the_exercises():
    with mp.workdps(30):
        for h in ("0.1", "0.9"):
            h = mp.mpf(h)
            gaps = [weights_of_two_values(k, 1 - h, 1 + h, mp.mpf(1) / 2) for k in (1, 2)]
            first, second = (truth - bound for bound, truth in gaps)
            assert abs(first + mp.log(1 - h**2) / 2) < 1e-25 and abs(second - first / 2) < 1e-25
    sigma, b = sp.symbols("sigma b", positive=True)
    for d in (1, 2, 3):
        eps = sp.symbols(f"e0:{d}", real=True)
        f = sigma**2 * sum(e**2 for e in eps) / 2
        assert gaussian_mean(sp.expand((f - b) * eps[0] / sigma), eps) == 0  # the mean, a = 0
        second = gaussian_mean(sp.expand((f - b) ** 2 * eps[0] ** 2 / sigma**2), eps)
        (best,) = sp.solve(sp.diff(second, b), b)
        assert sp.simplify(best - sigma**2 * (d + 2) / 2) == 0
        assert sp.simplify(second.subs(b, best) - sigma**2 * sp.Rational(d + 2, 2)) == 0


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(-1, 1), st.floats(-2, 2))
def test_on_the_same_draws_more_samples_never_lower_the_bound(seed, k, shift, log_ratio):
    """Exact, without Monte-Carlo error: the average over all subsets of m of the k draws, m = 1 ... k."""
    model, _ = linear_gaussian(shift, log_ratio)
    x = 2 * torch.randn(3, PIXELS, generator=seeded(seed))
    eps = torch.randn(3, k, DIM, generator=seeded(seed + 1))
    log_weights = model.log_weights(x, eps).detach()
    bounds = []
    for m in range(1, k + 1):
        subsets = [
            log_weights[:, list(rows)].logsumexp(1) - math.log(m) for rows in itertools.combinations(range(k), m)
        ]
        bounds.append(torch.stack(subsets).mean(0))
    for fewer, more in itertools.pairwise(bounds):
        assert (more >= fewer - 1e-9).all()
    iwae = IWAE(model.encoder, model.decoder, DIM, samples=k, likelihood="gaussian", sigma=SIGMA)
    loss = iwae.loss(x, generator=seeded(seed + 1))
    torch.testing.assert_close(loss.total, -bounds[-1])
    torch.testing.assert_close(loss.negative_elbo, -bounds[0])
    assert (loss.total <= loss.negative_elbo + 1e-9).all()


@pytest.mark.checks("eq-vae-iw-gradient", how="exact")
@pytest.mark.checks("eq-vae-iw-surrogate", how="exact")
def test_the_surrogate_has_the_right_gradient_and_the_wrong_value():
    with mp.workdps(40):
        t = mp.mpf("0.3")
        parts = [(mp.mpf(a), mp.mpf(b)) for a, b in ((1, 2), (-2, "0.5"), (3, -1), ("0.1", 4))]

        def log_weight(part, t):
            return part[0] * mp.sin(part[1] * t) - t**2

        def bound(t):
            return mp.log(mp.fsum(mp.exp(log_weight(p, t)) for p in parts) / 4)

        weights = [mp.exp(log_weight(p, t)) for p in parts]
        share = [w / mp.fsum(weights) for w in weights]
        slopes = [a * b * mp.cos(b * t) - 2 * t for a, b in parts]
        gradient = mp.fsum(s * g for s, g in zip(share, slopes, strict=True))
        assert abs(mp.diff(bound, t) - gradient) < mp.mpf(10) ** -18  # the derivative is numeric
        value = mp.fsum(s * log_weight(p, t) for s, p in zip(share, parts, strict=True))
        divergence = mp.log(4) + mp.fsum(s * mp.log(s) for s in share)
        assert abs(value - bound(t) - divergence) < mp.mpf(10) ** -35
        assert 0 < divergence < mp.log(4)


def test_the_loss_of_the_bound_has_its_value_and_its_gradient():
    model, density = linear_gaussian(**WRONG)
    iwae = IWAE(model.encoder, model.decoder, DIM, samples=5, likelihood="gaussian", sigma=SIGMA)
    x = torch.randn(1, PIXELS).expand(2000, -1)
    loss = iwae.loss(x, generator=seeded())
    assert_z((-loss.total.detach() - density.log_prob(x)).exp(), 1.0)  # its exponential is unbiased for p(x)
    eps = torch.randn(2000, 5, DIM, generator=seeded())
    log_weights = iwae.log_weights(x, eps)
    share = log_weights.softmax(1).detach()
    surrogate = -(share * log_weights).sum(1)
    ours, theirs = (
        torch.autograd.grad(v.mean(), iwae.encoder.bias, retain_graph=True)[0] for v in (loss.total, surrogate)
    )
    torch.testing.assert_close(ours, theirs)
    divergence = (share * (5 * share).log()).sum(1)
    torch.testing.assert_close(surrogate.detach(), (loss.total - divergence).detach())
    assert float(divergence.mean()) > 0.05, "a program that logs the surrogate flatters itself by that much"


def test_one_sample_is_the_vae_and_the_posterior_needs_no_more():
    model, density = linear_gaussian()
    x = torch.randn(20, PIXELS)
    for k in (1, 3):
        iwae = IWAE(model.encoder, model.decoder, DIM, samples=k, likelihood="gaussian", sigma=SIGMA)
        torch.testing.assert_close(iwae.loss(x).total, -density.log_prob(x))


def test_the_loss_of_one_datum_is_an_unbiased_estimate_of_the_bound_and_the_bound_is_below_the_likelihood():
    """The source calls the VAE biased: of its estimate that is false, of the likelihood it has a bound, with a gap."""
    model, density = linear_gaussian(**WRONG)
    x = torch.randn(1, PIXELS).expand(4000, -1)
    estimates = model.loss(x, generator=seeded()).total.detach()
    truth = float(-density.log_prob(x[0]))
    assert_z(estimates, truth + gap(**WRONG))
    with pytest.raises(AssertionError):
        assert_z(estimates, truth)


# --- binary images from grey ones, and inputs at the edge ---


def test_images_are_binarised_anew_at_each_call_by_the_generator():
    encoder, decoder = nets.mlp_pair((1, 2, 2), 1, hidden=(8,), heads=2, output=nn.Identity)
    model, grey = VAE(encoder, decoder, 1, binarise=True), torch.rand(4, 1, 2, 2)
    noise = seeded()
    drawn = torch.stack([model._observed(grey, noise) for _ in range(4000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    for pixel, mean in zip(drawn.flatten(1).T, grey.flatten(), strict=True):
        assert_z(pixel, float(mean))
    plain = VAE(encoder, decoder, 1)
    noise, again = seeded(5), seeded(5)
    binary = (torch.rand(grey.shape, generator=again) < grey).double()
    torch.testing.assert_close(model.loss(grey, generator=noise).total, plain.loss(binary, generator=again).total)
    torch.testing.assert_close(model.loss(BINARY, generator=seeded()).reconstruction.shape, torch.Size([16]))
    iwae = IWAE(encoder, decoder, 1, samples=3, binarise=True)
    assert torch.isfinite(iwae.loss(grey).total).all()
    with pytest.raises(ValueError, match="x must have entries 0 and 1 alone"):
        IWAE(encoder, decoder, 1, samples=3).loss(grey)


@pytest.mark.parametrize("value", [-0.01, 1.5, math.nan])
def test_what_is_no_probability_cannot_be_binarised(value):
    encoder, decoder = nets.mlp_pair((1, 2, 2), 1, hidden=(8,), heads=2, output=nn.Identity)
    with pytest.raises(ValueError, match=r"x must be in \[0, 1\] for the Bernoulli likelihood"):
        VAE(encoder, decoder, 1, binarise=True).loss(torch.full((2, 1, 2, 2), value))


@pytest.mark.parametrize("samples", [1, 4])
def test_a_batch_of_one_has_a_loss_in_training(samples):
    encoder, decoder = nets.mlp_pair((1, 2, 2), 1, hidden=(8,), heads=2, output=nn.Identity)
    model = VAE(encoder, decoder, 1) if samples == 1 else IWAE(encoder, decoder, 1, samples=samples)
    total = model.train().loss(BINARY[:1]).total
    total.mean().backward()
    assert total.shape == (1,) and torch.isfinite(total).all()


def with_logvar(logvar, dtype=torch.float64):
    model = linear_gaussian()[0]
    nn.init.zeros_(model.encoder.weight)
    with torch.no_grad():
        model.encoder.bias.copy_(torch.tensor([0.0] * DIM + [logvar] * DIM))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_log_variance_of_minus_hundred_is_an_ordinary_code(dtype):
    x = torch.randn(3, PIXELS, dtype=dtype)
    loss = with_logvar(-100.0, dtype).loss(x)
    torch.testing.assert_close(loss.kl, torch.full((3,), DIM * 49.5, dtype=dtype))
    assert torch.isfinite(loss.total).all()
    assert torch.isfinite(
        importance_weighted_nll(with_logvar(-100.0, dtype), x, samples=3, proposal="posterior").nll
    ).all()


def test_a_log_variance_of_hundred_is_finite_in_double_precision_and_an_error_in_single(tmp_path):
    x = torch.randn(8, PIXELS)
    loss = with_logvar(100.0).loss(x)
    torch.testing.assert_close(loss.kl, torch.full((8,), DIM * 0.5 * (math.exp(100) - 101)))
    assert torch.isfinite(loss.total).all()
    single = with_logvar(100.0, torch.float32)
    assert torch.isinf(single.loss(x.float()).kl).all()
    with pytest.raises(FloatingPointError, match="'total' is inf"):
        train.fit(single, x.float(), epochs=1, batch_size=8, progress=False)


def test_wrong_options_of_the_bound_are_named():
    networks = nn.Linear(4, 2), nn.Linear(1, 4), 1
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        IWAE(*networks, samples=0)
    with pytest.raises(ValueError, match="beta must be 1 for the importance-weighted bound, got 2"):
        IWAE(*networks, samples=2, beta=2.0)
    with pytest.raises(ValueError, match="binarise must be False for the gaussian likelihood"):
        VAE(*networks, likelihood="gaussian", binarise=True)


# --- the studies ---


def test_likelihoods_of_the_studies_are_those_of_all_images_with_the_many_samples():
    """Few samples for all and many for some estimate many for all; where some are all it is just that."""
    model, density = linear_gaussian(**WRONG)
    x = density.sample((300,))
    recipe = studies.Recipe(few=4, images=300, many=200)
    whole = studies.nll(model, x, recipe, seed=0)
    for name in ("NLL", "NLL by the posterior"):
        assert whole[name] == pytest.approx(float(-density.log_prob(x).mean()), abs=0.02)
    part = studies.nll(model, x, dataclasses.replace(recipe, images=100), seed=0)
    assert abs(part["NLL"] - whole["NLL"]) < 4 * part["error of the correction"] + 0.02
    assert part["NLL, few samples"] == whole["NLL, few samples"] > part["NLL"]


def constant_vae(logit):
    """Of 16 pixels. Its encoder gives every image the prior and its decoder the same logit to every pixel."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    decoder = nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4)))
    for layer in (encoder[1], decoder[0]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.constant_(decoder[0].bias, logit)
    return VAE(encoder, decoder, 2)


def of_white_rows(rows, n):
    """Images of 4 x 4 in bytes, black but for so many rows."""
    x = torch.zeros(n, 1, 4, 4, dtype=torch.uint8)
    x[:, :, :rows] = 255
    return x


def test_what_a_study_measures_of_a_known_model_on_test_images(monkeypatch):
    """The likelihood of a model without a code is exact. Training images have more white pixels than test images."""
    torch.set_default_dtype(torch.float32)
    y = torch.zeros(60, dtype=torch.int64)
    images = data.Images("rows", of_white_rows(3, 60), y, of_white_rows(1, 60), y)
    monkeypatch.setattr(studies.judge, "classifier", lambda images: types.SimpleNamespace(features=nn.Flatten()))
    recipe = studies.Recipe(epochs=3, batch_size=20, lr=1e-3, few=10, images=20, many=50, curve=5)
    logits = [0.0, -1.2, -2.4]
    logit = logits[1]

    def nll(white, logit):
        return white * math.log1p(math.exp(-logit)) + (16 - white) * math.log1p(math.exp(logit))

    found = studies.measure(constant_vae(logit), images, recipe, seed=0)
    for name in ("NLL", "NLL by the posterior", "NLL, few samples", "negative ELBO"):
        assert found[name] == pytest.approx(nll(4, logit), rel=1e-5)
    assert found["KL"] == found["active units"] == 0 and found["cap of the information"] == math.log(60)
    assert found["mutual information"] == pytest.approx(0, abs=1e-6)
    # Between images that are all alike and means that are all alike: the squared distance.
    mean = 1 / (1 + math.exp(-logit))
    assert found["Fréchet, N(0, I)"] == pytest.approx(4 * (1 - mean) ** 2 + 12 * mean**2, rel=1e-3)

    # The curve in the course of a training is of test images, what is trained on is the training images.
    trained = []

    def fit(model, x, y, *, epochs, callback, **how):
        trained.append((x, epochs, how))
        for epoch, value in enumerate(logits):
            nn.init.constant_(model.decoder[0].bias, value)
            callback(model, epoch)

    monkeypatch.setattr(train, "fit", fit)
    _, curve = studies.fit(constant_vae(0.0), images, recipe, seed=0)
    assert curve == pytest.approx([nll(4, value) for value in logits], rel=1e-5)
    ((x, epochs, how),) = trained
    assert torch.equal(x, images.x_train) and (epochs, how["batch_size"], how["lr"]) == (3, 20, 1e-3)


@pytest.mark.parametrize("k", [1, 5])
def test_a_study_builds_its_model_from_the_seed_and_starts_at_the_mean_image(k):
    torch.set_default_dtype(torch.float32)
    images = data.load("digits")
    first, again, other = (studies.build(studies.Recipe(samples=k, dim=3), images, s) for s in (0, 0, 1))
    weights = [m.encoder[1][0].weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.binarise and (isinstance(first, IWAE) == (k > 1)) and getattr(first, "samples", 1) == k
    nn.init.zeros_(first.decoder[0][-1].weight)
    mean = data.to_unit(images.x_train).mean(0)
    torch.testing.assert_close(first.decode(torch.zeros(1, 3))[0], mean.clamp(0.001, 0.999))


@pytest.mark.parametrize("name", ["vae_k1", "iwae_k50"])
def test_a_study_runs(name, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(studies.judge, "classifier", lambda images: types.SimpleNamespace(features=nn.Flatten()))
    study = studies.STUDIES[name]
    recipe = study.recipe("digits", "short")
    outcome = study.run(recipe, "digits", 0, torch.device("cpu"))
    assert outcome.training.rows == recipe.epochs * 1000 and recipe.settings()["samples"] == int(name[-2:].strip("k"))
    assert outcome.metrics["NLL"] < outcome.metrics["negative ELBO"]
    assert outcome.metrics["NLL"] < 64 * math.log(2), "worse than coins"
    assert len(outcome.curves["NLL of some test images"]) == recipe.epochs


def test_what_is_recorded_is_what_is_run(monkeypatch):
    """Each field of the recipe changes what is trained or measured, and the record says so."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(studies.judge, "classifier", lambda images: types.SimpleNamespace(features=nn.Flatten()))
    recipe = studies.Recipe(epochs=1, batch_size=50, rows=200, few=2, images=9, many=4, curve=2)
    changes = {"samples": 2, "dim": 3, "hidden": (20,), "rows": 300, "few": 3, "images": 8, "many": 6, "curve": 4}
    changes |= {"epochs": 2, "batch_size": 40, "lr": 1e-3, "schedule": "constant", "optimizer": "sgd", "clip": 0.1}
    changes |= {"betas": (0.5, 0.9)}
    assert set(changes) == set(recipe.settings())

    def outcome(recipe):
        done = studies.run(recipe, "digits", 0, torch.device("cpu"))
        return done.metrics | done.curves

    first = outcome(recipe)
    assert outcome(recipe) == first
    for name, value in changes.items():
        other = dataclasses.replace(recipe, **{name: value})
        assert other.settings()[name] != recipe.settings()[name] and outcome(other) != first, name
