"""Posterior collapse on small binary images, and norms of the posterior against it: records ``bn_vae_...``.

The decoder sees the pixels before; see :class:`gae_core.models.bn_vae.PixelDecoder`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional as F

from gae_core import data, metrics, nets, plots
from gae_core.models.bn_vae import AutoregressiveVAE, PixelDecoder
from gae_core.normalization import CoupledBatchNorm, FixedScaleBatchNorm, FixedScaleLayerNorm
from gae_core.seeds import fresh, stream
from gae_core.studies import study
from gae_core.studies.study import Outcome, Study, Trained, together

DATA = ("mnist", "digits")
NORMS = {"batch": FixedScaleBatchNorm, "layer": FixedScaleLayerNorm, "coupled": CoupledBatchNorm}


@dataclass(frozen=True, kw_only=True)
class Recipe(Trained):
    """How a model is made, trained and measured.

    Attributes:
        norm: of the posterior's parameters, one of ``NORMS``, or None.
        gamma: of the norms on mu.
        tau: of the coupled norm.
        beta: weight of the divergence.
        dim: of the code.
        hidden: width of the encoder's layer.
        rows: training images, at most.
        test: test images, at most.
        images: those of them whose likelihood is estimated.
        samples: importance samples of the likelihood.
    """

    norm: str | None = None
    gamma: float | None = None
    tau: float | None = None
    beta: float = 1.0
    dim: int = 16
    hidden: int = 256
    rows: int = 60_000
    test: int = 5000
    images: int = 500
    samples: int = 256


SIZES = {
    "short": {"epochs": 1, "rows": 1280, "test": 500, "images": 50, "samples": 8},
    "medium": {"epochs": 2},
    "full": {"epochs": 20, "test": 50_000, "images": 5000, "samples": 512},
}


def recipe(options: dict, _data: str, size: str) -> Recipe:
    """The recipe of a recorded run, from what sets it apart."""
    return Recipe(**{**SIZES[size], **options})


def binary_images(images: data.Images) -> tuple[Tensor, Tensor]:
    """Training and test images, black and white: each pixel is drawn once and for all with its grey value as mean.

    Sides above 14 are halved before, by averaging.
    """
    generator = stream(0, "data")
    parts = (data.to_unit(x) for x in (images.x_train, images.x_test))
    parts = (F.avg_pool2d(x, 2) if x.shape[-1] > 14 else x for x in parts)
    train_part, test_part = (torch.bernoulli(x, generator=generator) for x in parts)
    return train_part, test_part


@functools.cache
def _load(name: str) -> tuple[Tensor, Tensor]:
    return binary_images(data.load(name))


def build(recipe: Recipe, shape: Sequence[int], seed: int) -> AutoregressiveVAE:
    """A model for images of a shape (1, height, width), with fresh weights that depend on ``seed`` alone."""
    given = {name: value for name in ("gamma", "tau") if (value := getattr(recipe, name)) is not None}
    with fresh(seed):
        norm = NORMS[recipe.norm](recipe.dim, **given) if recipe.norm else None
        encoder, _ = nets.mlp_pair(shape, recipe.dim, hidden=(recipe.hidden,), heads=2)
        decoder = PixelDecoder(tuple(shape), recipe.dim)
        return AutoregressiveVAE(encoder, decoder, recipe.dim, beta=recipe.beta, norm=norm)


@torch.no_grad()
def gain(model: AutoregressiveVAE, x: Tensor, *, seed: int = 0) -> float:
    """Nats that the decoder loses with the codes of other images in place of an image's own: 0 if it ignores them."""
    device = next(model.parameters()).device
    generator = stream(seed, "evaluation", 1)
    total = 0.0
    for rows in x.split(1000):
        rows = rows.to(device)
        mu, logvar = model.posterior(rows)
        z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator).to(mu)
        other = z[torch.randperm(len(z), generator=generator).to(device)]
        total += float((model.log_likelihood(rows, z) - model.log_likelihood(rows, other)).sum())
    return total / len(x)


def measure(model: AutoregressiveVAE, x: Tensor, *, images: int, samples: int, seed: int) -> dict[str, float]:
    """Figures on test images x, by name; the likelihood on the first of them alone."""
    generator = stream(seed, "evaluation")
    mu, logvar = metrics.in_batches(model.posterior, x)
    info = metrics.encoder_information(mu, logvar, generator=generator)
    nll = metrics.importance_weighted_nll(model, x[:images], samples=samples, generator=generator)
    return {
        "NLL": float(nll.nll.mean()),
        "NLL, fall on doubling": float((nll.halved - nll.nll).mean()),
        "KL": info.kl,
        "floor of the KL": 0.0 if model.norm is None else model.norm.floor(),
        "mutual information": info.mutual_information,
        "cap of the information": info.cap,
        "KL of the aggregate": info.kl_aggregate,
        "active units": metrics.active_units(mu),
        "gain from z": gain(model, x, seed=seed),
    }


