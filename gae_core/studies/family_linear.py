"""Members of the family that are solved: linear ones, those of finitely many components, and those without a decoder.

Each takes its recipe, flat images x (n, D), their labels y and a seed, and gives a member and what the fit was.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.distributions import MultivariateNormal

from gae_core import metrics
from gae_core.densities import GaussianMixture
from gae_core.models.local_linear import fit_local_linear, nmf_step, ppca
from gae_core.seeds import seed_of, stream
from gae_core.studies.family_members import (
    PRIOR,
    SOLVER,
    TRAINING_NOISE,
    Member,
    Recipe,
    codes_density,
    remaining_variance,
    with_exact_density,
    with_searched_density,
)
from gae_core.train import Clock, Training

Fit = tuple[Member, Training]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class ExpectationMaximisation(Recipe):
    """Of a member that scikit-learn fits by expectation maximisation.

    Attributes:
        max_iter: most steps.
        tol: rise of the likelihood at which the steps end, as scikit-learn counts it.
    """

    max_iter: int
    tol: float = 1e-2


@dataclass(frozen=True, kw_only=True)
class KMeans(Recipe):
    """Of k-means.

    Attributes:
        restarts: fits, of which the best is taken.
    """

    restarts: int = 4


@dataclass(frozen=True, kw_only=True)
class LocalPCA(Recipe):
    """Of local PCA.

    Attributes:
        max_steps: most rounds of assignment and principal axes.
    """

    max_steps: int = 100


@dataclass(frozen=True, kw_only=True)
class NMF(Recipe):
    """Of non-negative matrix factorisation.

    Attributes:
        steps: of the fit, each of all codes and of the whole matrix.
        code_steps: to the code of an image.
    """

    steps: int = 200
    code_steps: int = 100


@dataclass(frozen=True, kw_only=True)
class LLE(Recipe):
    """Of locally linear embedding.

    Attributes:
        n_neighbors: of each image, whose weights are kept.
    """

    n_neighbors: int = 30


def _solved(clock: Clock, x: Tensor, parameters: int) -> Training:
    """What a fit was, to rows x, that had no steps to count."""
    return Training({}, *clock.seconds(), rows=len(x), parameters=parameters)


def training_images(recipe: Recipe, x: Tensor, y: Tensor, seed: int) -> Fit:
    """The yardstick: "samples" that are training images, drawn without replacement; missing pixels get their mean."""
    member = Member(
        sample=lambda n, g: x[torch.randperm(len(x), generator=g)[:n]],
        fill=lambda noisy, *_: x.mean(0).expand_as(noisy),
    )
    return member, _solved(Clock(CPU), x[:0], 0)


def pca(recipe: Recipe, x: Tensor, y: Tensor, seed: int) -> Fit:
    """PCA; the density is that of a mixture fitted to its codes, and of the noise that is left."""
    clock = Clock(CPU)
    mu, W = x.mean(0), fit_local_linear(x.double(), 1, recipe.dim).model.W[0].float()
    training = _solved(clock, x, W.numel() + mu.numel())
    z = (x - mu) @ W
    variance = remaining_variance(x, mu + z @ W.T, recipe.noise).double()
    prior = codes_density(z, recipe, seed, PRIOR)
    exact, plain = (metrics.linear_mixture(mu.double(), W.double(), v, prior) for v in (variance, variance.mean()))
    member = Member(
        codes=lambda x, y: (x - mu) @ W,
        reconstruct=lambda x, y: mu + (x - mu) @ W @ W.T,
        decode=lambda z: mu + z @ W.T,
    )
    return with_exact_density(member, *exact, plain[1]), training


def _factors(mu: Tensor, W: Tensor, psi: Tensor, added: float) -> Member:
    """A linear decoder with Gaussian codes and noise, for its mean (D,), loadings (D, d) and variances (D,).

    ``added`` is the variance of the test images' noise that is not in ``psi`` yet.
    """
    encoder = torch.linalg.solve((W.T / psi) @ W + torch.eye(W.shape[1], dtype=W.dtype), W.T / psi)  # (d, D)
    m, V, E = mu.float(), W.float(), encoder.float()
    member = Member(
        codes=lambda x, y: (x - m) @ E.T,
        reconstruct=lambda x, y: m + (x - m) @ E.T @ V.T,
        decode=lambda z: m + z @ V.T,
        sample=lambda n, g: m + torch.randn(n, V.shape[1], generator=g) @ V.T,
    )
    return with_exact_density(member, *metrics.linear_mixture(mu, W, psi + added))


def probabilistic_pca(recipe: Recipe, x: Tensor, y: Tensor, seed: int) -> Fit:
    """Probabilistic PCA at its maximum likelihood."""
    clock = Clock(CPU)
    mu, W, noise = ppca(x.double(), recipe.dim)
    training = _solved(clock, x, W.numel() + mu.numel() + 1)
    return _factors(mu, W, noise.expand(len(mu)), recipe.noise**2), training


def factor_analysis(recipe: ExpectationMaximisation, x: Tensor, y: Tensor, seed: int) -> Fit:
    """Factor analysis by scikit-learn's EM, of images with the noise of the test: constant pixels have no density."""
    from sklearn.decomposition import FactorAnalysis

    generator = stream(seed, "data", TRAINING_NOISE)
    noisy = x.double() + recipe.noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    solver = FactorAnalysis(recipe.dim, svd_method="lapack", max_iter=recipe.max_iter, tol=recipe.tol)
    clock = Clock(CPU)
    solver.fit(noisy.numpy())
    training = _solved(clock, x, (recipe.dim + 2) * x.shape[1])
    parts = (solver.mean_, solver.components_, solver.noise_variance_)
    mu, loadings, psi = (torch.from_numpy(v.copy()) for v in parts)
    return _factors(mu, loadings.T, psi, 0.0), training


