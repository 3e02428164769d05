"""Every model of the book and its older relatives on the same images, with ten numbers for a code: ``family_...``.

Each member says what it can do, as functions; what it cannot is None, and stands in no record.
"""

import copy
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core import data, metrics, nets, plots, train
from gae_core.gaussian import standard_normal_log_prob
from gae_core.judge import classifier
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.cvae import CVAE, Beside
from gae_core.models.denoising import DenoisingAutoencoder, gaussian_noise
from gae_core.models.eae import EAE
from gae_core.models.gae import GAE
from gae_core.models.local_linear import fit_local_linear, nmf_step, ppca
from gae_core.models.meg import MEG
from gae_core.models.vae import IWAE, VAE
from gae_core.normalization import FixedScaleBatchNorm
from gae_core.records import Outcome, Study
from gae_core.sampling import GaussianMixture, fit_gaussian_mixture

DIM = 10  # of the codes; the number of centres
HIDDEN = (256, 128)  # of the encoders; decoders and generators mirror them
BATCH, LR = 100, 2e-3
NOISE = 0.1  # added to the test images before their density is asked for
NEIGHBOURS = 12  # of the trustworthiness


@dataclass(frozen=True)
class Size:
    """How long a run is.

    Attributes:
        rows: training images, at most.
        test: test images, at most.
        epochs: passes of the networks over the training images.
        density: test images whose density is estimated.
        draws: importance samples for each of them.
    """

    rows: int
    test: int
    epochs: int
    density: int
    draws: int


SIZES = {
    "short": Size(400, 100, 1, 10, 10),
    "medium": Size(10_000, 2_000, 20, 200, 200),
    "full": Size(60_000, 10_000, 200, 1000, 1000),
}


def size_of(data_name: str, size: str) -> Size:
    """A size, with more epochs for the few digits, so that as many batches are seen."""
    return dataclasses.replace(SIZES[size], epochs=SIZES[size].epochs * (7 if data_name == "digits" else 1))


