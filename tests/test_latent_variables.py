"""The template of the variational models: what follows from its hooks, for models of the package and for new ones."""

import itertools
import math

import pytest
import torch
from helpers import assert_z
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from gae_core import nets, train
from gae_core.metrics import encoder_information, importance_weighted_nll
from gae_core.models.cvae import CVAE, Beside
from gae_core.models.denoising import DenoisingAutoencoder, gaussian_noise
from gae_core.models.likelihoods import Bernoulli, Gaussian, Likelihood
from gae_core.models.text_vae import TextVAE
from gae_core.models.vae import VAE, LatentVariableModel

GRID = torch.linspace(-12, 12, 4801, dtype=torch.float64)


@pytest.fixture(autouse=True)
def float64():
    """These tests are mathematics."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.default_generator.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def integral(log_values):
    """Logarithm of the integral over the grid of the exponentials, (..., grid)."""
    return (log_values + math.log(GRID[1] - GRID[0])).logsumexp(-1)


# --- the importance-weighted bound of every model ---


def conditional(wrong=0.0):
    """A CVAE with x = a z + noise, z around m y, and q the posterior but for ``wrong``; and its log p(x | y)."""
    a, m, s, sigma = torch.tensor([[1.0], [-0.5], [2.0]]), torch.tensor([[0.7, -1.2]]), 0.8, 0.6
    precision = float(1 / s**2 + a.square().sum() / sigma**2)
    networks = [Beside(nn.Linear(3 + 2, 2)), Beside(nn.Linear(1 + 2, 3)), nn.Linear(2, 2)]
    encoder, decoder, prior = networks[0].network, networks[1].network, networks[2]
    zeros = torch.zeros(1, 2)
    with torch.no_grad():
        encoder.weight.copy_(torch.cat([torch.cat([a.T / sigma**2, m / s**2], 1) / precision, torch.zeros(1, 5)]))
        encoder.bias.copy_(torch.tensor([wrong, wrong - math.log(precision)]))
        decoder.weight.copy_(torch.cat([a, torch.zeros(3, 2)], 1))
        decoder.bias.zero_()
        prior.weight.copy_(torch.cat([m, zeros]))
        prior.bias.copy_(torch.tensor([0.0, 2 * math.log(s)]))
    model = CVAE(*networks[:2], 1, prior=prior, likelihood="gaussian", sigma=sigma)
    covariance = s**2 * a @ a.T + sigma**2 * torch.eye(3)
    return model, lambda x, y: MultivariateNormal(y @ m.T @ a.T, covariance).log_prob(x)


def test_the_bound_of_a_conditional_model_is_the_likelihood_where_q_is_the_posterior():
    model, log_p = conditional()
    x, y = 2 * torch.randn(30, 3), torch.randn(30, 2)
    for k in (1, 4):
        found = model.iwae_loss(x, y, samples=k, generator=seeded())
        torch.testing.assert_close(found.total, -log_p(x, y))
        torch.testing.assert_close(found.negative_elbo, -log_p(x, y))
    nll = importance_weighted_nll(model, x, y, samples=2, proposal="posterior").nll
    torch.testing.assert_close(nll, -log_p(x, y))


def sentences():
    """A TextVAE of one coordinate and all its sentences of three words, with their logarithms of p by quadrature."""
    encoder = nets.LSTMEncoder(4, 2, embedding=4, hidden=6)
    decoder = nets.LSTMDecoder(4, 1, embedding=4, hidden=6)
    model = TextVAE(encoder, decoder, 1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)  # so that the code matters
    x = torch.tensor(list(itertools.product(range(1, 4), repeat=3)))
    z = GRID[::10, None]
    values = [model.log_likelihood(row.expand(len(z), -1), z) + Normal(0, 1).log_prob(z[:, 0]) for row in x]
    return model, x, (torch.stack(values).detach() + math.log(10 * float(GRID[1] - GRID[0]))).logsumexp(1)


def cases():
    """A model, rows that are one datum, its y, and log p."""
    model, log_p = conditional(wrong=0.4)
    x, y = torch.randn(1, 3), torch.randn(1, 2)
    yield model, x.expand(4000, -1), y.expand(4000, -1), float(log_p(x, y))
    model, x, log_p = sentences()
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)
    yield model, x[5].expand(4000, -1), None, float(log_p[5])


@pytest.mark.parametrize("case", [0, 1], ids=["conditional", "of sentences"])
def test_the_bound_is_of_unbiased_weights_rises_with_their_number_and_reaches_the_likelihood(case):
    model, x, y, log_p = list(cases())[case]
    with torch.no_grad():
        loss = {k: model.iwae_loss(x, y, samples=k, generator=seeded(k)) for k in (1, 3, 10, 100)}
        elbo = model.loss(x, y, generator=seeded(5)).total
    for found in loss.values():
        assert_z((-found.total - log_p).exp(), 1.0)
        assert (found.total <= found.negative_elbo + 1e-12).all()
    assert_z(loss[1].total - elbo, 0.0)  # of one draw it is the evidence lower bound
    for few, many in itertools.pairwise(loss.values()):
        fall = few.total - many.total
        assert fall.mean() > 4 * fall.std() / math.sqrt(len(x))
    assert 0 < float(loss[100].total.mean()) + log_p < 0.05 * (float(loss[1].total.mean()) + log_p)


def test_a_bound_without_draws_is_refused():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        conditional()[0].iwae_loss(torch.zeros(2, 3), torch.zeros(2, 2), samples=0)


# --- a prior that is learned ---


class MixturePriorVAE(VAE):
    """A VAE with a mixture of Gaussians for p(z), trained with the rest."""

    def __init__(self, encoder, decoder, dim, *, components, **options):
        super().__init__(encoder, decoder, dim, **options)
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.linspace(-1, 1, components)[:, None].repeat(1, dim))
        self.log_scales = nn.Parameter(torch.zeros(components, dim))

    def log_prior(self, z, y=None):
        each = Independent(Normal(self.means, self.log_scales.exp()), 1)
        return MixtureSameFamily(Categorical(logits=self.logits), each).log_prob(z)

    def sample_prior(self, n, y=None, *, generator=None):
        k = torch.multinomial(self.logits.softmax(0), n, replacement=True, generator=generator)
        return self.means[k] + self.log_scales[k].exp() * self._noise(n, generator)


def learned(**options):
    """A model of binary pixels with one coordinate and a prior that is far from N(0, 1)."""
    encoder, decoder = nets.mlp([4, 8, 2], activation=nn.Tanh), nets.mlp([1, 8, 4], activation=nn.Tanh)
    model = MixturePriorVAE(encoder, decoder, 1, components=2, **options)
    with torch.no_grad():
        model.logits.copy_(torch.tensor([0.0, 1.0]))
        model.means.copy_(torch.tensor([[-2.0], [1.5]]))
        model.log_scales.copy_(torch.tensor([[0.5], [0.8]]).log())
    return model


def test_the_loss_with_a_learned_prior_is_the_bound_by_quadrature():
    model, x = learned(beta=0.7), torch.tensor([[0.0, 1, 1, 0]])
    with torch.no_grad():
        mu, logvar = model.posterior(x)
        log_q = Normal(mu, (0.5 * logvar).exp()).log_prob(GRID)[0]
        reconstruction = -float((log_q.exp() * model.log_likelihood(x.expand(len(GRID), -1), GRID[:, None])).sum())
        kl = float((log_q.exp() * (log_q - model.log_prior(GRID[:, None]))).sum())
        found = model.loss(x.expand(4000, -1), generator=seeded())
    step = float(GRID[1] - GRID[0])
    assert float(integral(model.log_prior(GRID[:, None]).detach())) == pytest.approx(0, abs=1e-9)
    assert_z(found.reconstruction, reconstruction * step)
    assert_z(found.kl, kl * step)
    assert_z(found.total, (reconstruction + 0.7 * kl) * step)
    with pytest.raises(AssertionError):  # N(0, I) is another prior
        assert_z(found.kl, float(VAE(model.encoder, model.decoder, 1).loss(x).kl.detach()))


@pytest.mark.parametrize("proposal", ["mixture", "posterior"])
def test_importance_weights_under_a_learned_prior_are_those_of_its_likelihood(proposal):
    model, x = learned(), torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
    with torch.no_grad():
        log_p = integral(model.log_joint(x, GRID[:, None].expand(16, -1, -1)))
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)
    repeated = x[[5]].expand(2000, -1)
    nll = importance_weighted_nll(model, repeated, samples=4, proposal=proposal, generator=seeded()).nll
    assert_z((-nll - log_p[5]).exp(), 1.0)
    all_of_them = importance_weighted_nll(model, x, samples=20_000, proposal=proposal, generator=seeded()).nll
    torch.testing.assert_close(all_of_them, -log_p, rtol=0, atol=0.05)


def test_what_assumes_a_gaussian_prior_refuses_another():
    model, x = learned(), torch.ones(3, 4)
    with pytest.raises(ValueError, match='proposal must not be "prior" for a prior that is no Gaussian, got a Mixture'):
        importance_weighted_nll(model, x, proposal="prior")
    with pytest.raises(ValueError, match="must have a Gaussian prior for the closed form, got a MixturePriorVAE"):
        model.divergence(*model.posterior(x))

    class Half(VAE):
        def log_prior(self, z, y=None):
            return Normal(1.0, 1.0).log_prob(z).sum(-1)

    with pytest.raises(NotImplementedError, match="Half has its own log_prior and needs its own sample_prior"):
        Half(model.encoder, model.decoder, 1).sample(2)


def test_a_prior_of_another_kind_is_given_whole():
    class Half(VAE):
        def sample_prior(self, n, y=None, *, generator=None):
            return torch.zeros(n, self.dim)

    with pytest.raises(ValueError, match="sample_prior must come with log_prior, got a Half"):
        Half(nn.Linear(4, 2), nn.Linear(1, 4), 1)


def test_a_bound_that_has_no_weight_of_the_divergence_refuses_one():
    x = torch.rand(5, 4).round()
    with pytest.raises(ValueError, match=r"beta must be 1, .*got beta=0\.5"):
        VAE(nn.Linear(4, 2), nn.Linear(1, 4), 1, beta=0.5).iwae_loss(x, samples=2)
    for options in ({"free_bits": 0.1}, {"warmup": 3}, {"beta": 0.3}):
        network = TextVAE(nets.LSTMEncoder(5, 2, hidden=3), nets.LSTMDecoder(5, 1, hidden=3), 1, **options)
        with pytest.raises(ValueError, match="without free bits and warm-up"):
            network.iwae_loss(torch.randint(3, 5, (4, 3)), samples=2)


def test_a_closed_form_and_draws_of_the_loss_have_the_same_mean():
    """N(0, I) as a prior of one's own: only the noise of the estimate is new."""

    class Own(VAE):
        def log_prior(self, z, y=None):
            return Normal(0.0, 1.0).log_prob(z).sum(-1)

    encoder, decoder = nets.mlp([4, 8, 6]), nets.mlp([3, 8, 4])
    x = torch.rand(1, 4).expand(4000, -1)
    with torch.no_grad():
        closed, drawn = (kind(encoder, decoder, 3).loss(x, generator=seeded()) for kind in (VAE, Own))
    assert torch.equal(closed.reconstruction, drawn.reconstruction)
    assert_z(drawn.kl, float(closed.kl[0]))


