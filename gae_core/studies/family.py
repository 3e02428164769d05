"""Every model of the book and its older relatives on the same images, with ten numbers for a code: ``family_...``.

Each member says what it can do, as functions; what it cannot is None, and stands in no record.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from gae_core import data, metrics, plots
from gae_core.seeds import stream
from gae_core.studies import family_linear as linear
from gae_core.studies import judge
from gae_core.studies.family_members import (
    DRAWS,
    IMAGES,
    ODD,
    ODD_DRAWS,
    SAMPLED,
    TEST_NOISE,
    Member,
    Recipe,
    codes_density,
)
from gae_core.studies.family_networks import (
    Adversarial,
    Conditional,
    Denoising,
    Entropic,
    Inferred,
    Network,
    Variational,
    adversarial,
    autoencoder,
    conditional,
)
from gae_core.studies.study import Outcome, Study, Trained, check_known
from gae_core.train import Clock, Training

SIZES = {  # images, at most; epochs of the networks; images whose density is estimated, with their draws; and probed
    "short": {"rows": 400, "test": 100, "epochs": 1, "density": 10, "draws": 10, "probe": 40},
    "medium": {"rows": 10_000, "test": 2_000, "epochs": 20, "density": 2_000, "draws": 100, "probe": 500},
    "full": {"rows": 60_000, "test": 10_000, "epochs": 200, "density": 10_000, "draws": 1000, "probe": 2_000},
}

EM = linear.ExpectationMaximisation
LearnedVAE = partial(Variational, sigma_start=0.3)
# name -> what it is, its recipe, how it is fitted
MEMBERS: dict[str, tuple[str, Callable[..., Recipe], Callable[..., tuple[Member, Training]]]] = {
    "training_images": ("the yardstick: training images as samples", Recipe, linear.training_images),
    "pca": ("PCA", Recipe, linear.pca),
    "ppca": ("probabilistic PCA", Recipe, linear.probabilistic_pca),
    "factor_analysis": ("factor analysis", partial(EM, max_iter=100), linear.factor_analysis),
    "k_means": ("k-means", linear.KMeans, linear.k_means),
    "mixture": ("mixture of Gaussians", partial(EM, max_iter=10), linear.mixture),
    "nmf": ("non-negative matrix factorisation", linear.NMF, linear.nmf),
    "local_pca": ("locally linear GAE", linear.LocalPCA, linear.local_pca),
    "lle": ("locally linear embedding", linear.LLE, linear.lle),
    "t_sne": ("t-SNE in the plane", partial(Recipe, dim=2), linear.t_sne),
    "gae": ("GAE, codes by six steps of ascent", Inferred, autoencoder),
    "autoencoder": ("autoencoder", Network, autoencoder),
    "batch_norm": ("autoencoder with batch norm of the code", partial(Entropic, lam=0.0), autoencoder),
    "eae": ("entropic autoencoder", partial(Entropic, lam=1.0), autoencoder),
    "denoising": ("denoising autoencoder", Denoising, autoencoder),
    "vae": ("variational autoencoder, Gaussian noise whose size is learned", LearnedVAE, autoencoder),
    "vae_fixed": ("the same, its noise of standard deviation 0.5", partial(Variational, sigma=0.5), autoencoder),
    "vae_bernoulli": (
        "the same, cross-entropy in place of the noise",
        partial(Variational, likelihood="bernoulli"),
        autoencoder,
    ),
    "iwae": ("variational autoencoder with five importance samples", partial(LearnedVAE, samples=5), autoencoder),
    "bn_vae": ("variational autoencoder with batch norm on the means", partial(LearnedVAE, gamma=0.7), autoencoder),
    "cvae": ("conditional VAE, told the label", Conditional, conditional),
    "gan": ("GAN: Wasserstein loss, R1 penalty", Adversarial, adversarial),
    "meg": ("MEG: the same with a bound of the entropy", partial(Adversarial, surrogate="jsd"), adversarial),
}


def recipe(member: str, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run.

    Raises:
        ValueError: for an unknown member or size.
    """
    check_known(member=(member, MEMBERS), size=(size, SIZES))
    _, make, _ = MEMBERS[member]
    numbers = dict(SIZES[size])
    epochs = numbers.pop("epochs") * (7 if data_name == "digits" else 1)  # so that as many batches are seen
    chosen = make(member=member, **numbers)
    if not isinstance(chosen, Trained):
        return chosen
    turns = 2 if isinstance(chosen, Adversarial) else 1  # every other step is the energy's
    return dataclasses.replace(chosen, epochs=turns * epochs)


