"""The VAE and its likelihood, against models whose likelihood is known: a linear-Gaussian one, and quadrature."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_z
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from gae_core import metrics, nets
from gae_core.models.vae import VAE
from gae_core.variational import encoder_information, importance_weighted_nll


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
    nll = importance_weighted_nll(model, x, samples=samples, generator=seeded())
    torch.testing.assert_close(nll, -density.log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 5])
def test_the_weights_mean_is_unbiased_for_the_density(samples):
    model, density = linear_gaussian(**WRONG)
    x = torch.randn(1, PIXELS).expand(4000, -1)
    nll = importance_weighted_nll(model, x, samples=samples, generator=seeded())
    assert_z((-nll - density.log_prob(x)).exp(), 1.0)


def test_with_a_wrong_proposal_it_falls_to_the_likelihood_from_above():
    model, density = linear_gaussian(**WRONG)
    x = torch.randn(1, PIXELS).expand(1000, -1)
    truth = float(-density.log_prob(x[0]))
    excess = {s: importance_weighted_nll(model, x, samples=s, generator=seeded(s)) - truth for s in (1, 3, 12, 100)}
    assert_z(excess[1], gap(**WRONG))  # one sample: the evidence lower bound
    for few, many in itertools.pairwise(excess.values()):
        difference = few - many
        assert difference.mean() > 4 * difference.std() / math.sqrt(1000)
    # To first order in 1 / S the excess is half the variance of the weights, over S; here from the Gaussian integral.
    ratio = math.exp(WRONG["log_ratio"])
    terms = ratio / math.sqrt(2 * ratio - 1) * (WRONG["shift"] ** 2 * PRECISION / (2 * ratio - 1)).exp()
    assert_z(excess[100], (float(terms.prod()) - 1) / 200)


@pytest.mark.parametrize("chunk_size", [1, 7, 60, 61])
def test_chunks_do_not_change_the_value(chunk_size):
    model, _ = linear_gaussian(**WRONG)
    x = torch.randn(11, PIXELS)
    whole, parts = (
        importance_weighted_nll(model, x, samples=20, chunk_size=c, generator=seeded()) for c in (10_000, chunk_size)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_bytes_are_binary_images():
    model = bernoulli_vae().float()
    black_and_white = (255 * BINARY).to(torch.uint8)
    nll = [importance_weighted_nll(model, x, samples=3, generator=seeded()) for x in (black_and_white, BINARY.float())]
    assert torch.equal(*nll)
    with pytest.raises(ValueError, match="x must have entries 0 and 1 alone"):
        importance_weighted_nll(model, black_and_white // 2)


def test_the_likelihood_stays_finite_where_the_density_underflows():
    model, density = linear_gaussian()
    x = torch.full((1, PIXELS), 1e3)
    truth = -density.log_prob(x)
    assert truth > 1e5
    torch.testing.assert_close(importance_weighted_nll(model, x, samples=3), truth)


def bernoulli_vae():
    encoder, decoder = nets.mlp_pair((1, 2, 2), 1, hidden=(8,), heads=2, output=nn.Identity)
    return VAE(encoder, decoder, 1).eval()


BINARY = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64).view(16, 1, 2, 2)


@pytest.mark.parametrize("samples", [1, 10])
def test_bernoulli_likelihood_agrees_with_quadrature_over_the_code(samples):
    model = bernoulli_vae()
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
    mean = model.decode(nodes[:, None]).detach()  # (80, 1, 2, 2)
    p = torch.where(BINARY[:, None] == 1, mean, 1 - mean).flatten(2).prod(2) @ (weights / weights.sum())
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    x = BINARY.repeat(500, 1, 1, 1)
    estimates = (-importance_weighted_nll(model, x, samples=samples, generator=seeded())).exp().view(500, 16)
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


# --- constants ---


def test_gaussian_reconstruction_has_its_constants():
    model, _ = linear_gaussian()
    z = torch.randn(3, DIM)
    mean = model.decode(z)
    expected = 0.5 * PIXELS * math.log(2 * math.pi * SIGMA**2)
    torch.testing.assert_close(-model.log_likelihood(mean, z), torch.full((3,), expected))
    x = torch.randn(3, PIXELS)
    torch.testing.assert_close(model.log_likelihood(x, z), Normal(mean, SIGMA).log_prob(x).sum(1))


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
    nll = importance_weighted_nll(model, x, samples=50, generator=noise).mean()
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
    assert "log_sigma" in fixed.state_dict() and "log_sigma" not in dict(fixed.named_parameters())
    learned = VAE(fixed.encoder, fixed.decoder, DIM, likelihood="gaussian", sigma=None)
    assert learned.log_sigma.item() == 0
    x, z = torch.randn(30, PIXELS), torch.randn(30, DIM)
    with torch.no_grad():
        learned.log_sigma.copy_((x - learned.decode(z)).square().mean().log() / 2)
    (gradient,) = torch.autograd.grad(learned.log_likelihood(x, z).sum(), learned.log_sigma)
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