def test_training_a_prior_finds_what_a_linear_gaussian_model_cannot():
    """Two clusters on a line: N(0, I), a linear decoder and any encoder can do no better than one Gaussian."""
    generator = seeded(3)
    sign = torch.randint(0, 2, (2000, 1), generator=generator) * 2.0 - 1
    x = 3 * sign + 0.5 * torch.randn(2000, 1, generator=generator)
    one = Normal(x.mean(), x.std(correction=0))
    clusters = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.tensor([-3.0, 3.0]), torch.full((2,), 0.5)))
    gaussian, best = (-float(p.log_prob(x).mean()) for p in (one, clusters))
    options = dict(likelihood="gaussian", sigma=0.3)
    model = MixturePriorVAE(nets.mlp([1, 16, 2], activation=nn.Tanh), nn.Linear(1, 1), 1, components=2, **options)
    history = train.fit(model, x, epochs=30, batch_size=100, lr=2e-2, device="cpu", progress=False).history
    assert history["total"][-20:].mean() < history["total"][:20].mean() - 1
    nll = importance_weighted_nll(model.eval(), x, samples=64, generator=seeded()).nll
    assert best - 0.01 < float(nll.mean()) < best + 0.15 < gaussian - 0.5
    drawn = model.sample(4000, generator=seeded())  # means of p(x | z)
    with torch.no_grad():
        share = model.logits.softmax(0)[model.decode(model.means)[:, 0] > 0]
    assert len(share) == 1 and abs(float(share) - float((x > 0).double().mean())) < 0.05
    assert_z((drawn[:, 0] > 0).double(), float(share))


