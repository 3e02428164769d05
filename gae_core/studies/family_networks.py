"""Members of the family that are trained: recipes, models made from them, and what they can do when trained.

Each takes its recipe, flat images x (n, D), their labels y and a seed, and gives a member and what the training was.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core import metrics, nets
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.cvae import CVAE, Beside
from gae_core.models.denoising import DenoisingAutoencoder, gaussian_noise
from gae_core.models.eae import EAE
from gae_core.models.gae import GAE
from gae_core.models.meg import MEG
from gae_core.models.vae import IWAE, VAE
from gae_core.normalization import FixedScaleBatchNorm
from gae_core.seeds import fresh, stream
from gae_core.studies.family_members import CODES, Member, Recipe, remaining_variance, with_searched_density
from gae_core.studies.study import Trained
from gae_core.train import Training

Fit = tuple[Member, Training]


@dataclass(frozen=True, kw_only=True)
class Network(Recipe, Trained):
    """Of a member that is trained; by itself that of the plain autoencoder.

    Attributes:
        hidden: widths of an encoder's hidden layers; decoders and generators mirror them.
    """

    batch_size: int = 100
    hidden: tuple[int, ...] = (256, 128)


@dataclass(frozen=True, kw_only=True)
class Inferred(Network):
    """Of the GAE, whose codes are found by ascent; all fields are as in :class:`gae_core.models.gae.GAE`."""

    steps: int = 6
    step_size: float = 0.02
    sigma: float = 0.3
    second_order: bool = False


@dataclass(frozen=True, kw_only=True)
class Entropic(Network):
    """Of an autoencoder with batch norm of the code.

    Attributes:
        lam: weight of the codes' entropy.
        k: of its nearest neighbour.
    """

    lam: float
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class Denoising(Network):
    """Of the denoising autoencoder.

    Attributes:
        corruption: standard deviation of the noise that is to be removed.
        sigma: standard deviation of the likelihood.
        walkback: steps of the chain in training.
        chain: steps of the chain from random pixels to a sample.
    """

    corruption: float = 0.3
    sigma: float = 0.15
    walkback: int = 3
    chain: int = 100


@dataclass(frozen=True, kw_only=True)
class Variational(Network):
    """Of a VAE or one of its kin.

    Attributes:
        likelihood: "gaussian" or "bernoulli".
        sigma: standard deviation of the Gaussian; None if it is learned, or there is none.
        sigma_start: where it begins if it is learned: from 1 it would take half of the training to come down.
        samples: of the importance-weighted bound; None for the plain one.
        gamma: of the batch norm of the means; None for none.
    """

    likelihood: str = "gaussian"
    sigma: float | None = None
    sigma_start: float | None = None
    samples: int | None = None
    gamma: float | None = None


@dataclass(frozen=True, kw_only=True)
class Conditional(Network):
    """Of the conditional VAE, with a Gaussian likelihood whose size is learned.

    Attributes:
        classes: number of labels.
        sigma_start: where the standard deviation of the likelihood begins.
    """

    classes: int = 10
    sigma_start: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Adversarial(Network):
    """Of a generator against an energy, each a step at a time.

    Attributes:
        lam: weight of the penalty on the energy's gradient.
        surrogate: what stands for the samples' entropy, see :class:`gae_core.models.meg.MEG`; None for a GAN.
        search_sigma: standard deviation of the noise for which the likeliest codes of images are searched.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.9)
    coded: int = 2000  # each code is a search
    lam: float = 1.0
    surrogate: str | None = None
    search_sigma: float = 0.2


def build(recipe: Network, pixels: int, seed: int) -> nn.Module:
    """A model of flat images with fresh weights that depend on ``seed`` alone."""
    pair = functools.partial(nets.mlp_pair, (pixels,), recipe.dim, hidden=recipe.hidden)
    with fresh(seed):
        match recipe:
            case Inferred(steps=steps, step_size=length, sigma=sigma, second_order=second):
                return GAE(pair()[1], recipe.dim, steps=steps, step_size=length, sigma=sigma, second_order=second)
            case Entropic(lam=lam, k=k):
                return EAE(*pair(), recipe.dim, lam=lam, k=k)
            case Denoising(corruption=std, sigma=sigma, walkback=walkback):
                corruption = gaussian_noise(std)
                model = functools.partial(DenoisingAutoencoder, likelihood="gaussian", sigma=sigma, walkback=walkback)
                return model(*pair(), recipe.dim, corruption=corruption)
            case Variational():
                return _learned_from(recipe.sigma_start, _variational(recipe, pair))
            case Conditional():
                return _learned_from(recipe.sigma_start, _conditional(recipe, pixels))
            case Adversarial():
                return _adversarial(recipe, pair()[1], pixels)
            case _:
                return Autoencoder(*pair(), recipe.dim)


def _learned_from(start: float | None, model: VAE) -> VAE:
    """A model whose noise is learned, which begins at ``start``, or the model as it is where that is None."""
    if start is not None:
        if not isinstance(getattr(model.likelihood, "log_sigma", None), nn.Parameter):
            raise ValueError(f"sigma_start must be None where sigma is not learned, got {start}")
        with torch.no_grad():
            model.likelihood.log_sigma.fill_(math.log(start))
    return model