@functools.cache
def images_of(data_name: str, rows: int, test: int) -> data.Images:
    """The images of a run: a fixed random part of training and test images, as floats in [0, 1].

    Args:
        data_name: of the data set.
        rows: training images, at most.
        test: test images, at most.
    """
    images, generator = data.load(data_name), stream(0, "data", IMAGES)

    def part(x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(x), generator=generator)[:n]
        return data.to_unit(x[chosen]), y[chosen]

    parts = (*part(images.x_train, images.y_train, rows), *part(images.x_test, images.y_test, test))
    return data.Images(images.name, *parts)


def fit(recipe: Recipe, x: Tensor, y: Tensor, seed: int) -> tuple[Member, Training]:
    """A member of the family, fitted to flat images x (n, D) with labels y, and what the fit was."""
    _, _, fitted = MEMBERS[recipe.member]
    return fitted(recipe, x, y, seed)


# ---- measures ----------------------------------------------------------------------------------------------------


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


Measured = tuple[dict[str, float], dict[str, Tensor]]  # by name: numbers, and flat images to look at


def measure(member: Member, images: data.Images, recipe: Recipe, seed: int) -> Measured:
    """Measures of a member on the test images, by name, and images to look at; seconds are the processor's."""
    values, pictures = {}, {}
    for of in (_reconstructions, _samples, _log_densities, _odd, _missing, _neighbours):
        more, rows = of(member, images, recipe, seed)
        values |= more
        pictures |= {name: flat[:32].unflatten(1, images.shape) for name, flat in rows.items()}
    return values, pictures


def _reconstructions(member: Member, images: data.Images, recipe: Recipe, seed: int) -> Measured:
    """Their squared error, and they beside the images."""
    if member.reconstruct is None:
        return {}, {}
    x = images.x_test.flatten(1)
    back = member.reconstruct(x, images.y_test)
    error = float((x - back).square().mean())
    return {"squared error a pixel": error}, {"test images": x, "reconstructions": back.clamp(0, 1)}


def _samples(member: Member, images: data.Images, recipe: Recipe, seed: int) -> Measured:
    """Fréchet distances of samples, own and of a density fitted to codes, and the samples."""
    features, generator = judge.classifier(data.load(images.name)).features, stream(seed, "samples")
    real, fitted = metrics.in_batches(features, images.x_test), member.fitted
    if member.decode is not None:
        x, y = images.x_train[: recipe.coded].flatten(1), images.y_train[: recipe.coded]
        density = codes_density(member.codes(x, y), recipe, seed, SAMPLED)
        fitted = lambda n, g: member.decode(density.sample(n, generator=g).float())  # noqa: E731
    values, pictures = {}, {}
    for name, picture, sample in (
        ("Fréchet, own", "samples", member.sample),
        ("Fréchet, fitted", "samples, fitted", fitted),
    ):
        if sample is not None:
            drawn = sample(len(images.x_test), generator).clamp(0, 1)
            fake = metrics.in_batches(features, drawn.unflatten(1, images.shape))
            values[name], pictures[picture] = metrics.frechet_distance(fake, real), drawn
    return values, pictures


def _noise(images: data.Images, recipe: Recipe) -> Tensor:
    """The noise on the flat test images, the same for all members and seeds."""
    return recipe.noise * torch.randn(images.x_test.flatten(1).shape, generator=stream(0, "data", TEST_NOISE))


