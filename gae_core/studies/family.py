"""Every model of the book and its older relatives on the same images, with ten numbers for a code: ``family_...``.

Each member says what it can do, as functions; what it cannot is None, and stands in no record.
"""

import dataclasses
import functools
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

from gae_core import data, metrics, nets, plots, train
from gae_core.densities import GaussianMixture, fit_gaussian_mixture
from gae_core.gaussian import standard_normal_log_prob
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
from gae_core.studies.judge import classifier

DIM = 10  # of the codes; the number of centres
HIDDEN = (256, 128)  # of the encoders; decoders and generators mirror them
BATCH, LR = 100, 2e-3
NOISE = 0.1  # added to the test images before their density is asked for
NEIGHBOURS = 12  # of the trustworthiness
STARTS = 4  # codes at which the search for what is missing begins
# What sets one member apart from the others that share its recipe; models are built from it, and records have it.
SETTINGS: dict[str, dict] = {
    "gae": {"steps": 6, "step_size": 0.02, "sigma": 0.3, "second_order": False},
    "batch_norm": {"lam": 0.0},
    "eae": {"lam": 1.0},
    "denoising": {"corruption": 0.3, "sigma": 0.15, "walkback": 3},
    "vae": {"likelihood": "gaussian", "sigma": None},  # learned, from 0.3
    "vae_fixed": {"likelihood": "gaussian", "sigma": 0.5},
    "vae_bernoulli": {"likelihood": "bernoulli"},
    "iwae": {"likelihood": "gaussian", "sigma": None, "samples": 5},
    "bn_vae": {"likelihood": "gaussian", "sigma": None, "gamma": 0.7},
    "cvae": {"likelihood": "gaussian", "sigma": None},
    "gan": {"lr": 1e-3, "betas": (0.5, 0.9), "times": 2},
    "meg": {"lr": 1e-3, "betas": (0.5, 0.9), "times": 2, "lam": 1.0, "surrogate": "jsd"},
    "mixture": {"max_iter": 10, "tol": 1e-2},
    "k_means": {"starts": 4},
    "local_pca": {"max_steps": 100},
    "factor_analysis": {"max_iter": 100, "tol": 1e-2},
    "lle": {"n_neighbors": 30},
}


@dataclass(frozen=True)
class Size:
    """How long a run is.

    Attributes:
        rows: training images, at most.
        test: test images, at most.
        epochs: passes of the networks over the training images.
        density: test images whose density is estimated.
        draws: importance samples for each of them.
        probe: test images for what is odd, and for what is missing.
    """

    rows: int
    test: int
    epochs: int
    density: int
    draws: int
    probe: int


SIZES = {
    "short": Size(400, 100, 1, 10, 10, 40),
    "medium": Size(10_000, 2_000, 20, 2_000, 100, 500),
    "full": Size(60_000, 10_000, 200, 10_000, 1000, 2_000),
}


def size_of(data_name: str, size: str) -> Size:
    """A size, with more epochs for the few digits, so that as many batches are seen."""
    return dataclasses.replace(SIZES[size], epochs=SIZES[size].epochs * (7 if data_name == "digits" else 1))


@dataclass(frozen=True)
class Density:
    """Log-densities of some images.

    Attributes:
        values: in nats, (n,); exact, or estimates that are never above it on average.
        doubled: by how much all the draws have raised the estimate above that of half of them, (n,); None if exact.
    """

    values: Tensor
    doubled: Tensor | None = None


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
        log_density: noisy images, images without the noise, labels, draws -> :class:`Density` of the noisy ones, with
            a variance of the noise for each pixel unless the model says that it is one for all.
        plain_density: the same with one variance for all pixels; None where the noise is a part of the model.
        fill: noisy images, NaN where they are hidden, which pixels are seen (D,), labels -> all pixels, given those:
            their means where these are known, else the image of the likeliest code.
        told: whether it is told the label of each image, so that it has nothing to say of one that has none.
    """

    parameters: int
    codes: Callable[[Tensor, Tensor], Tensor] | None = None
    reconstruct: Callable[[Tensor, Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    sample: Callable[[int, Generator], Tensor] | None = None
    fitted: Callable[[int, Generator], Tensor] | None = None
    log_density: Callable[[Tensor, Tensor, Tensor, int], Density] | None = None
    plain_density: Callable[[Tensor, Tensor, Tensor, int], Density] | None = None
    fill: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    told: bool = False


# ---- densities ---------------------------------------------------------------------------------------------------

Components = list[MultivariateNormal | LowRankMultivariateNormal]  # of a mixture, each in D dimensions and float64


def _parts(x: Tensor, weights: Tensor, components: Components) -> Tensor:
    """Logarithms of each component's weight times its density, (n, K); one at a time, for the sake of memory."""
    return torch.stack([w.log() + c.log_prob(x) for w, c in zip(weights.double(), components, strict=True)], 1)


