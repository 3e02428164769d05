"""Likelihoods of VAEs on MNIST by the number of importance samples in the bound and by the size of the code.

Records ``vae_k...``, ``iwae_k...`` and ``vae_d...``. The recipe is that of Burda et al. (ICLR 2016): images binarised
anew at each step, two layers of 200 tanh units either side, 50 codes, likelihoods with 5,000 importance samples.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots
from gae_core.models.vae import IWAE, VAE
from gae_core.seeds import fresh, stream
from gae_core.studies import judge
from gae_core.studies.study import Outcome, Study, Trained
from gae_core.train import Training


@dataclass(frozen=True, kw_only=True)
class Recipe(Trained):
    """How a model is made, trained and measured.

    Attributes:
        samples: k of the bound; 1 is the VAE.
        dim: of the code.
        hidden: widths of the tanh layers either side.
        rows: training images, at most.
        few: importance samples of the likelihood for all test images.
        images: test images for which there are many more, and whose NLL is the curve of the training.
        many: as many.
        curve: importance samples of the curve.
    """

    samples: int = 1
    dim: int = 50
    hidden: tuple[int, ...] = (200, 200)
    rows: int = 60_000
    few: int = 50
    images: int = 500
    many: int = 5000
    curve: int = 50


# Epochs, rows of a batch and learning rate of the medium trainings, by k. A step costs about k decodings a row; they
# have equal numbers of steps, 24,000, with learning rates in proportion to the root of the batch.
MEDIUM = {1: (40, 100, 4e-3), 5: (20, 50, 2.8e-3), 50: (8, 20, 1.8e-3)}
BY_DIM = (8, 100, 4e-3)  # the same of those that differ in the size of the code


def recipe(samples: int, dim: int, medium: tuple[int, int, float], _data: str, size: str) -> Recipe:
    """The recipe of a recorded run."""
    given = {"samples": samples, "dim": dim}
    if size == "full":  # as published
        return Recipe(**given, epochs=500, batch_size=100, lr=1e-3, few=500, images=1000)
    if size == "short":
        return Recipe(**given, epochs=1, batch_size=100, lr=4e-3, rows=1000, few=10, images=20, many=50, curve=5)
    epochs, batch_size, lr = medium
    return Recipe(**given, epochs=epochs, batch_size=batch_size, lr=lr)


def build(recipe: Recipe, images: data.Images, seed: int) -> VAE:
    """A model with fresh weights that depend on ``seed`` alone, and with the mean training image in its last bias."""
    with fresh(seed):
        options = {"hidden": recipe.hidden, "heads": 2, "output": nn.Identity, "activation": nn.Tanh}
        pair = nets.mlp_pair(images.shape, recipe.dim, **options)
        if recipe.samples == 1:
            model = VAE(*pair, recipe.dim, binarise=True)
        else:
            model = IWAE(*pair, recipe.dim, binarise=True, samples=recipe.samples)
    mean = data.to_unit(images.x_train).mean(0).clamp(0.001, 0.999).flatten()
    with torch.no_grad():  # without it the first epochs go into learning where the background is
        model.decoder[0][-1].bias.copy_(mean.logit())
    return model


def binarised(x: Tensor) -> Tensor:
    """Binary images, drawn once with the grey values as means, the same for all models."""
    return torch.bernoulli(data.to_unit(x), generator=stream(0, "data"))


def nll(model: VAE, x: Tensor, recipe: Recipe, *, seed: int) -> dict[str, float]:
    r"""Importance-weighted -log p(x) of binary test images, in nats, and its standard error.

    Few samples S for all images, many for some of them, spread evenly:
    :math:`\bar\ell_S(\text{all}) + \overline{(\ell_{5000} - \ell_S)}(\text{some})`, which estimates the mean over all
    images with hardly any noise from the choice of some. The error is that of the second mean. "NLL by the posterior"
    is the same by the proposal of those who published figures to compare with; "fall on doubling" is of the many draws.
    """
    noise = stream(seed, "evaluation")
    some = torch.arange(0, len(x), max(1, len(x) // recipe.images))[: recipe.images]
    measured = {}
    for name, proposal in (("NLL", "mixture"), ("NLL by the posterior", "posterior")):
        estimate = functools.partial(metrics.importance_weighted_nll, model, proposal=proposal, generator=noise)
        whole = estimate(x, samples=recipe.few).nll
        tight = estimate(x[some], samples=recipe.many)
        gain = tight.nll - whole[some]
        measured[name] = float(whole.mean() + gain.mean())
        if name == "NLL":
            measured |= {
                "NLL, fall on doubling": float((tight.halved - tight.nll).mean()),
                "error of the correction": float(gain.std() / len(some) ** 0.5),
                "NLL, few samples": float(whole.mean()),
            }
    return measured


def measure(model: VAE, images: data.Images, recipe: Recipe, *, seed: int) -> dict[str, float]:
    """Figures on the test images, binarised once, the same for all models; in nats where they have a unit."""
    noise = stream(seed, "evaluation", 1)
    x = binarised(images.x_test)
    mu, logvar = metrics.in_batches(model.posterior, x)
    split = metrics.encoder_information(mu, logvar, generator=noise)
    elbo = metrics.importance_weighted_nll(model, x, samples=1, proposal="posterior", generator=noise).nll
    features = judge.classifier(images).features
    draws = stream(seed, "samples")
    fake = torch.cat([model.sample(1000, generator=draws).cpu() for _ in range(max(1, len(x) // 1000))])
    return {
        **nll(model, x, recipe, seed=seed),
        "negative ELBO": float(elbo.mean()),
        "KL": split.kl,
        "mutual information": split.mutual_information,
        "cap of the information": split.cap,
        "KL of the aggregate": split.kl_aggregate,
        "active units": float(metrics.active_units(mu)),
        "Fréchet, N(0, I)": metrics.frechet_distance(*(metrics.in_batches(features, v) for v in (fake, images.x_test))),
    }


def fit(
    model: VAE, images: data.Images, recipe: Recipe, *, seed: int, device: torch.device | str = "auto"
) -> tuple[Training, list[float]]:
    """Train by a recipe; returns the training and the NLL of some test images, after each epoch or every few."""
    x = binarised(images.x_test)[:: max(1, len(images.x_test) // recipe.images)]
    curve, every = [], max(1, recipe.epochs // 40)

    def look(model: nn.Module, epoch: int) -> None:
        if epoch % every == 0:
            noise = stream(0, "data", 1)  # the same at each look, and for all models
            estimate = metrics.importance_weighted_nll(model, x, samples=recipe.curve, generator=noise)
            curve.append(float(estimate.nll.mean()))

    training = recipe.fit(model, images.x_train[: recipe.rows], seed=seed, device=device, callback=look)
    return training, curve


def run(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train and measure one model."""
    images = data.load(data_name)
    judge.classifier(images)  # if it cannot be had, one hears of it before the training
    model = build(recipe, images, seed)
    training, curve = fit(model, images, recipe, seed=seed, device=device)
    draws = model.sample(64, generator=stream(seed, "samples", 1)).cpu()
    return Outcome(
        measure(model, images, recipe, seed=seed),
        training,
        curves={"NLL of some test images": curve},
        figure=plots.image_panels({"means of p(x | z), z from N(0, I)": draws}, columns=16, size=6),
        classifier=judge.about(images),
    )


def _study(about: str, samples: int, dim: int, medium: tuple[int, int, float]) -> Study:
    return Study(about, "vae", ("mnist", "digits"), functools.partial(recipe, samples, dim, medium), run)


STUDIES: dict[str, Study] = {
    **{
        f"{'vae' if k == 1 else 'iwae'}_k{k}": _study(
            f"likelihood of an MLP trained on the bound with k = {k}", k, 50, medium
        )
        for k, medium in MEDIUM.items()
    },
    **{f"vae_d{d}": _study(f"VAE with {d} codes", 1, d, BY_DIM) for d in (2, 10, 50, 200)},
}
