"""Denoising autoencoders on binary images, with and without walkback: their samples and how their chains mix.

Records ``dae_...``.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gae_core import data, metrics, nets, plots
from gae_core.models.denoising import DenoisingAutoencoder, salt_and_pepper
from gae_core.seeds import fresh, stream
from gae_core.studies import judge
from gae_core.studies.study import Outcome, Study, Trained, check_known

TOPIC = "denoising"
DATA = ("mnist", "digits")
VARIANTS = {  # steps of walkback; how many times as many epochs
    "dae_walkback1": (1, 1, "denoising autoencoder without walkback"),
    "dae_walkback1_long": (1, 5, "the same for as many network evaluations as with five steps of walkback"),
    "dae_walkback5": (5, 1, "denoising autoencoder with five steps of walkback"),
}
SIZES = {  # width of the hidden layer; epochs; chains, their burn-in, their steps, and which of these give images
    "short": (32, 1, 20, 10, 60, 10),
    "medium": (1000, 4, 100, 200, 1000, 10),
    "full": (2000, 100, 1000, 1000, 1000, 100),
}


@dataclass(frozen=True, kw_only=True)
class Recipe(Trained):
    """How a denoising autoencoder is made and trained, and how long its chains are.

    Attributes:
        hidden: width of the one hidden layer, which is the code.
        walkback: steps of the walk in training, 1 without walkback.
        level: share of the pixels that are replaced by a coin's 0 or 1.
        threshold: grey value above which a pixel is 1.
        chains: number of chains; they start at the first test images.
        burn_in: steps before the first that counts.
        steps: steps that count.
        every: which of these give the images that are compared with data.
        held: training images on which the width of the Parzen estimate is chosen.
        widths: among which it is chosen.
    """

    batch_size: int = 100
    hidden: int
    walkback: int
    level: float = 0.4
    threshold: float = 0.5
    chains: int
    burn_in: int
    steps: int
    every: int
    held: int = 1000
    widths: tuple[float, ...] = (0.15, 0.2, 0.25, 0.3)

    def settings(self) -> dict[str, Any]:
        """The fields, as a record keeps them."""
        return {{"level": "salt and pepper"}.get(key, key): value for key, value in super().settings().items()}


def recipe(name: str, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run.

    Raises:
        ValueError: for an unknown name or size.
    """
    check_known(name=(name, VARIANTS), size=(size, SIZES))
    walkback, times, _ = VARIANTS[name]
    hidden, epochs, chains, burn_in, steps, every = SIZES[size]
    return Recipe(
        epochs=times * epochs,
        walkback=walkback,
        hidden=hidden,
        chains=chains,
        burn_in=burn_in,
        steps=steps,
        every=every,
    )


def binary(x: Tensor, threshold: float = 0.5) -> Tensor:
    """Images with the entries 0 and 1, at a threshold of their grey values in [0, 1]."""
    return (data.to_unit(x) > threshold).float()


def build(recipe: Recipe, shape: Sequence[int], seed: int) -> DenoisingAutoencoder:
    """The network of all runs, with one hidden layer; its fresh weights depend on ``seed`` alone."""
    with fresh(seed):
        encoder, decoder = nets.mlp_pair(shape, recipe.hidden, hidden=(), output=nn.Identity)
    return DenoisingAutoencoder(
        nn.Sequential(encoder, nn.ReLU()),
        decoder,
        recipe.hidden,
        corruption=salt_and_pepper(recipe.level),
        walkback=recipe.walkback,
    )


@dataclass(frozen=True)
class Walk:
    """What chains did, all on the CPU.

    Attributes:
        labels: class of the mean of P at each step that counts, (steps, chains).
        confidence: the judge's belief in it, (steps, chains).
        means: means of P at every so many of these steps, (steps / every, chains, ...).
        samples: samples of P at the same.
        course: what five chains start from and at most 19 later means of theirs, the burn-in included, (<= 20, 5, ...).
    """

    labels: Tensor
    confidence: Tensor
    means: Tensor
    samples: Tensor
    course: Tensor