def _log_densities(member: Member, images: data.Images, recipe: Recipe, seed: int) -> Measured:
    """Of noisy test images, and how certain they are."""
    if member.log_density is None:
        return {}, {}
    x = images.x_test.flatten(1)
    rows = [v[: recipe.density] for v in (x + _noise(images, recipe), x, images.y_test)]
    density = member.log_density(*rows, recipe.draws, stream(seed, "evaluation", DRAWS))
    values = {
        "log-density, nats": float(density.values.mean()),
        "log-density, standard error over images": float(density.values.std() / len(density.values) ** 0.5),
    }
    if density.doubled is not None:
        values["log-density, rise at the last doubling of draws"] = float(density.doubled.mean())
    if member.plain_density is not None:
        rows = [v[: recipe.probe] for v in rows]
        plain = member.plain_density(*rows, recipe.draws, stream(seed, "evaluation", DRAWS))  # by the same draws
        values["log-density, gain of a noise a pixel"] = float((density.values[: recipe.probe] - plain.values).mean())
    return values, {}


def _odd(member: Member, images: data.Images, recipe: Recipe, seed: int) -> Measured:
    """How well errors and densities tell odd images from usual ones, unless the member needs their labels."""
    if member.conditional:
        return {}, {}
    usual, labels = images.x_test[: recipe.probe], images.y_test[: recipe.probe]
    noise, generator = _noise(images, recipe)[: recipe.probe], stream(seed, "evaluation", ODD_DRAWS)
    draws = max(1, recipe.draws // 4)  # the order of the images is all that is asked
    scores = {}
    if member.reconstruct is not None:
        scores["error"] = lambda x: (x - member.reconstruct(x, labels)).square().mean(1)
    if member.log_density is not None:
        scores["density"] = lambda x: -member.log_density(x + noise, x, labels, draws, generator).values
    values = {}
    for name, score in scores.items():
        reference = score(usual.flatten(1))
        for kind, odd in odd_images(usual, labels, stream(0, "data", ODD)).items():
            both = torch.cat([reference, score(odd.flatten(1))])
            values[f"AUROC of the {name}, {kind}"] = metrics.detection(
                both, torch.arange(len(both)) >= len(usual)
            ).auroc
    return values, {}


def _missing(member: Member, images: data.Images, recipe: Recipe, seed: int) -> Measured:
    """The squared error of a pixel of the right half, given the left, and the images so filled in."""
    if member.fill is None:
        return {}, {}
    known = torch.zeros(images.shape, dtype=torch.bool)
    known[..., : images.shape[2] // 2] = True
    known, clean = known.flatten(), images.x_test[: recipe.probe].flatten(1)
    noisy = clean + _noise(images, recipe)[: recipe.probe]
    hidden = noisy.masked_fill(~known, math.nan)  # who looks there has no number to show
    filled = member.fill(hidden, known, images.y_test[: recipe.probe])
    error = float((filled - clean)[:, ~known].square().mean())
    return {"squared error of a missing pixel": error}, {
        "right half filled in": torch.where(known, clean, filled.float()).clamp(0, 1)
    }


def _neighbours(member: Member, images: data.Images, recipe: Recipe, seed: int) -> Measured:
    """How the codes of the test images keep their neighbours, and the time to find them."""
    if member.codes is None:
        return {}, {}
    x, clock = images.x_test.flatten(1), Clock(torch.device("cpu"))
    codes = member.codes(x, images.y_test)
    _, seconds = clock.seconds()
    return {"seconds, codes": seconds, "trustworthiness": metrics.trustworthiness(x, codes, recipe.neighbours)}, {}


# ---- the study ---------------------------------------------------------------------------------------------------


def run(recipe: Recipe, data_name: str, seed: int, _device: torch.device) -> Outcome:
    """Fit a member and measure it. All run on the CPU: half of them know no other device, and times are compared."""
    whole = data.load(data_name)
    judge.classifier(whole)  # if it cannot be had, one hears of it before the training
    images = images_of(data_name, recipe.rows, recipe.test)
    member, training = fit(recipe, images.x_train.flatten(1), images.y_train, seed)
    values, pictures = measure(member, images, recipe, seed)
    if training.rows:
        values["seconds, fit"] = training.processor_seconds
    figure = plots.image_panels(pictures, columns=8) if pictures else None
    return Outcome(values, training, figure=figure, classifier=judge.about(whole))


STUDIES: dict[str, Study] = {
    f"family_{name}": Study(
        f"the family on one data set: {about}", "family", ("mnist", "digits"), partial(recipe, name), run
    )
    for name, (about, _, _) in MEMBERS.items()
}
