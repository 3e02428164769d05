"""Denoising autoencoders on binary images, with and without walkback: their samples and how their chains mix.

Records ``dae_...``.
"""

import functools
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots, train
from gae_core.chains import effective_sample_size
from gae_core.models.denoising import DenoisingAutoencoder, salt_and_pepper
from gae_core.records import Outcome, Study
from gae_core.studies.judge import classifier

LEVEL = 0.4  # of the salt and pepper
RECIPE = {"batch_size": 100, "lr": 2e-3}
WIDTHS = (0.15, 0.2, 0.25, 0.3)  # of the Parzen estimate, chosen on training images


@dataclass(frozen=True)
class Size:
    """How long a run is.

    Attributes:
        hidden: width of the one hidden layer, which is the code.
        epochs: passes over the data; the long run without walkback has five times as many.
        chains: number of chains; they start at the first test images.
        burn_in: steps before the first that counts.
        steps: steps that count.
        every: which of these give the images that are compared with data.
    """

    hidden: int
    epochs: int
    chains: int
    burn_in: int
    steps: int
    every: int


SIZES = {
    "short": Size(32, 1, 20, 10, 60, 10),
    "medium": Size(1000, 4, 100, 200, 1000, 10),
    "full": Size(2000, 100, 1000, 1000, 1000, 100),
}
LONG = 5  # times as many epochs for the run that has as many network evaluations as five steps of walkback


@dataclass(frozen=True)
class Mixing:
    """How the labels of chains change.

    Attributes:
        ess: independent labels that a thousand steps of a chain are worth, 1000 for independent draws.
        stay: mean number of steps that a label stays; all steps, if none changes.
        entropy: of the shares of the labels in nats; log K for equal shares of K classes.
    """

    ess: float
    stay: float
    entropy: float


def mixing(labels: Tensor, classes: int) -> Mixing:
    r"""How fast chains forget their label.

    .. math:: \frac{1000}{K} \sum_k \frac{\mathrm{ESS}_k}{M n}

    Implements ``def-denoising-mixing``: ESS_k is that of the indicator of class k over M chains of n steps
    (``def-latent_mcmc-ess``), and 0 where no chain enters or leaves the class.

    Args:
        labels: classes 0..classes-1, (n >= 8, chains).
        classes: their number K.

    Raises:
        ValueError: for another shape, or labels out of range.
    """
    if labels.ndim != 2 or len(labels) < 8 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be (n >= 8, chains), from 0 to {classes - 1}, got {tuple(labels.shape)} "
            f"from {int(labels.min())} to {int(labels.max())}"
        )
    n, chains = labels.shape
    one_hot = nn.functional.one_hot(labels.long(), classes).double()  # (n, chains, classes)
    moves = one_hot.diff(dim=0).abs().sum(1)  # (n - 1, classes)
    half = n // 2
    seen = (moves[: half - 1].sum(0) > 0) | (moves[n - half :].sum(0) > 0)  # within a half of some chain
    ess = effective_sample_size(one_hot[..., seen]).sum() if seen.any() else torch.tensor(0.0)
    shares = one_hot.mean((0, 1))
    return Mixing(
        ess=float(1000 * ess / (chains * n * classes)),
        stay=(n - 1) * chains / max(1.0, float(moves.sum() / 2)),
        entropy=float(torch.special.entr(shares).sum()),
    )


def binary(x: Tensor) -> Tensor:
    """Images with the entries 0 and 1, at the threshold of one half."""
    return (data.to_unit(x) > 0.5).float()


