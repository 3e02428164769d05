"""Missing quadrants of binary images: a conditional VAE and a network without a code. Records ``completion_...``."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gae_core import data, nets
from gae_core.metrics import importance_weighted_nll
from gae_core.models.cvae import CVAE, Beside, FactorisedNet, quadrant_mask
from gae_core.seeds import fresh, seed_of, stream
from gae_core.studies.study import Outcome, Study, Trained, together
from gae_core.train import Training

TOPIC = "cvae"
DATA = ("mnist", "digits")
OBSERVED = {  # quadrants, by their number; the task is harder the fewer there are
    1: ("bottom left",),
    2: ("bottom left", "top left"),
    3: ("bottom left", "top left", "top right"),
}
SIZES = {  # epochs without a code and with one; test images, and samples for each
    "short": (1, 1, 100, 10),
    "medium": (8, 8, 1000, 100),
    "full": (30, 100, 10_000, 1000),
}


@dataclass(frozen=True, kw_only=True)
class Recipe(Trained):
    """How two networks are made and trained; the fields of a training are those of the one with a code.

    Attributes:
        without_code: training of the network without a code.
        observed: quadrants that are observed.
        width: of the two hidden layers of each network.
        dim: of the code.
        threshold: grey value above which a pixel is 1.
        held_back: share of the training images on which is chosen when to stop.
        test_images: the first of them are measured.
        samples: codes for each of these.
    """

    lr: float = 1e-3
    without_code: Trained
    observed: tuple[str, ...]
    width: int = 500
    dim: int = 50
    threshold: float = 0.5
    held_back: float = 0.1
    test_images: int
    samples: int

    def settings(self) -> dict[str, Any]:
        """The fields, as a record keeps them."""
        names = {"without_code": "without a code", "test_images": "test images"}
        return {names.get(key, key): value for key, value in super().settings().items()}


def recipe(quadrants: int, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run.

    Raises:
        ValueError: for an unknown number of quadrants or size.
    """
    if quadrants not in OBSERVED:
        raise ValueError(f"quadrants must be one of {', '.join(map(str, OBSERVED))}, got {quadrants!r}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    epochs_without, epochs, test_images, samples = SIZES[size]
    return Recipe(
        epochs=epochs,
        without_code=Trained(epochs=epochs_without, lr=1e-3, schedule="constant"),
        observed=OBSERVED[quadrants],
        test_images=test_images,
        samples=samples,
    )


def halves(x: Tensor, mask: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Binary pixels: those to be completed (n, missing), and those observed (n, observed)."""
    binary = (data.to_unit(x).flatten(1) > threshold).float()
    return binary[:, ~mask.flatten()], binary[:, mask.flatten()]


def build(recipe: Recipe, shape: Sequence[int], seed: int) -> tuple[FactorisedNet, CVAE]:
    """The network without a code and the conditional VAE, with a prior network; weights depend on ``seed`` alone."""
    mask = quadrant_mask(*shape[1:], recipe.observed)
    observed, missing = int(mask.sum()), int((~mask).sum())
    hidden, dim = (recipe.width, recipe.width), recipe.dim
    with fresh(seed):
        plain = FactorisedNet(nets.mlp([observed, *hidden, missing]))
        encoder = Beside(nets.mlp([observed + missing, *hidden, 2 * dim]))
        decoder = Beside(nets.mlp([dim + observed, *hidden, missing]))
        return plain, CVAE(encoder, decoder, dim, prior=nets.mlp([observed, *hidden, 2 * dim]))


def fit_and_stop(
    network: nn.Module,
    training: Trained,
    x: Tensor,
    y: Tensor,
    *,
    held: int,
    seed: int,
    device: torch.device,
) -> tuple[Training, list[float]]:
    """Train a network, and leave it with the weights of the epoch after which its loss on held-back rows is least.

    Args:
        network: that is trained in place.
        training: its recipe.
        x: what is predicted, (n, missing).
        y: from what, (n, observed).
        held: number of the last rows, which are held back.
        seed: of the training.
        device: where it is.

    Returns:
        What the training was, and the loss on the rows held back after each epoch.
    """
    losses, best = [], {}

    def keep_the_best(network: nn.Module, epoch: int) -> None:
        noise = stream(0, "data", device=device)  # the same after each epoch
        batches = zip(x[-held:].split(1000), y[-held:].split(1000), strict=True)
        with torch.no_grad():
            parts = [network.loss(a.to(device), b.to(device), generator=noise).total for a, b in batches]
        losses.append(float(torch.cat(parts).mean()))
        if losses[-1] == min(losses):
            best.update({key: value.clone() for key, value in network.state_dict().items()})

    done = training.fit(network, x[:-held], y[:-held], seed=seed, device=device, callback=keep_the_best)
    network.load_state_dict(best)
    return done, losses


def run(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train both networks and measure the likelihoods that they give to missing pixels."""
    images = data.load(data_name)
    mask = quadrant_mask(*images.shape[1:], recipe.observed)
    x, y = halves(images.x_train, mask, recipe.threshold)
    x_test, y_test = halves(images.x_test[: recipe.test_images], mask, recipe.threshold)
    plain, model = build(recipe, images.shape, seed)
    trainings, curves = {}, {}
    for k, (kind, network, its_recipe) in enumerate((("plain", plain, recipe.without_code), ("cvae", model, recipe))):
        trainings[kind], curves[f"held-back loss, {kind}"] = fit_and_stop(
            network,
            its_recipe,
            *(x, y),
            held=int(recipe.held_back * len(x)),
            seed=seed_of(seed, "order", k),  # two trainings, neither with the other's order and noise
            device=device,
        )
    with torch.no_grad():
        without = float(plain.cpu().loss(x_test, y_test).total.mean())
    noise = stream(seed, "evaluation")
    nll = functools.partial(importance_weighted_nll, model.cpu(), x_test, y_test, generator=noise)
    weighted = float(nll(samples=recipe.samples, proposal="posterior").nll.mean())
    return Outcome(
        {
            "NLL without a code": without,
            "NLL, importance weighted": weighted,
            "negative bound": float(nll(samples=1, proposal="posterior").nll.mean()),
            "NLL, by draws from the prior": float(nll(samples=recipe.samples, proposal="prior").nll.mean()),
            "gain of the code": without - weighted,
        },
        together([trainings["cvae"], trainings["plain"]]),
        curves=curves,
    )


STUDIES = {
    f"completion_{quadrants}": Study(
        f"the other quadrants of an image, given {quadrants}", TOPIC, DATA, functools.partial(recipe, quadrants), run
    )
    for quadrants in OBSERVED
}
