"""Maximum-entropy generators on digits: classes of stacked ones are counted, and one that was left out is found."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots
from gae_core.energy import gradient_penalty_r1
from gae_core.models.meg import MEG
from gae_core.seeds import fresh, seed_of, stream
from gae_core.studies import judge
from gae_core.studies.meg_plane import AHEAD, TOPIC, Game, judge_net
from gae_core.studies.study import Outcome, Study, check_known


@dataclass(frozen=True, kw_only=True)
class Recipe(Game):
    """How a game on images is made, trained and measured.

    Attributes:
        channels: of the first convolution; 0 for perceptrons.
        side: of the images; those of 28 × 28 are halved for 16.
        digits: stacked as the channels of one image.
        per_class: samples for each class of stacks, and as many stacked test images.
        compared: samples, and stacked test images, between which the Fréchet distance is taken.
        held_out: digit that the training does not see, of a study without stacks.
        parts: one of so many of the other digits' images is for the test.
    """

    channels: int = 0
    side: int
    digits: int = 1
    per_class: int = 26
    compared: int = 2000
    held_out: int | None = None
    parts: int = 5


SIZES = {  # with the digits of a stack; a class of them has 128 training images
    "short": Recipe(
        width=16, rows=128, epochs=1, batch_size=64, lr=1e-3, steps=(1, 3), dim=8, lam=1.0, side=16, digits=2
    ),
    "medium": Recipe(
        width=128, rows=12_800, epochs=40, batch_size=64, lr=1e-3, steps=(1, 1), dim=16, lam=1.0, side=16, digits=2
    ),
    "full": Recipe(  # the authors' 100,000 rounds, and their weight, for pixels in [0, 1]
        width=512,
        channels=64,
        rows=128_000,
        epochs=300,
        batch_size=64,
        lr=1e-4,
        schedule="constant",
        steps=(5, 1),
        dim=128,
        lam=0.0032,
        side=28,
        digits=3,
    ),
}
STACKED: dict[str, tuple[str, dict]] = {  # what each is, and what its recipe has of its own
    "meg_stacked": ("MEG, JSD surrogate", {}),
    "meg_stacked_plain": ("the same GAN without the entropy", {"surrogate": None}),
    "meg_stacked_plain_ahead": ("the same, the energy five steps ahead", {"surrogate": None, **AHEAD}),
    "meg_stacked_wgan_gp": ("WGAN-GP", {"penalty": "wgan", "surrogate": None, "lam": 10.0, **AHEAD}),
}
HELD_OUT = {f"meg_without_{digit}": {"digits": 1, "held_out": digit} for digit in (1, 9)}


def recipe(name: str, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run.

    Raises:
        ValueError: for an unknown name or size.
    """
    changes = {name: changes for name, (_, changes) in STACKED.items()} | HELD_OUT
    check_known(name=(name, changes), size=(size, SIZES))
    side = 8 if data_name == "digits" else SIZES[size].side
    return replace(SIZES[size], **changes[name], side=side)


def build(recipe: Recipe, shape: Sequence[int], seed: int) -> MEG:
    """A model for images in [0, 1], with fresh weights that depend on ``seed`` alone."""
    pixels, width, shape = math.prod(shape), recipe.width, tuple(shape)
    sizes = recipe.statistics(pixels)
    with fresh(seed):
        if recipe.channels:
            energy = nets.conv_pair(shape, 1, channels=recipe.channels)[0]
            generator = nets.conv_pair(shape, recipe.dim, channels=recipe.channels)[1]
        else:
            layers = nets.mlp([recipe.dim, width, width, pixels])
            generator = nn.Sequential(layers, nn.Sigmoid(), nn.Unflatten(1, shape))
            energy = nn.Sequential(nn.Flatten(), judge_net(pixels, 1, width))
        statistics = nn.Sequential(nn.Flatten(), judge_net(*sizes, width)) if sizes else None
    return recipe.model(generator, energy, statistics)


@functools.cache
def small(name: str, side: int) -> data.Images:
    """Images of a side: those of MNIST are halved, with a margin, to 16 × 16.

    Raises:
        ValueError: for a side that they cannot have.
    """
    images = data.load(name)
    if images.shape[1] == side:
        return images
    if (images.shape[1], side) != (28, 16):
        raise ValueError(f"side must be {images.shape[1]} for {name}, or 16 for images of 28 × 28, got {side}")

    def half(x: Tensor) -> Tensor:
        return nn.functional.pad(nn.functional.avg_pool2d(x.float(), 2), (1, 1, 1, 1)).round().byte()

    return data.Images(f"{name}_16", half(images.x_train), images.y_train, half(images.x_test), images.y_test)