def build(shape: tuple[int, ...], hidden: int, walkback: int, seed: int) -> DenoisingAutoencoder:
    """The network of all runs, with fresh weights: one hidden layer."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder, decoder = nets.mlp_pair(shape, hidden, hidden=(), output=nn.Identity)
        encoder = nn.Sequential(encoder, nn.ReLU())
        return DenoisingAutoencoder(encoder, decoder, hidden, corruption=salt_and_pepper(LEVEL), walkback=walkback)


@dataclass(frozen=True)
class Walk:
    """What chains did, all on the CPU.

    Attributes:
        labels: class of the mean of P at each step that counts, (steps, chains).
        confidence: the judge's belief in it, (steps, chains).
        means: means of P at every so many of these steps, (steps / every, chains, ...).
        samples: samples of P at the same.
        shown: what five chains start from and at most 19 later means of theirs, the burn-in included, (<= 20, 5, ...).
    """

    labels: Tensor
    confidence: Tensor
    means: Tensor
    samples: Tensor
    shown: Tensor


def follow(
    model: DenoisingAutoencoder, first: Tensor, judge: nn.Module, size: Size, *, generator: torch.Generator
) -> Walk:
    """Run chains from ``first`` (chains, ...): the burn-in, of which nothing counts, and then the steps that do."""
    state, shown = first, [first[:5]]
    found, kept = [], {"means": [], "samples": []}
    for step in range(-size.burn_in, size.steps):
        means, state = (part[0] for part in model.chain(state, 1, generator=generator))
        if len(shown) < 20 and (step + size.burn_in) % size.every == 0:
            shown.append(means[:5])
        if step >= 0:
            found.append(metrics.in_batches(judge, means).softmax(1).max(1))
            if (step + 1) % size.every == 0:
                for key, value in (("means", means), ("samples", state)):
                    kept[key].append(value.cpu())
    confidence, labels = (torch.stack(part).cpu() for part in zip(*found, strict=True))
    return Walk(labels, confidence, *(torch.stack(part) for part in kept.values()), torch.stack(shown).cpu())


def _run(name: str, size: str, seed: int, device: torch.device, *, walkback: int, times: int) -> Outcome:
    images, recipe = data.load(name), SIZES[size]
    x, x_test = binary(images.x_train), binary(images.x_test)
    model, epochs = build(images.shape, recipe.hidden, walkback, seed), times * recipe.epochs
    start = time.perf_counter()
    options = {"schedule": lambda t: 1 - t, "seed": seed, "device": device, "progress": False}
    train.fit(model, x, epochs=epochs, **RECIPE, **options)
    seconds = time.perf_counter() - start

    noise = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        parts = [model.loss(rows.to(device), generator=noise).first for rows in x_test.split(1000)]
    judge = classifier(images).to(device)
    walk = follow(model, x_test[: recipe.chains].to(device), judge, recipe, generator=noise)
    how = mixing(walk.labels, int(images.y_train.max()) + 1)

    means, drawn = walk.means.flatten(0, 1), walk.samples.flatten(0, 1)
    real = images.x_train[torch.randperm(len(images.x_train), generator=torch.Generator().manual_seed(seed))]
    held, real = data.to_unit(real[-1000:]), data.to_unit(real[: len(means)])  # as many as there are of the chains
    test = data.to_unit(images.x_test)
    of_test, of_binary = (metrics.in_batches(judge.features, v) for v in (test, x_test))

    def distance(x: Tensor, other: Tensor) -> float:
        return metrics.frechet_distance(metrics.in_batches(judge.features, x), other)

    def confident(x: Tensor) -> float:
        return 100 * float((metrics.in_batches(judge, x).softmax(1).amax(1) > 0.9).double().mean())

    def parzen(x: Tensor) -> float:
        fit = functools.partial(metrics.parzen_log_likelihood, x)
        width = max(WIDTHS, key=lambda width: float(fit(held, width=width).mean()))
        return float(fit(test[:1000], width=width).mean())

    shown = walk.shown.transpose(0, 1).flatten(0, 1)
    return Outcome(
        metrics={
            "Fréchet, means": distance(means, of_test),
            "Fréchet, means: training images": distance(real, of_test),
            "Fréchet, samples": distance(drawn, of_binary),
            "Fréchet, samples: training images": distance(binary(real), of_binary),
            "confident, %": 100 * float((walk.confidence > 0.9).double().mean()),
            "confident, %: training images": confident(real),
            "label entropy": how.entropy,
            "ESS of the label in 1,000 steps": how.ess,
            "steps until the label changes": how.stay,
            "denoising loss": float(torch.cat(parts).mean()),
            "Parzen": parzen(means),
            "Parzen: training images": parzen(real),
        },
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=epochs * (len(x) // RECIPE["batch_size"]) * RECIPE["batch_size"],
        figure=plots.image_panels({f"means of P, every {recipe.every} steps": shown}, columns=len(walk.shown), size=8),
    )


def _settings(_data: str, size: str, *, walkback: int, times: int) -> dict:
    recipe = SIZES[size]
    return {
        **vars(recipe),
        **RECIPE,
        "epochs": times * recipe.epochs,
        "walkback": walkback,
        "salt and pepper": LEVEL,
        "binary": "grey above one half",
        "widths": list(WIDTHS),
    }


STUDIES = {
    name: Study(
        about,
        ("mnist", "digits"),
        functools.partial(_settings, walkback=walkback, times=times),
        functools.partial(_run, walkback=walkback, times=times),
        judged=data.load,
    )
    for name, walkback, times, about in (
        ("dae_walkback1", 1, 1, "denoising autoencoder without walkback"),
        ("dae_walkback1_long", 1, LONG, "the same for as many network evaluations as with five steps of walkback"),
        ("dae_walkback5", 5, 1, "denoising autoencoder with five steps of walkback"),
    )
}