def _variational(recipe: Variational, pair: Callable) -> VAE:
    binary, sigma = recipe.likelihood == "bernoulli", recipe.sigma
    if binary and sigma is None:
        sigma = 1.0  # what the model takes for none
    networks = pair(heads=2, output=nn.Identity if binary else nn.Sigmoid)
    norm = None if recipe.gamma is None else FixedScaleBatchNorm(recipe.dim, recipe.gamma)
    kind = VAE if recipe.samples is None else functools.partial(IWAE, samples=recipe.samples)
    return kind(*networks, recipe.dim, likelihood=recipe.likelihood, sigma=sigma, norm=norm)


def _conditional(recipe: Conditional, pixels: int) -> CVAE:
    encoder = nets.mlp([pixels + recipe.classes, *recipe.hidden, 2 * recipe.dim])
    decoder = nets.mlp([recipe.dim + recipe.classes, *reversed(recipe.hidden), pixels])
    networks = Beside(encoder), Beside(nn.Sequential(decoder, nn.Sigmoid()))
    return CVAE(*networks, recipe.dim, classes=recipe.classes, likelihood="gaussian", sigma=None)


def _adversarial(recipe: Adversarial, generator: nn.Module, pixels: int) -> MEG:
    leaky = functools.partial(nn.LeakyReLU, 0.2)
    energy, statistics = nets.mlp([pixels, *recipe.hidden, 1], activation=leaky), None
    if recipe.surrogate is not None:
        statistics = nets.mlp([pixels + recipe.dim, *recipe.hidden, 1], activation=leaky)
    model = functools.partial(MEG, lam=recipe.lam, energy_steps=1, generator_steps=1)
    return model(generator, energy, recipe.dim, surrogate=recipe.surrogate, statistics=statistics)


def autoencoder(recipe: Network, x: Tensor, y: Tensor, seed: int) -> Fit:
    """A model whose encoder is a function of the image: plain, denoising, GAE, with batch norm, a VAE of some kind.

    Its noise is what its reconstructions leave, also if it has learned one. Where it assumes nothing of its codes, the
    plain and the denoising one, their density is fitted.
    """
    model = build(recipe, x.shape[1], seed)
    training = recipe.fit(model, x, y, seed=seed, device="cpu")
    without_prior, coded = isinstance(model, DenoisingAutoencoder) or type(model) is Autoencoder, x[: recipe.coded]
    codes, back = metrics.in_batches(model.encode, coded), metrics.in_batches(model, coded)

    def sample(n: int, generator: Generator) -> Tensor:
        return model.sample(n, generator=generator)

    def chain(n: int, generator: Generator) -> Tensor:
        start = torch.rand(n, x.shape[1], generator=generator)
        for _ in range(recipe.chain):
            means, draws = model.chain(start, 1, generator=generator)
            start = draws[0]
        return means[0]

    own = chain if isinstance(model, DenoisingAutoencoder) else sample
    member = Member(
        codes=lambda x, y: metrics.in_batches(model.encode, x),
        reconstruct=lambda x, y: metrics.in_batches(model, x),
        decode=lambda z: metrics.in_batches(model.decode, z),
        sample=None if type(model) is Autoencoder else own,
    )
    variance, codes = remaining_variance(coded, back, recipe.noise), codes if without_prior else None
    return with_searched_density(member, model.decode, variance, x.mean(0), recipe, seed, codes=codes), training


def conditional(recipe: Conditional, x: Tensor, y: Tensor, seed: int) -> Fit:
    """A conditional VAE: it needs the label, of test images too."""
    model = build(recipe, x.shape[1], seed)
    training = recipe.fit(model, x, y, seed=seed, device="cpu")

    @torch.no_grad()
    def encode(x: Tensor, y: Tensor) -> Tensor:
        return model.encode(x, y)

    @torch.no_grad()
    def reconstruct(x: Tensor, y: Tensor) -> Tensor:
        return model(x, y)

    def sample(n: int, generator: Generator) -> Tensor:
        return model.sample(n, y[torch.randint(len(y), (n,), generator=generator)], generator=generator)

    coded = x[: recipe.coded]
    variance = remaining_variance(coded, reconstruct(coded, y[: recipe.coded]), recipe.noise)
    member = Member(codes=encode, reconstruct=reconstruct, sample=sample, conditional=True)
    search = functools.partial(with_searched_density, classes=recipe.classes)
    return search(member, model.decoder, variance, x.mean(0), recipe, seed), training


def adversarial(recipe: Adversarial, x: Tensor, y: Tensor, seed: int) -> Fit:
    """A generator against an energy, with the bound of its entropy (MEG) or without (a GAN); codes are searched for."""
    model = build(recipe, x.shape[1], seed)
    training = recipe.fit(model, x, y, seed=seed, device="cpu")
    candidates = torch.randn(recipe.candidates, recipe.dim, generator=stream(seed, "evaluation", CODES))
    images = metrics.in_batches(model.decode, candidates)

    def encode(x: Tensor, y: Tensor) -> Tensor:
        nearest = candidates[torch.cdist(x, images).argmin(1)]
        search = functools.partial(metrics.decoder_codes, sigma=recipe.search_sigma, steps=recipe.search_steps)
        return search(model.decode, x, nearest)[0]

    def reconstruct(x: Tensor, y: Tensor) -> Tensor:
        return metrics.in_batches(model.decode, encode(x, y))

    coded = x[: recipe.coded]
    variance = remaining_variance(coded, reconstruct(coded, y), recipe.noise)
    member = Member(codes=encode, reconstruct=reconstruct, sample=lambda n, g: model.sample(n, generator=g))
    return with_searched_density(member, model.decode, variance, x.mean(0), recipe, seed), training