def test_the_information_of_an_encoder_under_another_prior_splits_by_quadrature():
    mu, logvar = torch.tensor([[-2.0], [0.3], [1.5]]), torch.tensor([[-1.0], [0.2], [-2.0]])
    model = learned()
    log_prior = model.log_prior(GRID[:, None]).detach()
    each = Normal(mu, (0.5 * logvar).exp()).log_prob(GRID)  # (3, grid)
    mixture, step = each.logsumexp(0) - math.log(3), float(GRID[1] - GRID[0])
    kl = (each.exp() * (each - log_prior)).sum(1) * step
    aggregate = float((mixture.exp() * (mixture - log_prior)).sum()) * step
    found = [encoder_information(mu, logvar, kl=kl, samples=50, generator=seeded(s)) for s in range(100)]
    assert found[0].kl == pytest.approx(float(kl.mean()))
    assert_z([f.kl_aggregate for f in found], aggregate)
    standard = encoder_information(mu, logvar, samples=50, generator=seeded(0))
    assert found[0].mutual_information == standard.mutual_information and abs(standard.kl - found[0].kl) > 0.3
    for wrong in (kl[:, None], kl[:2], kl * math.nan):
        with pytest.raises(ValueError, match=r"kl must be finite, of shape \(3,\), got shape"):
            encoder_information(mu, logvar, kl=wrong)