VARIANTS: dict[str, tuple[str, dict]] = {
    "none": ("plain VAE", {}),
    "none_beta2": ("plain VAE, the divergence with weight 2", {"beta": 2.0}),
    "layer": ("layer norm on mu, gamma = 0.7", {"norm": "layer", "gamma": 0.7}),
    **{
        f"gamma{gamma}": (f"batch norm on mu, gamma = {gamma}", {"norm": "batch", "gamma": gamma})
        for gamma in (0.4, 0.7, 1.2)
    },
    "gamma0.7_beta2": (
        "batch norm on mu, gamma = 0.7, the divergence with weight 2",
        {"norm": "batch", "gamma": 0.7, "beta": 2.0},
    ),
    **{
        f"tau{tau}": (f"batch norm on mu and sigma, tau = {tau}", {"norm": "coupled", "tau": tau}) for tau in (0.1, 0.5)
    },
}


def run(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train and measure one model."""
    x_train, x_test = _load(data_name)
    model = build(recipe, x_train.shape[1:], seed)
    training = recipe.fit(model, x_train[: recipe.rows], seed=seed, device=device)
    kl = training.history["kl"]
    measured = measure(model, x_test[: recipe.test], images=recipe.images, samples=recipe.samples, seed=seed)
    draws = model.sample(64, generator=stream(seed, "samples")).cpu()
    return Outcome(
        {**measured, "smallest KL of a training batch": float(kl.min())},
        training,
        curves={"KL in training": [float(part.mean()) for part in kl.split(max(1, len(kl) // 100))]},
        figure=plots.image_panels({"samples": draws}, columns=16, size=6),
    )


# ---- one model's likelihood by its proposals -------------------------------------------------------------------------

ESTIMATED = {"gamma0.7": "batch norm on μ", "tau0.1": "coupled, τ = 0.1", "tau0.5": "coupled, τ = 0.5"}
DRAWS = {"short": (2, 4), "medium": (4, 16, 64, 256, 1024), "full": (4, 16, 64, 256, 1024, 4096)}


@dataclass(frozen=True, kw_only=True)
class Estimates(study.Recipe):
    """How the models are made and measured.

    Attributes:
        models: the recipe of each.
        images: test images whose likelihood is estimated.
        draws: numbers of importance samples.
    """

    models: tuple[Recipe, ...]
    images: int
    draws: tuple[int, ...]


def estimates_recipe(data_name: str, size: str) -> Estimates:
    """The recipe of a recorded run."""
    models = tuple(recipe(VARIANTS[variant][1], data_name, size) for variant in ESTIMATED)
    return Estimates(epochs=models[0].epochs, models=models, images=models[0].images // 5, draws=DRAWS[size])


def run_estimates(recipe: Estimates, data_name: str, seed: int, device: torch.device) -> Outcome:
    """NLL of trained models against the number of draws, by proposal: the images are the first test images."""
    x_train, x_test = _load(data_name)
    curves, trainings = {}, []
    figure, axes = plt.subplots(1, len(ESTIMATED), figsize=(9, 3), sharey=True, layout="constrained")
    for ax, own, title in zip(axes, recipe.models, ESTIMATED.values(), strict=True):
        model = build(own, x_train.shape[1:], seed)
        trainings.append(own.fit(model, x_train[: own.rows], seed=seed, device=device))
        for proposal, mark in zip(metrics.PROPOSALS, "os^", strict=True):
            noise = stream(seed, "evaluation")  # the same for each
            estimate = functools.partial(metrics.importance_weighted_nll, model, x_test[: recipe.images])
            nll = [float(estimate(samples=s, proposal=proposal, generator=noise).nll.mean()) for s in recipe.draws]
            curves[f"{title}, {proposal}"] = nll
            ax.plot(recipe.draws, nll, marker=mark, label=proposal)
        ax.set(title=title, xlabel="draws", xscale="log")
    axes[0].set(ylabel="estimate of the NLL, nats")
    axes[-1].legend(title="proposal")
    measured = {key: values[-1] for key, values in curves.items()}
    return Outcome(measured, together(trainings), curves=curves, figure=figure)


STUDIES = {
    f"bn_vae_{name}": Study(
        f"posterior collapse on images: {about}", "bn_vae", DATA, functools.partial(recipe, options), run
    )
    for name, (about, options) in VARIANTS.items()
} | {
    "bn_vae_estimates": Study(
        "one model's likelihood, estimated from draws of the posterior, of the prior and of a mixture",
        "bn_vae",
        DATA,
        estimates_recipe,
        run_estimates,
    )
}