def k_means(recipe: KMeans, x: Tensor, y: Tensor, seed: int) -> Fit:
    """k-means; read as a mixture of Gaussians with one diagonal covariance it has a density."""
    clock = Clock(CPU)
    generators = [stream(seed, "weights", i) for i in range(recipe.restarts)]
    fits = [fit_local_linear(x, recipe.dim, 0, generator=generator) for generator in generators]
    model = max(fits, key=lambda fit: float(fit.objective[-1])).model
    share = model.encode(x).component.bincount(minlength=recipe.dim) / len(x)
    training = _solved(clock, x, model.mu.numel() + share.numel())
    variance = remaining_variance(x, model(x), recipe.noise).double()
    factors, plain = variance.new_zeros(*model.mu.shape, 1), variance.mean().expand_as(variance)
    member = Member(
        reconstruct=lambda x, y: model(x),
        fitted=lambda n, g: model.mu[torch.multinomial(share, n, replacement=True, generator=g)],
    )
    components = (metrics.low_rank_gaussians(model.mu, factors, v) for v in (variance, plain))
    return with_exact_density(member, share, *components), training


def mixture(recipe: ExpectationMaximisation, x: Tensor, y: Tensor, seed: int) -> Fit:
    """A mixture of Gaussians with full covariances; its code is what Bayes' rule says of the component, as logarithms.

    The variance of the noise that the test images get is added to every covariance in the fit: without it a pixel that
    never changes has no density.
    """
    from sklearn.mixture import GaussianMixture as Solver

    d, floor, random_state = x.shape[1], recipe.noise**2, seed_of(seed, "density", SOLVER)
    limits = {"max_iter": recipe.max_iter, "tol": recipe.tol}
    solver = Solver(recipe.dim, reg_covar=floor, random_state=random_state, **limits)
    clock = Clock(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it has not converged in so few steps
        solver.fit(x.float().numpy())
    training = _solved(clock, x, recipe.dim * (1 + d * (d + 3) // 2))
    parts = (solver.weights_, solver.means_, solver.covariances_)
    weights, means, covariances = (torch.from_numpy(v).double() for v in parts)
    components = list(map(MultivariateNormal, means, covariances))

    def log_posterior(x: Tensor) -> Tensor:
        return metrics.gaussian_mixture_parts(x, weights, components).log_softmax(1)

    def sample(n: int, generator: Generator) -> Tensor:
        values, vectors = torch.linalg.eigh(covariances - floor * torch.eye(d).double())  # without what was added
        factors = vectors * values.clamp_min(0).sqrt()[:, None]
        return GaussianMixture(weights, means, factors).sample(n, generator=generator).float()

    member = Member(
        codes=lambda x, y: log_posterior(x).float(),
        reconstruct=lambda x, y: (log_posterior(x).exp() @ means).float(),
        sample=sample,
    )
    return with_exact_density(member, weights, components), training


def nmf(recipe: NMF, x: Tensor, y: Tensor, seed: int) -> Fit:
    """Non-negative matrix factorisation by coordinate descent; codes drawn below 0 are set to 0."""
    clock, generator = Clock(CPU), stream(seed, "weights")
    z, W = torch.rand(len(x), recipe.dim, generator=generator), torch.rand(recipe.dim, x.shape[1], generator=generator)
    for _ in range(recipe.steps):
        z = nmf_step(x, z, W)
        W = nmf_step(x.mT, W.mT, z.mT).mT
    training = _solved(clock, x, W.numel())

    def encode(x: Tensor, y: Tensor) -> Tensor:
        z = torch.zeros(len(x), recipe.dim)
        for _ in range(recipe.code_steps):
            z = nmf_step(x, z, W)
        return z

    def decode(z: Tensor) -> Tensor:
        return z.clamp_min(0) @ W

    member = Member(codes=encode, reconstruct=lambda x, y: encode(x, y) @ W, decode=decode)
    variance = remaining_variance(x, z @ W, recipe.noise)
    return with_searched_density(member, decode, variance, x.mean(0), recipe, seed, codes=z), training


def local_pca(recipe: LocalPCA, x: Tensor, y: Tensor, seed: int) -> Fit:
    """As many subspaces as each has dimensions; as a density, a mixture of probabilistic PCA with their moments."""
    q, clock = recipe.dim, Clock(CPU)
    start = fit_local_linear(x, q, 0, generator=stream(seed, "weights")).model.mu
    model = fit_local_linear(x, q, q, start=start, max_steps=recipe.max_steps).model.double()
    training = _solved(clock, x, model.mu.numel() + model.W.numel())
    x = x.double()
    component = model.encode(x).component
    share = component.bincount(minlength=q) / len(x)
    variance = remaining_variance(x, model(x), recipe.noise)
    spread = torch.stack([((x[component == k] - model.mu[k]) @ model.W[k]).std(0) for k in range(q)])  # (K, q)
    factors, plain = model.W * spread[:, None], variance.mean().expand_as(variance)

    def sample(n: int, generator: Generator) -> Tensor:
        k = torch.multinomial(share, n, replacement=True, generator=generator)
        z = torch.randn(n, q, generator=generator, dtype=x.dtype)
        return (model.mu[k] + torch.einsum("nq,ndq->nd", z, factors[k])).float()

    member = Member(reconstruct=lambda x, y: model(x.double()).float(), fitted=sample)
    components = (metrics.low_rank_gaussians(model.mu, factors, v) for v in (variance, plain))
    return with_exact_density(member, share, *components), training


def lle(recipe: LLE, x: Tensor, y: Tensor, seed: int) -> Fit:
    """Locally linear embedding; unseen images by the weights of their neighbours among the training images."""
    from sklearn.manifold import LocallyLinearEmbedding

    random_state = seed_of(seed, "density", SOLVER)
    solver = LocallyLinearEmbedding(n_neighbors=recipe.n_neighbors, n_components=recipe.dim, random_state=random_state)
    clock = Clock(CPU)
    solver.fit(x.double().numpy())
    training = _solved(clock, x, 0)
    return Member(codes=lambda x, y: torch.from_numpy(solver.transform(x.double().numpy()))), training


def t_sne(recipe: Recipe, x: Tensor, y: Tensor, seed: int) -> Fit:
    """t-SNE of the test images themselves, since it has no code for unseen ones: nothing is fitted before."""
    from sklearn.manifold import TSNE

    def embed(x: Tensor, y: Tensor) -> Tensor:
        solver = TSNE(recipe.dim, init="pca", random_state=seed_of(seed, "density", SOLVER))
        return torch.from_numpy(solver.fit_transform(x.double().numpy()))

    return Member(codes=embed), _solved(Clock(CPU), x[:0], 0)