def gaussian_mixture_density(x: Tensor, weights: Tensor, components: Components) -> Tensor:
    """Log-densities, (n,), of x (n, D) under a mixture of K Gaussians in float64, weights (K,)."""
    return _parts(x.double(), weights, components).logsumexp(1)


def gaussian_mixture_fill(x: Tensor, seen: Tensor, weights: Tensor, components: Components) -> Tensor:
    """Means of all entries, (n, D), given those of x (n, D) that ``seen`` (D,) marks, under a mixture of Gaussians."""
    x = x[:, seen].double()
    parts = [MultivariateNormal(c.mean[seen], c.covariance_matrix[seen][:, seen]) for c in components]
    share = _parts(x, weights, parts).softmax(1)
    given = [
        c.mean + torch.cholesky_solve((x - part.mean).mT, part.scale_tril).mT @ c.covariance_matrix[seen]
        for c, part in zip(components, parts, strict=True)
    ]
    return torch.einsum("nk,knd->nd", share, torch.stack(given))


def linear_mixture(
    mu: Tensor, W: Tensor, noise: float | Tensor, codes: GaussianMixture | None = None
) -> tuple[Tensor, Components]:
    """The mixture of Gaussians that mu + W z + N(0, diag noise) is: weights (K,) and components.

    Args:
        mu: (D,).
        W: (D, d).
        noise: its variance, one for all entries or one for each, (D,).
        codes: distribution of z; None is N(0, I).
    """
    if codes is None:
        one = W.new_ones(1)
        codes = GaussianMixture(one, W.new_zeros(1, W.shape[1]), torch.eye(W.shape[1], dtype=W.dtype)[None])
    noise = torch.as_tensor(noise, dtype=W.dtype).expand(len(mu))
    return codes.weights, _low_rank(mu + codes.means @ W.T, W @ codes.factors, noise)


def _low_rank(means: Tensor, factors: Tensor, noise: Tensor) -> Components:
    """Gaussians of means (K, D) and covariances F F' + diag noise, for factors F (K, D, q) and variances (D,)."""
    each = zip(means.double(), factors.double(), strict=True)
    return [LowRankMultivariateNormal(mean, factor, noise.double()) for mean, factor in each]


def linear_density(x: Tensor, mu: Tensor, W: Tensor, noise: float | Tensor, codes: GaussianMixture | None = None):
    """Exact log-densities (n,) of x (n, D) under :func:`linear_mixture`."""
    return gaussian_mixture_density(x, *linear_mixture(mu, W, noise, codes))


def _curvature(decode: Callable, z: Tensor, rows: tuple[Tensor, ...], sigma: Tensor, precision: Tensor):
    """Jacobian of g/sigma at each z, (n, D, d), and Gauss and Newton's curvature of -log p(x, z), (n, d, d)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own use of torch.jit
        J = torch.func.vmap(torch.func.jacfwd(lambda c, *r: decode(c[None], *(v[None] for v in r))[0]))(z, *rows)
    J = J / sigma[:, None]
    return J, J.mT @ J + precision


def _find(
    decode: Callable, x: Tensor, z: Tensor, rows: tuple, sigma: Tensor, mean: Tensor, precision: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Codes (n, d) of larger log p(x, z) by Gauss and Newton's steps, each shortened until it helps; and its value."""

    def value(z: Tensor) -> Tensor:
        away = z - mean
        return -0.5 * ((x - decode(z, *rows)) / sigma).square().sum(1) - 0.5 * (away @ precision * away).sum(1)

    length, best = z.new_ones(len(z), 1), value(z)
    for _ in range(steps):
        J, H = _curvature(decode, z, rows, sigma, precision)
        slope = (((x - decode(z, *rows)) / sigma)[:, None] @ J)[:, 0] - (z - mean) @ precision
        trial = z + length * torch.linalg.solve(H, slope)
        reached = value(trial)
        better = reached > best
        z, best = torch.where(better[:, None], trial, z), torch.where(better, reached, best)
        length = torch.where(better[:, None], (2 * length).clamp(max=1), length / 4)
    return z, best