def follow(
    model: DenoisingAutoencoder, first: Tensor, classifier: nn.Module, recipe: Recipe, *, generator: Generator
) -> Walk:
    """Run chains from ``first`` (chains, ...): the burn-in, of which nothing counts, and then the steps that do."""
    state, course = first, [first[:5]]
    beliefs, means_kept, samples_kept = [], [], []
    for step in range(-recipe.burn_in, recipe.steps):
        means, state = (part[0] for part in model.chain(state, 1, generator=generator))
        if len(course) < 20 and (step + recipe.burn_in) % recipe.every == 0:
            course.append(means[:5])
        if step >= 0:
            beliefs.append(metrics.in_batches(classifier, means).softmax(1).max(1))
            if (step + 1) % recipe.every == 0:
                means_kept.append(means.cpu())
                samples_kept.append(state.cpu())
    confidence, labels = (torch.stack(part).cpu() for part in zip(*beliefs, strict=True))
    return Walk(labels, confidence, torch.stack(means_kept), torch.stack(samples_kept), torch.stack(course).cpu())


def measure(
    recipe: Recipe, model: DenoisingAutoencoder, walk: Walk, images: data.Images, classifier: nn.Module, *, seed: int
) -> dict[str, float]:
    """The metrics of a trained model and its chains on held-out data, and beside them those of training images.

    Args:
        recipe: of the run.
        model: trained, in evaluation mode.
        walk: what its chains did.
        images: data.
        classifier: of these images.
        seed: of the corruption and of the choice of training images, as many as the chains gave.
    """
    device = next(model.parameters()).device
    noise = stream(seed, "evaluation", device=device)
    x_test = binary(images.x_test, recipe.threshold)
    with torch.no_grad():
        losses = [model.loss(rows.to(device), generator=noise).first for rows in x_test.split(1000)]
    means, samples = walk.means.flatten(0, 1), walk.samples.flatten(0, 1)
    shuffled = images.x_train[torch.randperm(len(images.x_train), generator=stream(seed, "data"))]
    held, real = (data.to_unit(x) for x in (shuffled[-recipe.held :], shuffled[: len(means)]))
    test = data.to_unit(images.x_test)
    of_test, of_binary = (metrics.in_batches(classifier.features, x) for x in (test, x_test))

    def distance(x: Tensor, features: Tensor) -> float:
        return metrics.frechet_distance(metrics.in_batches(classifier.features, x), features)

    def confident(x: Tensor) -> float:
        return 100 * float((metrics.in_batches(classifier, x).softmax(1).amax(1) > 0.9).double().mean())

    def parzen(x: Tensor) -> float:
        estimate = functools.partial(metrics.parzen_log_likelihood, x)
        width = max(recipe.widths, key=lambda width: float(estimate(held, width=width).mean()))
        return float(estimate(test[:1000], width=width).mean())

    mixing = metrics.mixing(walk.labels, int(images.y_train.max()) + 1)
    return {
        "Fréchet, means": distance(means, of_test),
        "Fréchet, means: training images": distance(real, of_test),
        "Fréchet, samples": distance(samples, of_binary),
        "Fréchet, samples: training images": distance(binary(real, recipe.threshold), of_binary),
        "confident, %": 100 * float((walk.confidence > 0.9).double().mean()),
        "confident, %: training images": confident(real),
        "label entropy": mixing.entropy,
        "ESS of the label in 1,000 steps": mixing.ess,
        "steps until the label changes": mixing.stay,
        "denoising loss": float(torch.cat(losses).mean()),
        "Parzen": parzen(means),
        "Parzen: training images": parzen(real),
    }


def run(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train a network, run its chains and measure both."""
    images = data.load(data_name)
    classifier = judge.classifier(images).to(device)  # if it cannot be had, one hears of it before the training
    model = build(recipe, images.shape, seed)
    training = recipe.fit(model, binary(images.x_train, recipe.threshold), seed=seed, device=device)
    first = binary(images.x_test[: recipe.chains], recipe.threshold).to(device)
    walk = follow(model, first, classifier, recipe, generator=stream(seed, "samples", device=device))
    course = walk.course.transpose(0, 1).flatten(0, 1)
    title = f"means of P, every {recipe.every} steps"
    return Outcome(
        measure(recipe, model, walk, images, classifier, seed=seed),
        training,
        figure=plots.image_panels({title: course}, columns=len(walk.course), size=8),
        classifier=judge.about(images),
    )


STUDIES = {
    name: Study(about, TOPIC, DATA, functools.partial(recipe, name), run) for name, (_, _, about) in VARIANTS.items()
}