# --- likelihoods as objects ---


class Laplace(Likelihood):
    def log_prob(self, x, output):
        return torch.distributions.Laplace(output, 1.0).log_prob(x).sum(1)


def test_a_likelihood_of_ones_own_takes_the_place_of_a_name():
    networks, x = (nn.Linear(4, 2), nn.Linear(1, 4)), torch.randn(5, 4)
    model = VAE(*networks, 1, likelihood=Laplace())
    loss = model.loss(x, generator=seeded())
    mu, logvar = model.posterior(x)
    z = mu + (0.5 * logvar).exp() * torch.randn(5, 1, generator=seeded())
    expected = (x - model.decode(z)).abs().sum(1) + 4 * math.log(2)
    torch.testing.assert_close(loss.reconstruction, expected)
    denoising = DenoisingAutoencoder(
        nn.Linear(4, 1), networks[1], 1, corruption=gaussian_noise(1), likelihood=Laplace()
    )
    assert denoising.loss(x).total.isfinite().all()
    with pytest.raises(ValueError, match='must be "bernoulli" or "gaussian", or a Likelihood without sigma beside it'):
        VAE(*networks, 1, likelihood=Laplace(), sigma=0.5)


def test_a_name_and_its_object_are_one_model():
    networks, x = (nn.Linear(4, 2), nn.Linear(1, 4)), torch.rand(5, 4)
    pairs = [({"likelihood": "bernoulli"}, Bernoulli()), ({"likelihood": "gaussian", "sigma": 0.4}, Gaussian(0.4))]
    for named, likelihood in pairs:
        losses = [VAE(*networks, 1, **how).loss(x, generator=seeded()) for how in (named, {"likelihood": likelihood})]
        assert torch.equal(losses[0].total, losses[1].total)


def test_draws_of_a_likelihood_have_its_mean_and_its_spread():
    mean = torch.full((4000, 1), 0.3)
    assert_z(Bernoulli().draw(mean, seeded())[:, 0], 0.3)
    drawn = Gaussian(0.4).draw(mean, seeded())[:, 0]
    assert_z(drawn, 0.3)
    assert_z((drawn - 0.3).square(), 0.16)


def test_a_model_that_asks_for_conditions_is_no_vae_of_x_alone():
    """Who finds a VAE may call ``posterior(x)``."""
    assert issubclass(CVAE, LatentVariableModel) and not issubclass(CVAE, VAE)
    model, x = VAE(nn.Linear(4, 2), nn.Linear(1, 4), 1), torch.rand(3, 4)
    for told in (torch.arange(3), None):
        assert torch.equal(model.loss(x, told, generator=seeded()).total, model.loss(x, generator=seeded()).total)
    with pytest.raises(ValueError, match="y must be given"):
        conditional()[0].loss(torch.zeros(2, 3))