def _normal(prior: GaussianMixture | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and inverse covariance (d, d) of a distribution of codes, in the kind of ``like``; None is N(0, I)."""
    d = like.shape[-1]
    if prior is None:
        return like.new_zeros(d), torch.eye(d, dtype=like.dtype)
    mean = prior.weights @ prior.means
    away = prior.means - mean
    covariance = (prior.weights[:, None, None] * (prior.factors @ prior.factors.mT)).sum(0)
    return mean.to(like), torch.linalg.inv(covariance + away.T @ (prior.weights[:, None] * away)).to(like)


@torch.no_grad()
def decoder_density(
    decode: Callable,
    x: Tensor,
    z: Tensor,
    *,
    sigma: float | Tensor,
    prior: GaussianMixture | None = None,
    rows: tuple[Tensor, ...] = (),
    draws: int = 200,
    steps: int = 10,
    generator: Generator | None = None,
) -> Density:
    r"""Importance-weighted estimates of :math:`\log\int p(z)\,N(x; g(z), \mathrm{diag}\,\sigma^2)\,dz`.

    .. math:: \log\frac1S\sum_{s=1}^S \frac{p(z_s)\,N(x; g(z_s), \mathrm{diag}\,\sigma^2)}{r(z_s)}, \qquad z_s \sim r

    Implements ``def-family-importance``; on average never above the integral's logarithm. The proposal r is a Gaussian
    for each x: its mean is found from the code z by Gauss and Newton's steps, its precision is their curvature there.
    For a linear decoder and a Gaussian prior it is the posterior, and the result exact for any S. No encoder takes part
    beyond the place where the search starts. Networks may count in float32; weights are put together in float64.

    Args:
        decode: g, maps codes (n, d), and ``rows``, to (n, D).
        x: data, (n, D).
        z: where the search starts, (n, d).
        sigma: standard deviation of the noise around g, one for all entries or one for each, (D,).
        prior: p(z), in float64; None is N(0, I).
        rows: what else ``decode`` takes, one row for each x: labels, for example.
        draws: S.
        steps: of the search.
        generator: of the noise.

    Returns:
        Estimates in nats, and by how much S draws raise them above S/2 (None for S = 1).
    """
    sigma, log_prior = torch.as_tensor(sigma, dtype=x.dtype).expand(x.shape[1]), standard_normal_log_prob
    if prior is not None:
        log_prior = prior.log_prob
    weights = []
    for some, start, *given in zip(*(v.split(max(1, 20_000 // draws)) for v in (x, z, *rows)), strict=True):
        best, _ = _find(decode, some, start, tuple(given), sigma, *_normal(prior, z), steps)
        _, H = _curvature(decode, best, tuple(given), sigma, _normal(prior, z)[1])
        factor = torch.linalg.cholesky(H.double())
        eps = torch.randn(len(best), draws, z.shape[1], generator=generator, dtype=torch.float64)
        code = best[:, None] + torch.linalg.solve_triangular(factor.mT, eps.mT, upper=True).mT
        flat = code.flatten(0, 1)
        images = decode(flat.to(z), *(v.repeat_interleave(draws, 0) for v in given)).unflatten(0, eps.shape[:2])
        log_p = standard_normal_log_prob((some[:, None] - images) / sigma).double() - sigma.log().sum()
        log_r = standard_normal_log_prob(eps) + factor.diagonal(dim1=1, dim2=2).log().sum(1)[:, None]
        weights.append(log_prior(flat).view_as(log_p) + log_p - log_r)
    weights = torch.cat(weights)
    values = weights.logsumexp(1) - math.log(draws)
    if draws < 2:
        return Density(values)
    half = draws // 2
    parts = [weights[:, :half], weights[:, half : 2 * half]]
    return Density(values, values - torch.stack([w.logsumexp(1) - math.log(half) for w in parts]).mean(0))


@torch.no_grad()
def decoder_fill(
    decode: Callable,
    x: Tensor,
    seen: Tensor,
    z: Tensor,
    *,
    sigma: Tensor,
    prior: GaussianMixture | None = None,
    rows: tuple[Tensor, ...] = (),
    steps: int = 10,
) -> Tensor:
    """Images g(z), (n, D), of the likeliest code given the entries of x (n, D) that ``seen`` (D,) marks.

    That is the code of a :class:`gae_core.models.gae.GAE` for an image of which only these are known. Searches begin at
    several codes for each x, z (n, K, d), for half of an image may be that of different ones; the best is taken. The
    rest is as for :func:`decoder_density`, a mixture as prior standing for the Gaussian with its moments.
    """
    k, flat = z.shape[1], z.flatten(0, 1)
    rows = tuple(v.repeat_interleave(k, 0) for v in rows)
    known = lambda z, *rows: decode(z, *rows)[:, seen]  # noqa: E731
    found, value = [], []
    for some, start, *given in zip(*(v.split(400) for v in (x.repeat_interleave(k, 0), flat, *rows)), strict=True):
        best = _find(known, some[:, seen], start, tuple(given), sigma[seen], *_normal(prior, z), steps)
        found.append(best[0])
        value.append(best[1])
    best = torch.arange(len(x)) * k + torch.cat(value).view(-1, k).argmax(1)
    return decode(torch.cat(found)[best], *(v[best] for v in rows))


def _exact(weights: Tensor, components: Components, plain: Components | None = None) -> dict:
    """What a member can do that is a mixture of Gaussians among the noisy images; ``plain``, with one noise for all."""

    def density(components: Components) -> Callable:
        return lambda noisy, *_: Density(gaussian_mixture_density(noisy, weights, components))

    return {
        "log_density": density(components),
        "plain_density": None if plain is None else density(plain),
        "fill": lambda noisy, seen, *_: gaussian_mixture_fill(noisy, seen, weights, components),
    }


def _left(x: Tensor, back: Tensor) -> Tensor:
    """Variances of the noise around a decoder, (D,): what it leaves of training images, and what the test adds."""
    return (x - back).square().mean(0) + NOISE**2


def _by_search(
    decode: Callable,
    variance: Tensor,
    centre: Tensor,
    seed: int,
    encode: Callable[[Tensor, Tensor], Tensor],
    codes: Tensor | None = None,
    classes: int = 0,
) -> dict:
    """What a member can do that is a decoder with Gaussian noise: the integral over its codes is estimated.

    Args:
        decode: codes, one-hot labels if there are classes -> flat images.
        variance: of the noise, (D,).
        centre: mean image, (D,), which stands for what is missing where a search begins.
        seed: of the draws, and of the fit.
        encode: images, labels -> codes.
        codes: (m, d), to which a mixture of ten is fitted, as the distribution of codes; None takes N(0, I).
        classes: number of labels, if the decoder is told them. The density is then a bound by the true label's part.
    """
    prior = functools.cache(lambda: None if codes is None else fit_gaussian_mixture(codes.double(), 10, seed=seed))

    def hot(labels: Tensor) -> tuple[Tensor, ...]:
        return (nn.functional.one_hot(labels, classes).float(),) if classes else ()

    def density(variance: Tensor) -> Callable:
        def log_density(noisy: Tensor, clean: Tensor, labels: Tensor, draws: int) -> Density:
            how = {"rows": hot(labels), "draws": draws, "generator": Generator().manual_seed(seed)}
            found = decoder_density(decode, noisy, encode(clean, labels), sigma=variance.sqrt(), prior=prior(), **how)
            return dataclasses.replace(found, values=found.values - math.log(classes or 1))

        return log_density

    @torch.no_grad()
    def fill(noisy: Tensor, seen: Tensor, labels: Tensor) -> Tensor:
        """By searches from the code of the image with the mean image's other half, and from the most similar images."""
        first = encode(torch.where(seen, noisy, centre), labels)
        drawn = torch.randn(2000, first.shape[1], generator=Generator().manual_seed(seed)) if codes is None else codes
        starts = first[:, None].repeat(1, STARTS, 1)
        for label in labels.unique() if classes else [None]:
            same = slice(None) if label is None else labels == label
            images = decode(drawn, *(() if label is None else hot(label.expand(len(drawn)))))
            apart = torch.cdist(noisy[same][:, seen], images[:, seen])
            starts[same, 1:] = drawn[apart.topk(STARTS - 1, largest=False).indices]
        return decoder_fill(decode, noisy, seen, starts, sigma=variance.sqrt(), prior=prior(), rows=hot(labels))

    plain = density(variance.mean().expand_as(variance))
    return {"log_density": density(variance), "plain_density": plain, "fill": fill}


# ---- members that are solved -------------------------------------------------------------------------------------


def training_images(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """The yardstick: "samples" that are training images, drawn without replacement; missing pixels get their mean."""
    return Member(
        0,
        sample=lambda n, g: x[torch.randperm(len(x), generator=g)[:n]],
        fill=lambda noisy, *_: x.mean(0).expand_as(noisy),
    )


def pca(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """PCA; the density is that of a mixture fitted to its codes, and of the noise that is left."""
    mu, W = x.mean(0), fit_local_linear(x.double(), 1, DIM).model.W[0].float()
    z = (x - mu) @ W
    variance, prior = _left(x, mu + z @ W.T).double(), fit_gaussian_mixture(z.double(), 10, seed=seed)
    exact, plain = (linear_mixture(mu.double(), W.double(), v, prior) for v in (variance, variance.mean()))
    return Member(
        W.numel() + mu.numel(),
        codes=lambda x, y: (x - mu) @ W,
        reconstruct=lambda x, y: mu + (x - mu) @ W @ W.T,
        decode=lambda z: mu + z @ W.T,
        **_exact(*exact, plain[1]),
    )


def _factors(mu: Tensor, W: Tensor, psi: Tensor, added: float) -> Member:
    """A linear decoder with Gaussian codes and noise, for its mean (D,), loadings (D, d) and variances (D,).

    ``added`` is the variance of the test images' noise that is not in ``psi`` yet.
    """
    encoder = torch.linalg.solve((W.T / psi) @ W + torch.eye(W.shape[1], dtype=W.dtype), W.T / psi)  # (d, D)
    m, V, E = mu.float(), W.float(), encoder.float()
    return Member(
        W.numel() + mu.numel() + psi.unique().numel(),
        codes=lambda x, y: (x - m) @ E.T,
        reconstruct=lambda x, y: m + (x - m) @ E.T @ V.T,
        decode=lambda z: m + z @ V.T,
        sample=lambda n, g: m + torch.randn(n, V.shape[1], generator=g) @ V.T,
        **_exact(*linear_mixture(mu, W, psi + added)),
    )


def probabilistic_pca(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """Probabilistic PCA at its maximum likelihood."""
    mu, W, noise = ppca(x.double(), DIM)
    return _factors(mu, W, noise.expand(len(mu)), NOISE**2)


def factor_analysis(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """Factor analysis by scikit-learn's EM, of images with the noise of the test: constant pixels have no density."""
    from sklearn.decomposition import FactorAnalysis

    noisy = x.double() + NOISE * torch.randn(x.shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    options = {"n_components": DIM, "svd_method": "lapack", **SETTINGS["factor_analysis"]}
    found = FactorAnalysis(**options).fit(noisy.numpy())
    mu, loadings, psi = (torch.from_numpy(v.copy()) for v in (found.mean_, found.components_, found.noise_variance_))
    return _factors(mu, loadings.T, psi, 0.0)


def k_means(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """k-means; read as a mixture of Gaussians with one diagonal covariance it has a density."""
    starts = [Generator().manual_seed(100 * seed + i) for i in range(SETTINGS["k_means"]["starts"])]
    fits = [fit_local_linear(x, DIM, 0, generator=generator) for generator in starts]
    model = max(fits, key=lambda fit: float(fit.objective[-1])).model
    share = model.encode(x).component.bincount(minlength=DIM) / len(x)
    variance = _left(x, model(x)).double()
    nothing = variance.new_zeros(*model.mu.shape, 1)
    exact, plain = (_low_rank(model.mu, nothing, v) for v in (variance, variance.mean().expand_as(variance)))
    return Member(
        model.mu.numel() + DIM,
        reconstruct=lambda x, y: model(x),
        fitted=lambda n, g: model.mu[torch.multinomial(share, n, replacement=True, generator=g)],
        **_exact(share, exact, plain),
    )


def mixture(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """A mixture of Gaussians with full covariances; its code is what Bayes' rule says of the component, as logarithms.

    The variance of the noise that the test images get is added to every covariance in the fit: without it a pixel that
    never changes has no density.
    """
    from sklearn.mixture import GaussianMixture as Fit

    options = {"reg_covar": NOISE**2, "random_state": seed, **SETTINGS["mixture"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it has not converged in so few steps
        found = Fit(DIM, **options).fit(x.float().numpy())
    fitted = (found.weights_, found.means_, found.covariances_)
    weights, means, covariances = (torch.from_numpy(v).double() for v in fitted)
    eye = NOISE**2 * torch.eye(x.shape[1], dtype=torch.float64)
    components = list(map(MultivariateNormal, means, covariances))

    def log_posterior(x: Tensor) -> Tensor:
        return _parts(x.double(), weights, components).log_softmax(1)

    def sample(n: int, generator: Generator) -> Tensor:
        values, vectors = torch.linalg.eigh(covariances - eye)  # without the noise that was added
        factors = vectors * values.clamp_min(0).sqrt()[:, None]
        return GaussianMixture(weights, means, factors).sample(n, generator=generator).float()

    return Member(
        DIM * (1 + x.shape[1] * (x.shape[1] + 3) // 2),
        codes=lambda x, y: log_posterior(x).float(),
        reconstruct=lambda x, y: (log_posterior(x).exp() @ means).float(),
        sample=sample,
        **_exact(weights, components),
    )


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

    return Member(
        W.numel(),
        codes=encode,
        reconstruct=lambda x, y: encode(x, y) @ W,
        decode=lambda z: z.clamp_min(0) @ W,
        **_by_search(lambda z: z.clamp_min(0) @ W, _left(x, z @ W), x.mean(0), seed, encode, z),
    )


def local_pca(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """Ten subspaces of ten dimensions; as a density, a mixture of probabilistic PCA with the subspaces' moments."""
    start = fit_local_linear(x, DIM, 0, generator=Generator().manual_seed(seed)).model.mu
    model = fit_local_linear(x, DIM, DIM, start=start, **SETTINGS["local_pca"]).model.double()
    x = x.double()
    component = model.encode(x).component
    share = component.bincount(minlength=DIM) / len(x)
    variance = _left(x, model(x))
    spread = torch.stack([((x[component == k] - model.mu[k]) @ model.W[k]).std(0) for k in range(DIM)])  # (K, q)
    factors = model.W * spread[:, None]
    exact, plain = (_low_rank(model.mu, factors, v) for v in (variance, variance.mean().expand_as(variance)))

    def sample(n: int, generator: Generator) -> Tensor:
        k = torch.multinomial(share, n, replacement=True, generator=generator)
        z = torch.randn(n, DIM, generator=generator, dtype=x.dtype)
        return (model.mu[k] + torch.einsum("nq,ndq->nd", z, factors[k])).float()

    return Member(
        model.mu.numel() + model.W.numel(),
        reconstruct=lambda x, y: model(x.double()).float(),
        fitted=sample,
        **_exact(share, exact, plain),
    )


def lle(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """Locally linear embedding; unseen images by the weights of their neighbours among the training images."""
    from sklearn.manifold import LocallyLinearEmbedding

    found = LocallyLinearEmbedding(n_components=DIM, random_state=seed, **SETTINGS["lle"]).fit(x.double().numpy())
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


def autoencoder(x: Tensor, y: Tensor, size: Size, seed: int, *, make: Callable) -> Member:
    """A model whose encoder is a function: plain, with batch norm, entropic, without an encoder, denoising."""
    model = _fit(make(functools.partial(_pair, x)), x, y, size, seed)
    codes, variance = metrics.in_batches(model.encode, x[:5000]), _left(x[:5000], metrics.in_batches(model, x[:5000]))
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
        **_by_search(model.decode, variance, x.mean(0), seed, encode, None if known else codes),
    )


def variational(x: Tensor, y: Tensor, size: Size, seed: int, *, make: Callable) -> Member:
    """A VAE or one of its kin. For the density its noise is what its reconstructions leave, as for all networks."""
    model = make(functools.partial(_pair, x, heads=2, output=nn.Sigmoid))
    if isinstance(model.log_sigma, nn.Parameter):
        with torch.no_grad():
            model.log_sigma.fill_(math.log(0.3))  # from 1 it would take half of the training to come down
    _fit(model, x, y, size, seed)
    variance = _left(x[:5000], metrics.in_batches(model, x[:5000]))

    def encode(x: Tensor, y: Tensor) -> Tensor:
        return metrics.in_batches(model.encode, x)

    return Member(
        _count(model),
        codes=encode,
        reconstruct=lambda x, y: metrics.in_batches(model, x),
        decode=lambda z: metrics.in_batches(model.decode, z),
        sample=lambda n, g: model.sample(n, generator=g),
        **_by_search(model.decode, variance, x.mean(0), seed, encode),
    )


def conditional(x: Tensor, y: Tensor, size: Size, seed: int) -> Member:
    """A conditional VAE: it is told the label, of test images too."""
    encoder = nets.mlp([x.shape[1] + 10, *HIDDEN, 2 * DIM])
    decoder = nn.Sequential(nets.mlp([DIM + 10, *reversed(HIDDEN), x.shape[1]]), nn.Sigmoid())
    model = CVAE(Beside(encoder), Beside(decoder), DIM, classes=10, **SETTINGS["cvae"])
    with torch.no_grad():
        model.log_sigma.fill_(math.log(0.3))
    _fit(model, x, y, size, seed)

    @torch.no_grad()
    def encode(x: Tensor, y: Tensor) -> Tensor:
        return model.encode(x, y)

    @torch.no_grad()
    def reconstruct(x: Tensor, y: Tensor) -> Tensor:
        return model(x, y)

    def sample(n: int, generator: Generator) -> Tensor:
        return model.sample(n, y[torch.randint(len(y), (n,), generator=generator)], generator=generator)

    return Member(
        _count(model),
        codes=encode,
        reconstruct=reconstruct,
        sample=sample,
        told=True,
        **_by_search(model.decoder, _left(x, reconstruct(x, y)), x.mean(0), seed, encode, classes=10),
    )


def adversarial(x: Tensor, y: Tensor, size: Size, seed: int, *, name: str) -> Member:
    """A generator against an energy, with the bound of its entropy (MEG) or without (a GAN); codes are searched for."""
    generator = _pair(x)[1]
    leaky = functools.partial(nn.LeakyReLU, 0.2)
    energy = nets.mlp([x.shape[1], *HIDDEN, 1], activation=leaky)
    how = SETTINGS[name]
    surrogate, lam = how.get("surrogate"), how.get("lam", 1.0)
    statistics = nets.mlp([x.shape[1] + DIM, *HIDDEN, 1], activation=leaky) if surrogate else None
    steps = {"energy_steps": 1, "generator_steps": 1}
    model = MEG(generator, energy, DIM, lam=lam, surrogate=surrogate, statistics=statistics, **steps)
    _fit(model, x, y, size, seed, times=how["times"], lr=how["lr"], betas=how["betas"])
    noise = Generator().manual_seed(seed)
    starts = torch.randn(2000, DIM, generator=noise)
    known, sigma = metrics.in_batches(model.decode, starts), torch.full((x.shape[1],), 0.2)

    @torch.no_grad()
    def encode(x: Tensor, y: Tensor) -> Tensor:
        nearest = starts[torch.cdist(x, known).argmin(1)]
        zero, eye = torch.zeros(DIM), torch.eye(DIM)
        parts = zip(x.split(200), nearest.split(200), strict=True)
        return torch.cat([_find(model.decode, a, b, (), sigma, zero, eye, 10)[0] for a, b in parts])

    def reconstruct(x: Tensor, y: Tensor) -> Tensor:
        return metrics.in_batches(model.decode, encode(x, y))

    variance = _left(x[:2000], reconstruct(x[:2000], y))
    return Member(
        _count(model),
        codes=encode,
        reconstruct=reconstruct,
        sample=lambda n, g: model.sample(n, generator=g),
        **_by_search(model.decode, variance, x.mean(0), seed, encode),
    )


def _denoising(pair: Callable, corruption: float, **options) -> DenoisingAutoencoder:
    return DenoisingAutoencoder(*pair(), DIM, corruption=gaussian_noise(corruption), likelihood="gaussian", **options)


def _vae(pair: Callable, gamma: float | None = None, **options) -> VAE:
    kind = IWAE if "samples" in options else VAE
    networks = pair() if options["likelihood"] == "gaussian" else pair(output=nn.Identity)
    norm = {} if gamma is None else {"norm": FixedScaleBatchNorm(DIM, gamma)}
    return kind(*networks, DIM, **options, **norm)


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
        name: (about, functools.partial(autoencoder, make=functools.partial(make, **SETTINGS.get(name, {}))), True)
        for name, about, make in (
            ("gae", "GAE, codes by six steps of ascent", lambda pair, **how: GAE(pair()[1], DIM, **how)),
            ("autoencoder", "autoencoder", lambda pair: Autoencoder(*pair(), DIM)),
            ("batch_norm", "autoencoder with batch norm of the code", lambda pair, **how: EAE(*pair(), DIM, **how)),
            ("eae", "entropic autoencoder", lambda pair, **how: EAE(*pair(), DIM, **how)),
            ("denoising", "denoising autoencoder", _denoising),
        )
    },
    **{
        name: (about, functools.partial(variational, make=functools.partial(_vae, **SETTINGS[name])), True)
        for name, about in (
            ("vae", "variational autoencoder, Gaussian noise whose size is learned"),
            ("vae_fixed", "the same, its noise of standard deviation 0.5"),
            ("vae_bernoulli", "the same, cross-entropy in place of the noise"),
            ("iwae", "variational autoencoder with five importance samples"),
            ("bn_vae", "variational autoencoder with batch norm on the means"),
        )
    },
    "cvae": ("conditional VAE, told the label", conditional, True),
    "gan": ("GAN: Wasserstein loss, R1 penalty", functools.partial(adversarial, name="gan"), True),
    "meg": ("MEG: the same with a bound of the entropy", functools.partial(adversarial, name="meg"), True),
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


def odd_images(x: Tensor, y: Tensor, generator: Generator) -> dict[str, Tensor]:
    """Two kinds of images that are no digits, made of images x (n, 1, height, width) with labels y.

    "halves": the left half of each image, beside the right half of one with another label. Either half is as in the
    data, so that what looks at halves apart, or at pixels one by one, has nothing to go by.
    "turned": by a quarter. Some digits, of 0 above all, stay digits.
    """
    order = torch.randperm(len(x), generator=generator)
    others = torch.stack([next(j for j in order.roll(-i) if y[j] != y[i]) for i in range(len(x))])
    middle = x.shape[3] // 2
    return {
        "halves": torch.cat([x[..., :middle], x[others][..., middle:]], 3),
        "turned": torch.rot90(x, 1, (2, 3)),
    }


def measure(member: Member, images: data.Images, size: Size, seed: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of a member on the test images, by name, and images to look at; seconds are the processor's."""
    shape, x, y = images.shape, images.x_test.flatten(1), images.y_test
    judge = classifier(data.load(images.name)).features  # that of the whole data set, as in all other studies
    generator = Generator().manual_seed(seed)
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
    noise = NOISE * torch.randn(x.shape, generator=Generator().manual_seed(0))  # the same for all members and seeds
    if member.log_density is not None:
        clean, labels, noisy = x[: size.density], y[: size.density], (x + noise)[: size.density]
        density = member.log_density(noisy, clean, labels, size.draws)
        found["log-density, nats"] = float(density.values.mean())
        found["log-density, standard error over images"] = float(density.values.std() / len(clean) ** 0.5)
        if density.doubled is not None:
            found["log-density, rise at the last doubling of draws"] = float(density.doubled.mean())
        if member.plain_density is not None:
            some = slice(size.probe)
            plain = member.plain_density(noisy[some], clean[some], labels[some], size.draws)
            found["log-density, gain of a noise a pixel"] = float((density.values[some] - plain.values).mean())
    clean, labels, noisy = x[: size.probe], y[: size.probe], (x + noise)[: size.probe]
    if not member.told:
        scores = {}
        if member.reconstruct is not None:
            scores["error"] = lambda flat: (flat - member.reconstruct(flat, labels)).square().mean(1)
        if member.log_density is not None:
            draws = max(1, size.draws // 4)  # the order of the images is all that is asked
            scores["density"] = lambda flat: -member.log_density(flat + noise[: len(flat)], flat, labels, draws).values
        for name, score in scores.items():
            usual = score(clean)
            for kind, odd in odd_images(images.x_test[: size.probe], labels, Generator().manual_seed(0)).items():
                both = torch.cat([usual, score(odd.flatten(1))])
                rated = metrics.detection(both, torch.arange(len(both)) >= len(usual))
                found[f"AUROC of the {name}, {kind}"] = rated.auroc
    if member.fill is not None:
        seen = torch.zeros(shape, dtype=torch.bool)
        seen[..., : shape[2] // 2] = True
        seen = seen.flatten()
        hidden = noisy.masked_fill(~seen, math.nan)  # who looks there has no number to show
        filled = member.fill(hidden, seen, labels)
        found["squared error of a missing pixel"] = float((filled - clean)[:, ~seen].square().mean())
        shown["right half filled in"] = torch.where(seen, clean, filled.float())[:32].clamp(0, 1)
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
    how = dict(SETTINGS.get(name, {}))
    epochs = size_of(data_name, size).epochs * how.pop("times", 1) if trained else 0
    recipe = {"batch": BATCH, "lr": how.pop("lr", LR), "hidden": HIDDEN, "schedule": "1 - t"} if trained else {}
    common = {**vars(SIZES[size]), "epochs": epochs, "dim": DIM, "noise": NOISE, "method": about}
    return common | json.loads(json.dumps({**recipe, "options": how}))  # as a record keeps them


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
        judged=data.load,
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
            (3, 1, 1),
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