def run_stacked(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train on stacked digits, and count the classes that the classifier of single digits sees in samples."""
    images, classes = small(data_name, recipe.side), 10**recipe.digits
    one_digit = judge.classifier(images)  # if it cannot be had, one hears of it before the training
    n = recipe.per_class * classes
    stacked = data.stack(images, recipe.digits, train=recipe.rows, test=n, seed=seed_of(seed, "data"))
    model = build(recipe, stacked.shape, seed)
    training = recipe.fit(model, stacked.x_train, seed=seed, device=device)
    one_digit = one_digit.to(device)

    def label(x: Tensor) -> Tensor:
        channels = [metrics.in_batches(one_digit, x[:, i : i + 1]).argmax(1) for i in range(recipe.digits)]
        return functools.reduce(lambda label, digit: 10 * label + digit, channels)

    generator = stream(seed, "samples")
    sample = torch.cat([model.sample(min(1000, n - i), generator=generator).cpu() for i in range(0, n, 1000)])
    uniform = torch.ones(classes)
    count, of_test = (metrics.mode_count(label(x), uniform) for x in (sample, stacked.x_test))
    single = metrics.in_batches(one_digit, images.x_test).argmax(1)
    features = [metrics.in_batches(one_digit.features, x[: recipe.compared, :1]) for x in (sample, stacked.x_test)]
    measured = {
        f"modes of {classes:,}": count.modes,
        "KL from equal shares": count.kl,
        "KL, stacked test images": of_test.kl,
        "KL, bias": count.floor,
        "Fréchet, first digit": metrics.frechet_distance(*features),
        "classifier right, %": 100 * float((single == images.y_test).double().mean()),
    }
    panels = {f"digit {i + 1}": sample[:64, i : i + 1] for i in range(recipe.digits)}
    return Outcome(measured, training, figure=plots.image_panels(panels, columns=8), classifier=judge.about(images))


def split(images: data.Images, recipe: Recipe, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training images without the digit; test images, a part of the others and all of the digit; which are anomalies.

    The test set is that of the authors' code.
    """
    x, y = torch.cat([images.x_train, images.x_test]), torch.cat([images.y_train, images.y_test])
    normal = x[y != recipe.held_out]
    normal = normal[torch.randperm(len(normal), generator=stream(seed, "data"))]
    part = len(normal) // recipe.parts
    test = data.to_unit(torch.cat([normal[:part], x[y == recipe.held_out]]))
    return normal[part:][: recipe.rows], test, torch.arange(len(test)) >= part


def run_held_out(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train without one digit, then tell it from held-out others by the energy and by its slope."""
    rows, test, anomaly = split(small(data_name, recipe.side), recipe, seed)
    model = build(recipe, rows.shape[1:], seed)
    training = recipe.fit(model, rows, seed=seed, device=device)
    model.requires_grad_(False)  # the slope is taken in x alone
    batches = [batch.to(device) for batch in test.split(1000)]
    scores = {
        "energy": torch.cat([model.energy_of(batch) for batch in batches]).cpu(),
        "slope²": torch.cat([gradient_penalty_r1(model.energy_of, batch).detach() for batch in batches]).cpu(),
    }
    measured = {}
    for name, score in scores.items():
        detection = metrics.detection(score, anomaly)
        measured |= {f"AUROC, {name}": detection.auroc, f"AUPRC, {name}": detection.auprc}
    measured |= {"prevalence": detection.prevalence, "least AUPRC": detection.least}
    panels = {"samples": model.sample(64, generator=stream(seed, "samples")), "data": rows[:64]}
    return Outcome(measured, training, figure=plots.image_panels(panels, columns=8))


STUDIES: dict[str, Study] = {
    **{
        name: Study(f"stacked digits: {about}", TOPIC, ("mnist",), functools.partial(recipe, name), run_stacked)
        for name, (about, _) in STACKED.items()
    },
    **{
        name: Study(
            f"MEG trained without the digit {changes['held_out']}, which is then to be found",
            TOPIC,
            ("mnist", "digits"),
            functools.partial(recipe, name),
            run_held_out,
        )
        for name, changes in HELD_OUT.items()
    },
}