@dataclass(frozen=True)
class Member:
    """What a fitted model can do, on flat images (n, D) in [0, 1]; None for what it cannot.

    Attributes:
        parameters: numbers that were fitted.
        codes: images, labels -> codes (n, d), whose distances mean something.
        reconstruct: images, labels -> images.
        decode: codes -> images; with it a density can be fitted to the codes, and sampled.
        sample: n, generator -> images, by the model's own distribution.
        fitted: the same, codes from a density that is fitted to them; None, with ``decode``, is a mixture of ten.
        log_density: noisy images, images without the noise, labels, :class:`Size` -> log-densities, (n,), in nats.
    """

    parameters: int
    codes: Callable[[Tensor, Tensor], Tensor] | None = None
    reconstruct: Callable[[Tensor, Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    sample: Callable[[int, Generator], Tensor] | None = None
    fitted: Callable[[int, Generator], Tensor] | None = None
    log_density: Callable[[Tensor, Tensor, Tensor, Size], Tensor] | None = None


# ---- densities ---------------------------------------------------------------------------------------------------


def gaussian_mixture_density(x: Tensor, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """Log-densities, (n,), of x (n, D) under a mixture of Gaussians: (K,), (K, D), (K, D, D), in float64."""
    factors = torch.linalg.cholesky(covariances.double())
    return GaussianMixture(weights.double(), means.double(), factors).log_prob(x.double())


def linear_density(x: Tensor, mu: Tensor, W: Tensor, noise: float, codes: GaussianMixture | None = None) -> Tensor:
    """Exact log-densities of x = mu + W z + N(0, noise I), z from N(0, I) or a mixture, for x (n, D), W (D, d)."""
    if codes is None:
        one = W.new_ones(1)
        codes = GaussianMixture(one, W.new_zeros(1, W.shape[1]), torch.eye(W.shape[1], dtype=W.dtype)[None])
    spread = W @ codes.factors
    covariances = spread @ spread.mT + noise * torch.eye(len(mu), dtype=W.dtype)
    return gaussian_mixture_density(x, codes.weights, mu + codes.means @ W.T, covariances)


def _curvature(decode: Callable, z: Tensor, rows: tuple[Tensor, ...], sigma: float, precision: Tensor):
    """Jacobian of the decoder at each z, (n, D, d), and Gauss and Newton's curvature of -log p(x, z), (n, d, d)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own use of torch.jit
        J = torch.func.vmap(torch.func.jacfwd(lambda c, *r: decode(c[None], *(v[None] for v in r))[0]))(z, *rows)
    return J, J.mT @ J / sigma**2 + precision


def _find(
    decode: Callable, x: Tensor, z: Tensor, rows: tuple, sigma: float, mean: Tensor, precision: Tensor, steps: int
) -> Tensor:
    """Codes (n, d) of larger log p(x, z) by Gauss and Newton's steps, each shortened until it helps."""

    def value(z: Tensor) -> Tensor:
        away = z - mean
        return -(x - decode(z, *rows)).square().sum(1) / (2 * sigma**2) - 0.5 * (away @ precision * away).sum(1)

    length, best = z.new_ones(len(z), 1), value(z)
    for _ in range(steps):
        J, H = _curvature(decode, z, rows, sigma, precision)
        slope = ((x - decode(z, *rows))[:, None] @ J)[:, 0] / sigma**2 - (z - mean) @ precision
        trial = z + length * torch.linalg.solve(H, slope)
        reached = value(trial)
        better = reached > best
        z, best = torch.where(better[:, None], trial, z), torch.where(better, reached, best)
        length = torch.where(better[:, None], (2 * length).clamp(max=1), length / 4)
    return z


@torch.no_grad()
def decoder_density(
    decode: Callable,
    x: Tensor,
    z: Tensor,
    *,
    sigma: float,
    prior: GaussianMixture | None = None,
    rows: tuple[Tensor, ...] = (),
    draws: int = 200,
    steps: int = 10,
    generator: Generator | None = None,
) -> Tensor:
    r"""Importance-weighted estimates of :math:`\log\int p(z)\,N(x; g(z), \sigma^2 I)\,dz`, never above it on average.

    .. math:: \log\frac1S\sum_{s=1}^S \frac{p(z_s)\,N(x; g(z_s), \sigma^2 I)}{r(z_s)}, \qquad z_s \sim r

    Implements ``def-family-importance``. The proposal r is a Gaussian for each x: its mean is found from the code z by
    Gauss and Newton's steps, its precision is their curvature there. For a linear decoder and a Gaussian prior it is
    the posterior, and the result exact for any S. No encoder takes part beyond the place where the search starts.

    Args:
        decode: g, maps codes (n, d), and ``rows``, to (n, D).
        x: data, (n, D).
        z: where the search starts, (n, d).
        sigma: standard deviation of the noise around g.
        prior: p(z); None is N(0, I).
        rows: what else ``decode`` takes, one row for each x: labels, for example.
        draws: S.
        steps: of the search.
        generator: of the noise.

    Returns:
        Estimates in nats, (n,).
    """
    n, d = z.shape
    eye = torch.eye(d, dtype=z.dtype)
    if prior is None:
        log_prior, mean, precision = standard_normal_log_prob, z.new_zeros(d), eye
    else:
        log_prior, mean = prior.log_prob, prior.weights @ prior.means
        away = prior.means - mean
        covariance = (prior.weights[:, None, None] * (prior.factors @ prior.factors.mT)).sum(0)
        precision = torch.linalg.inv(covariance + away.T @ (prior.weights[:, None] * away))
    z = _find(decode, x, z, rows, sigma, mean, precision, steps)
    _, H = _curvature(decode, z, rows, sigma, precision)
    factor = torch.linalg.cholesky(H)
    result = []
    for i in range(n):
        eps = torch.randn(draws, d, generator=generator, dtype=z.dtype)
        code = z[i] + torch.linalg.solve_triangular(factor[i].mT, eps.T, upper=True).T
        residual = (x[i] - decode(code, *(v[i : i + 1].expand(draws, -1) for v in rows))) / sigma
        log_p = log_prior(code) + standard_normal_log_prob(residual) - x.shape[1] * math.log(sigma)
        log_r = standard_normal_log_prob(eps) + factor[i].diagonal().log().sum()
        result.append((log_p - log_r).logsumexp(0) - math.log(draws))
    return torch.stack(result)


# ---- members that are solved -------------------------------------------------------------------------------------


def training_images(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """The yardstick: "samples" that are training images, drawn without replacement."""
    return Member(0, sample=lambda n, g: x[torch.randperm(len(x), generator=g)[:n]])


def pca(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """PCA; the density is that of a mixture fitted to its codes, and of the noise that is left."""
    mu, W = x.mean(0), fit_local_linear(x.double(), 1, DIM).model.W[0].float()
    z = (x - mu) @ W
    noise = float((x - mu - z @ W.T).square().mean())

    def log_density(noisy: Tensor, clean: Tensor, labels: Tensor, size: Size) -> Tensor:
        prior = fit_gaussian_mixture(z.double(), 10, seed=seed)
        return linear_density(noisy, mu.double(), W.double(), noise + NOISE**2, prior)

    return Member(
        W.numel() + mu.numel(),
        codes=lambda x, y: (x - mu) @ W,
        reconstruct=lambda x, y: mu + (x - mu) @ W @ W.T,
        decode=lambda z: mu + z @ W.T,
        log_density=log_density,
    )


def _factors(x: Tensor, mu: Tensor, W: Tensor, psi: Tensor) -> Member:
    """A linear decoder with Gaussian codes and noise, for its mean (D,), loadings (D, d) and variances (D,)."""
    encoder = torch.linalg.solve((W.T / psi) @ W + torch.eye(W.shape[1], dtype=W.dtype), W.T / psi)  # (d, D)
    m, V, E = mu.float(), W.float(), encoder.float()
    covariance = (W @ W.T + (psi + NOISE**2).diag())[None]
    return Member(
        W.numel() + mu.numel() + psi.unique().numel(),
        codes=lambda x, y: (x - m) @ E.T,
        reconstruct=lambda x, y: m + (x - m) @ E.T @ V.T,
        decode=lambda z: m + z @ V.T,
        sample=lambda n, g: m + torch.randn(n, V.shape[1], generator=g) @ V.T,
        log_density=lambda noisy, *_: gaussian_mixture_density(noisy, torch.ones(1), mu[None], covariance),
    )


def probabilistic_pca(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """Probabilistic PCA at its maximum likelihood."""
    mu, W, noise = ppca(x.double(), DIM)
    return _factors(x, mu, W, noise.expand(len(mu)))


def factor_analysis(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """Factor analysis by scikit-learn's EM, of images with the noise of the test: constant pixels have no density."""
    from sklearn.decomposition import FactorAnalysis

    noisy = x.double() + NOISE * torch.randn(x.shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    found = FactorAnalysis(DIM, svd_method="lapack", tol=1e-2, max_iter=100).fit(noisy.numpy())
    psi = torch.from_numpy(found.noise_variance_)
    member = _factors(x, torch.from_numpy(found.mean_), torch.from_numpy(found.components_.T.copy()), psi)
    W = torch.from_numpy(found.components_.T.copy())
    covariance = (W @ W.T + psi.diag())[None]  # the noise is in it already
    mean = torch.from_numpy(found.mean_)[None]
    options = vars(member) | {
        "log_density": lambda noisy, *_: gaussian_mixture_density(noisy, torch.ones(1), mean, covariance)
    }
    return Member(**options)


def k_means(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """k-means; read as a mixture of equal spherical Gaussians it has a density."""
    fits = [fit_local_linear(x, DIM, 0, generator=Generator().manual_seed(100 * seed + i)) for i in range(4)]
    model = max(fits, key=lambda fit: float(fit.objective[-1])).model
    share = model.encode(x).component.bincount(minlength=DIM) / len(x)
    noise = float((x - model(x)).square().mean()) + NOISE**2
    covariances = noise * torch.eye(x.shape[1], dtype=torch.float64).expand(DIM, -1, -1)
    return Member(
        model.mu.numel() + DIM,
        reconstruct=lambda x, y: model(x),
        fitted=lambda n, g: model.mu[torch.multinomial(share, n, replacement=True, generator=g)],
        log_density=lambda noisy, *_: gaussian_mixture_density(noisy, share, model.mu, covariances),
    )


def mixture(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """A mixture of Gaussians with full covariances; its code is what Bayes' rule says of the component, as logarithms.

    The variance of the noise that the test images get is added to every covariance in the fit: without it a pixel that
    never changes has no density.
    """
    from sklearn.mixture import GaussianMixture as Fit

    options = {"reg_covar": NOISE**2, "random_state": seed, "max_iter": 10, "tol": 1e-2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it has not converged in so few steps
        found = Fit(DIM, **options).fit(x.float().numpy())
    fitted = (found.weights_, found.means_, found.covariances_)
    weights, means, covariances = (torch.from_numpy(v).double() for v in fitted)
    eye = NOISE**2 * torch.eye(x.shape[1], dtype=torch.float64)

    def log_posterior(x: Tensor) -> Tensor:
        normal = torch.distributions.MultivariateNormal(means, covariances)
        joint = torch.cat([weights.log() + normal.log_prob(rows.double()[:, None]) for rows in x.split(500)])
        return joint.log_softmax(1)

    def sample(n: int, generator: Generator) -> Tensor:
        values, vectors = torch.linalg.eigh(covariances - eye)  # without the noise that was added
        factors = vectors * values.clamp_min(0).sqrt()[:, None]
        return GaussianMixture(weights, means, factors).sample(n, generator=generator).float()

    return Member(
        DIM * (1 + x.shape[1] * (x.shape[1] + 3) // 2),
        codes=lambda x, y: log_posterior(x).float(),
        reconstruct=lambda x, y: (log_posterior(x).exp() @ means).float(),
        sample=sample,
        log_density=lambda noisy, *_: gaussian_mixture_density(noisy, weights, means, covariances),
    )


def _fitted_density(
    decode: Callable, codes: Tensor, noise: float, seed: int, encode: Callable[[Tensor, Tensor], Tensor]
) -> Callable:
    """Density of a decoder with Gaussian noise, and a mixture of ten fitted to its codes."""

    def log_density(noisy: Tensor, clean: Tensor, labels: Tensor, size: Size) -> Tensor:
        prior = fit_gaussian_mixture(codes.double(), 10, seed=seed)
        z = encode(clean, labels).double()
        sigma = math.sqrt(noise + NOISE**2)
        generator = Generator().manual_seed(seed)
        return decoder_density(
            decode, noisy.double(), z, sigma=sigma, prior=prior, draws=size.draws, generator=generator
        )

    return log_density


def nmf(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """Non-negative matrix factorisation by coordinate descent; codes drawn below 0 are set to 0."""
    generator = Generator().manual_seed(seed)
    z, W = torch.rand(len(x), DIM, generator=generator), torch.rand(DIM, x.shape[1], generator=generator)
    for _ in range(200):
        z = nmf_step(x, z, W)
        W = nmf_step(x.mT, W.mT, z.mT).mT

    def encode(x: Tensor, y: Tensor) -> Tensor:
        z = torch.zeros(len(x), DIM)
        for _ in range(100):
            z = nmf_step(x, z, W)
        return z

    noise, basis = float((x - z @ W).square().mean()), W.double()
    return Member(
        W.numel(),
        codes=encode,
        reconstruct=lambda x, y: encode(x, y) @ W,
        decode=lambda z: z.clamp_min(0) @ W,
        log_density=_fitted_density(lambda z: z.clamp_min(0) @ basis, z, noise, seed, encode),
    )


def local_pca(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """Ten subspaces of ten dimensions; as a density, a mixture of probabilistic PCA with the subspaces' moments."""
    x = x.double()
    start = fit_local_linear(x, DIM, 0, generator=Generator().manual_seed(seed)).model.mu
    model = fit_local_linear(x, DIM, DIM, start=start, max_steps=100).model
    component = model.encode(x).component
    share = component.bincount(minlength=DIM) / len(x)
    noise = float((x - model(x)).square().mean()) + NOISE**2
    spread = torch.stack([((x[component == k] - model.mu[k]) @ model.W[k]).std(0) for k in range(DIM)])  # (K, q)
    factors = model.W * spread[:, None]
    covariances = factors @ factors.mT + noise * torch.eye(x.shape[1], dtype=x.dtype)

    def sample(n: int, generator: Generator) -> Tensor:
        k = torch.multinomial(share, n, replacement=True, generator=generator)
        z = torch.randn(n, DIM, generator=generator, dtype=x.dtype)
        return (model.mu[k] + torch.einsum("nq,ndq->nd", z, factors[k])).float()

    return Member(
        model.mu.numel() + model.W.numel(),
        reconstruct=lambda x, y: model(x.double()).float(),
        fitted=sample,
        log_density=lambda noisy, *_: gaussian_mixture_density(noisy, share, model.mu, covariances),
    )


def lle(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """Locally linear embedding; unseen images by the weights of their neighbours among the training images."""
    from sklearn.manifold import LocallyLinearEmbedding

    found = LocallyLinearEmbedding(n_neighbors=30, n_components=DIM, random_state=seed).fit(x.double().numpy())
    return Member(0, codes=lambda x, y: torch.from_numpy(found.transform(x.double().numpy())))


def t_sne(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """t-SNE in two dimensions, of the test images themselves: it has no code for unseen ones."""
    from sklearn.manifold import TSNE

    def embed(x: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(TSNE(2, init="pca", random_state=seed).fit_transform(x.double().numpy()))

    return Member(0, codes=embed)


# ---- members that are trained ------------------------------------------------------------------------------------


def _pair(x: Tensor, **options) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of flat images."""
    return nets.mlp_pair((x.shape[1],), DIM, hidden=HIDDEN, **options)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _fit(model: nn.Module, x: Tensor, y: Tensor, size: Size, seed: int, *, times: int = 1, **options) -> nn.Module:
    """Train by the recipe that all members share."""
    how = {"batch_size": min(BATCH, len(x)), "lr": LR, "schedule": lambda t: 1 - t, "device": "cpu"} | options
    train.fit(model, x, y, epochs=times * size.epochs, seed=seed, progress=False, **how)
    return model


def _error(model: nn.Module, x: Tensor) -> float:
    """Mean squared error of the reconstruction, a pixel."""
    return float(metrics.squared_error(model, x).mean()) / x.shape[1]


def autoencoder(x: Tensor, y: Tensor, size: Size, seed: int, *, make: Callable) -> Member:
    """A model whose encoder is a function: plain, with batch norm, entropic, without an encoder, denoising."""
    model = _fit(make(functools.partial(_pair, x)), x, y, size, seed)
    codes, noise = metrics.in_batches(model.encode, x[:5000]), _error(model, x[:2000])
    exact = copy.deepcopy(model).double()
    known = isinstance(model, (EAE, GAE))  # asks for N(0, I)

    def encode(x: Tensor, y: Tensor) -> Tensor:
        return metrics.in_batches(model.encode, x)

    def chain(n: int, generator: Generator) -> Tensor:
        start = torch.rand(n, x.shape[1], generator=generator)
        for _ in range(100):
            means, draws = model.chain(start, 1, generator=generator)
            start = draws[0]
        return means[0]

    own = (lambda n, g: model.sample(n, generator=g)) if known else None
    return Member(
        _count(model),
        codes=encode,
        reconstruct=lambda x, y: metrics.in_batches(model, x),
        decode=lambda z: metrics.in_batches(model.decode, z),
        sample=chain if isinstance(model, DenoisingAutoencoder) else own,
        log_density=_own_density(exact.decode, noise, seed, encode)
        if known
        else _fitted_density(exact.decode, codes, noise, seed, encode),
    )


def _own_density(decode: Callable, noise: float, seed: int, encode: Callable, hot: bool = False) -> Callable:
    """Density of a decoder with Gaussian noise and codes from N(0, I); with labels, a bound by the true one."""

    def log_density(noisy: Tensor, clean: Tensor, labels: Tensor, size: Size) -> Tensor:
        rows = (nn.functional.one_hot(labels, 10).double(),) if hot else ()
        options = {"rows": rows, "draws": size.draws, "generator": Generator().manual_seed(seed)}
        sigma = math.sqrt(noise + NOISE**2)
        found = decoder_density(decode, noisy.double(), encode(clean, labels).double(), sigma=sigma, **options)
        return found - math.log(10) if hot else found

    return log_density


def variational(x: Tensor, y: Tensor, size: Size, seed: int, *, make: Callable) -> Member:
    """A VAE with Gaussian noise of a learned size, or one of its kin."""
    model = make(functools.partial(_pair, x, heads=2))
    with torch.no_grad():
        model.log_sigma.fill_(math.log(0.3))  # from 1 it would take half of the training to come down
    _fit(model, x, y, size, seed)
    exact = copy.deepcopy(model).double()
    noise = float(model.log_sigma.detach().exp().square())

    def encode(x: Tensor, y: Tensor) -> Tensor:
        return metrics.in_batches(model.encode, x)

    return Member(
        _count(model),
        codes=encode,
        reconstruct=lambda x, y: metrics.in_batches(model, x),
        decode=lambda z: metrics.in_batches(model.decode, z),
        sample=lambda n, g: model.sample(n, generator=g),
        log_density=_own_density(exact.decode, noise, seed, encode),
    )


def conditional(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """A conditional VAE: it is told the label, of test images too."""
    encoder = nets.mlp([x.shape[1] + 10, *HIDDEN, 2 * DIM])
    decoder = nn.Sequential(nets.mlp([DIM + 10, *reversed(HIDDEN), x.shape[1]]), nn.Sigmoid())
    options = {"classes": 10, "likelihood": "gaussian", "sigma": None}
    model = CVAE(Beside(encoder), Beside(decoder), DIM, **options)
    with torch.no_grad():
        model.log_sigma.fill_(math.log(0.3))
    _fit(model, x, y, size, seed)
    exact = copy.deepcopy(model).double()

    @torch.no_grad()
    def encode(x: Tensor, y: Tensor) -> Tensor:
        return model.encode(x, y)

    @torch.no_grad()
    def reconstruct(x: Tensor, y: Tensor) -> Tensor:
        return model(x, y)

    def sample(n: int, generator: Generator) -> Tensor:
        return model.sample(n, y[torch.randint(len(y), (n,), generator=generator)], generator=generator)

    noise = float(model.log_sigma.detach().exp().square())
    density = _own_density(exact.decoder, noise, seed, encode, hot=True)
    return Member(_count(model), codes=encode, reconstruct=reconstruct, sample=sample, log_density=density)


def adversarial(x: Tensor, y: Tensor, size: Size, seed: int, *, surrogate: str | None) -> Member:
    """A generator against an energy, with the bound of its entropy (MEG) or without (a GAN); codes are searched for."""
    generator = _pair(x)[1]
    leaky = functools.partial(nn.LeakyReLU, 0.2)
    energy = nets.mlp([x.shape[1], *HIDDEN, 1], activation=leaky)
    statistics = nets.mlp([x.shape[1] + DIM, *HIDDEN, 1], activation=leaky) if surrogate else None
    steps = {"energy_steps": 1, "generator_steps": 1}
    model = MEG(generator, energy, DIM, lam=1.0, surrogate=surrogate, statistics=statistics, **steps)
    _fit(model, x, y, size, seed, times=2, lr=1e-3, betas=(0.5, 0.9))
    noise = Generator().manual_seed(seed)
    starts = torch.randn(2000, DIM, generator=noise)
    known, sigma = metrics.in_batches(model.decode, starts), 0.2

    @torch.no_grad()
    def encode(x: Tensor, y: Tensor) -> Tensor:
        nearest = starts[torch.cdist(x, known).argmin(1)]
        zero, eye = torch.zeros(DIM), torch.eye(DIM)
        parts = zip(x.split(200), nearest.split(200), strict=True)
        return torch.cat([_find(model.decode, a, b, (), sigma, zero, eye, 10) for a, b in parts])

    def reconstruct(x: Tensor, y: Tensor) -> Tensor:
        return metrics.in_batches(model.decode, encode(x, y))

    seen = x[:500]
    left = float((seen - reconstruct(seen, y)).square().mean())
    return Member(
        _count(model),
        codes=encode,
        reconstruct=reconstruct,
        sample=lambda n, g: model.sample(n, generator=g),
        log_density=_own_density(copy.deepcopy(model).double().decode, left, seed, encode),
    )


def _gae(pair: Callable) -> GAE:
    return GAE(pair()[1], DIM, steps=6, step_size=0.02, sigma=0.3, second_order=False)


def _denoising(pair: Callable) -> DenoisingAutoencoder:
    noise = gaussian_noise(0.3)
    return DenoisingAutoencoder(*pair(), DIM, corruption=noise, likelihood="gaussian", sigma=0.15, walkback=3)


def _gaussian(kind: type[VAE], **options) -> Callable:
    return functools.partial(
        variational, make=lambda pair: kind(*pair(), DIM, likelihood="gaussian", sigma=None, **options)
    )


def _bn_vae(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    return _gaussian(VAE, norm=FixedScaleBatchNorm(DIM, 0.7))(x, y, size, seed)


# name -> what it is, how it is made, whether epochs are passed over
MEMBERS: dict[str, tuple[str, Callable[..., Member], bool]] = {
    "training_images": ("the yardstick: training images as samples", training_images, False),
    "pca": ("PCA", pca, False),
    "ppca": ("probabilistic PCA", probabilistic_pca, False),
    "factor_analysis": ("factor analysis", factor_analysis, False),
    "k_means": ("k-means", k_means, False),
    "mixture": ("mixture of Gaussians", mixture, False),
    "nmf": ("non-negative matrix factorisation", nmf, False),
    "local_pca": ("locally linear GAE", local_pca, False),
    "lle": ("locally linear embedding", lle, False),
    "t_sne": ("t-SNE in the plane", t_sne, False),
    **{
        name: (about, functools.partial(autoencoder, make=make), True)
        for name, about, make in (
            ("gae", "GAE, codes by six steps of ascent", _gae),
            ("autoencoder", "autoencoder", lambda pair: Autoencoder(*pair(), DIM)),
            ("batch_norm", "autoencoder with batch norm of the code", lambda pair: EAE(*pair(), DIM, lam=0.0)),
            ("eae", "entropic autoencoder", lambda pair: EAE(*pair(), DIM, lam=1.0)),
            ("denoising", "denoising autoencoder", _denoising),
        )
    },
    "vae": ("variational autoencoder", _gaussian(VAE), True),
    "iwae": ("the same with five importance samples", _gaussian(IWAE, samples=5), True),
    "bn_vae": ("the same with batch norm on the means, gamma = 0.7", _bn_vae, True),
    "cvae": ("conditional VAE, told the label", conditional, True),
    "gan": ("GAN: Wasserstein loss, R1 penalty", functools.partial(adversarial, surrogate=None), True),
    "meg": ("MEG: the same with a bound of the entropy", functools.partial(adversarial, surrogate="jsd"), True),
}


@functools.cache
def images_of(name: str, size: str) -> data.Images:
    """The images of a run: a fixed random part of training and test images, as floats in [0, 1]."""
    images, limits, generator = data.load(name), SIZES[size], Generator().manual_seed(0)

    def part(x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(x), generator=generator)[:n]
        return data.to_unit(x[rows]), y[rows]

    parts = (*part(images.x_train, images.y_train, limits.rows), *part(images.x_test, images.y_test, limits.test))
    return data.Images(images.name, *parts)


def measure(member: Member, images: data.Images, size: Size, seed: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of a member on the test images, by name, and images to look at; seconds are the processor's."""
    shape, x, y = images.shape, images.x_test.flatten(1), images.y_test
    judge, generator = classifier(images).features, Generator().manual_seed(seed)
    real = metrics.in_batches(judge, images.x_test)

    def distance(flat: Tensor) -> float:
        return metrics.frechet_distance(metrics.in_batches(judge, flat.unflatten(1, shape)), real)

    found, shown = {}, {}
    if member.reconstruct is not None:
        back = member.reconstruct(x, y)
        found["squared error a pixel"] = float((x - back).square().mean())
        shown["test images"], shown["reconstructions"] = x[:32], back[:32].clamp(0, 1)
    if member.sample is not None:
        drawn = member.sample(len(x), generator).clamp(0, 1)
        found["Fréchet, own"], shown["samples"] = distance(drawn), drawn[:32]
    fitted = member.fitted
    if member.decode is not None:
        seen = images.x_train[:5000].flatten(1)
        density = fit_gaussian_mixture(member.codes(seen, images.y_train[:5000]).double(), 10, seed=seed)
        fitted = lambda n, g: member.decode(density.sample(n, generator=g).float())  # noqa: E731
    if fitted is not None:
        drawn = fitted(len(x), generator).clamp(0, 1)
        found["Fréchet, fitted"], shown["samples, fitted"] = distance(drawn), drawn[:32]
    if member.log_density is not None:
        clean, labels = x[: size.density], y[: size.density]
        noise = torch.randn(clean.shape, generator=Generator().manual_seed(0))  # the same for all members and seeds
        values = member.log_density(clean + NOISE * noise, clean, labels, size)
        found["log-density, nats"] = float(values.mean())
    if member.codes is not None:
        start = time.process_time()
        codes = member.codes(x, y)
        found["seconds, codes"] = time.process_time() - start
        found["trustworthiness"] = metrics.trustworthiness(x, codes, NEIGHBOURS)
    return found, {name: rows.unflatten(1, shape) for name, rows in shown.items()}


def fit(name: str, x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """A member of the family, fitted to flat images x (n, D) with labels y; fresh weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MEMBERS[name][1](x, y, size, seed)


def _settings(name: str, data_name: str, size: str) -> dict:
    about, _, trained = MEMBERS[name]
    epochs = size_of(data_name, size).epochs * (2 if name in ("gan", "meg") else 1) if trained else 0
    return {**vars(SIZES[size]), "epochs": epochs, "dim": DIM, "noise": NOISE, "method": about}


def _run(name: str, data_name: str, size: str, seed: int, _device: torch.device) -> Outcome:
    """Fit a member and measure it. All run on the CPU: half of them know no other device, and times are compared."""
    images, limits = images_of(data_name, size), size_of(data_name, size)
    x, y = images.x_train.flatten(1), images.y_train
    start, begun = time.perf_counter(), time.process_time()
    member = fit(name, x, y, limits, seed)
    seconds, busy = time.perf_counter() - start, time.process_time() - begun
    found, shown = measure(member, images, limits, seed)
    epochs = _settings(name, data_name, size)["epochs"]
    figure = plots.image_panels(shown, columns=8) if shown else None
    rows, fitted = max(1, epochs) * len(x), name not in ("training_images", "t_sne")
    return Outcome(found | ({"seconds, fit": busy} if fitted else {}), member.parameters, seconds, rows, figure=figure)


STUDIES: dict[str, Study] = {
    f"family_{name}": Study(
        f"the family on one data set: {about}",
        ("mnist", "digits"),
        functools.partial(_settings, name),
        functools.partial(_run, name),
        judged=True,
    )
    for name, (about, _, _) in MEMBERS.items()
}


# ---- the map -----------------------------------------------------------------------------------------------------

FOUND = ("closed form", "finite search", "iteration", "encoder", "not at all")  # how the code is inferred
KNOWN = ("no decoder", "nothing", "matched", "in the model")  # what is assumed of its distribution
GOALS = ("fit at one code", "likelihood", "a bound of it", "neighbours", "a critic")  # what is maximised


@dataclass(frozen=True)
class Place:
    """Where a model stands: its row in the chapter's table, and its place and colour in the picture drawn from it.

    Attributes:
        model: its name.
        chapter: page of the book that has it.
        latent: what the code is.
        inference: how it is found for a datum.
        assumed: what is assumed of its distribution.
        maximised: what the training maximises.
        sampled: what can be sampled.
        found: one of ``FOUND``.
        known: one of ``KNOWN``.
        goal: one of ``GOALS``.
    """

    model: str
    chapter: str
    latent: str
    inference: str
    assumed: str
    maximised: str
    sampled: str
    found: str
    known: str
    goal: str


ERROR, FIT = "minus the squared error", "images, after a fit to the codes"
MAP = tuple(
    Place(*row.split(" | "), *(axis[i] for axis, i in zip((FOUND, KNOWN, GOALS), places, strict=True)))
    for row, places in (
        (f"PCA | gae | a point of a plane | a projection | nothing | {ERROR} | {FIT}", (0, 1, 0)),
        (
            "PPCA, factor analysis | gae | a point of a plane | Gaussian posterior, closed form | $N(0, I)$ "
            "| the likelihood | images",
            (0, 3, 1),
        ),
        (
            f"k-means | gae | one of $K$ centres | comparison of all $K$ | nothing | {ERROR} "
            "| the centres, by their shares",
            (1, 1, 0),
        ),
        (
            "mixture of Gaussians | gae | one of $K$ components | Bayes' rule over all $K$ | its $K$ probabilities, "
            "learned | the likelihood | images",
            (1, 3, 1),
        ),
        (
            "local PCA | gae | a component and a point in its plane | comparison of all $K$, a projection in each "
            f"| nothing | {ERROR} | {FIT}",
            (1, 1, 0),
        ),
        (
            f"NMF | gae | numbers that are not negative | steps, for each datum | $z \\ge 0$ | {ERROR} | {FIT}",
            (2, 1, 0),
        ),
        (
            "LLE | family | a point of a map | eigenvectors, for all data together | mean 0, covariance $I$ over the "
            "data | minus the error of the neighbours' weights | nothing",
            (0, 0, 3),
        ),
        (
            "t-SNE | family | a point of a map | gradient steps, for all data together | nothing | minus a divergence "
            "of neighbourhoods | nothing",
            (2, 0, 3),
        ),
        (
            "GAE | gae | a vector | gradient steps, for each datum | $N(0, I)$, or nothing | "
            "$\\log q(z)\\,q(x \\mid z)$ at the code | images, if $N(0, I)$ was assumed",
            (2, 3, 0),
        ),
        (
            "deep image prior | image_prior | the weights of the network | gradient steps that stop early | the random "
            f"start | {ERROR}, for one image | nothing",
            (2, 1, 0),
        ),
        (f"autoencoder | autoencoder | a vector | encoder | nothing | {ERROR} | {FIT}", (3, 1, 0)),
        (
            "denoising autoencoder | denoising | a vector | encoder, of a corrupted image | nothing | the likelihood "
            "of the clean image given the corrupted one | images, by a chain",
            (3, 1, 0),
        ),
        (
            f"EAE | eae | a vector | encoder | pushed to $N(0, I)$ by its entropy | {ERROR}, plus the entropy of the "
            "codes | images",
            (3, 2, 0),
        ),
        (
            "VAE, IWAE, BN-VAE | vae | a vector | random encoder | $N(0, I)$ | a lower bound of the likelihood "
            "| images",
            (3, 3, 2),
        ),
        (
            "CVAE | cvae | a vector | random encoder that sees the label | $N(0, I)$ given the label | a lower bound "
            "of the likelihood given the label | images of a label",
            (3, 3, 2),
        ),
        ("GAN | energy | a vector | not at all | $N(0, I)$ | what a critic says of the samples | images", (4, 3, 4)),
        (
            "MEG | meg | a vector | not at all | $N(0, I)$ | minus a learned energy of the samples, plus a bound of "
            "their entropy | images",
            (4, 3, 4),
        ),
    )
)


def map_table() -> str:
    """The map of the family as a table in MyST, as it stands in the chapter."""
    lines = ["| model | the code is | it is found by | assumed of its distribution | maximised | can be sampled |"]
    lines.append("|---" * 6 + "|")
    for place in MAP:
        name = place.model if place.chapter == "family" else f"{{doc}}`{place.model} <{place.chapter}>`"
        cells = (name, place.latent, place.inference, place.assumed, place.maximised, place.sampled)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
