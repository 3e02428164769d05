"""Posterior collapse on small binary images, and norms of the posterior against it: records ``bn_vae_...``.

The decoder sees the pixels before; see :class:`gae_core.models.bn_vae.PixelDecoder`.
"""

import functools
import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gae_core import data, metrics, nets, plots, train, variational
from gae_core.models.bn_vae import AutoregressiveVAE, PixelDecoder
from gae_core.normalization import CoupledBatchNorm, FixedScaleBatchNorm, FixedScaleLayerNorm
from gae_core.records import Outcome, Study

DIM, HIDDEN, BATCH, LR = 16, 256, 128, 2e-3
EPOCHS = {"short": 1, "medium": 2, "full": 20}
ROWS = {"short": 1280, "medium": 60_000, "full": 60_000}
TEST = {"short": (50, 8), "medium": (500, 256), "full": (5000, 512)}  # images and samples of the likelihood


def binary_images(images: data.Images, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Training and test images, black and white: each pixel is drawn once and for all with its grey value as mean.

    Sides above 14 are halved before, by averaging.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = (data.to_unit(x) for x in (images.x_train, images.x_test))
    parts = (F.avg_pool2d(x, 2) if x.shape[-1] > 14 else x for x in parts)
    train_part, test_part = (torch.bernoulli(x, generator=generator) for x in parts)
    return train_part, test_part


@functools.cache
def _load(name: str) -> tuple[Tensor, Tensor]:
    return binary_images(data.load(name))


def build(
    shape: tuple[int, ...], *, seed: int, norm: Callable[[int], nn.Module] | None = None, beta: float = 1.0
) -> AutoregressiveVAE:
    """A model with fresh weights that depend on ``seed`` alone.

    Args:
        shape: of an image, (1, height, width).
        seed: of the weights.
        norm: makes the norm of the posterior's parameters from the dimension of the code.
        beta: weight of the divergence.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder, _ = nets.mlp_pair(shape, DIM, hidden=(HIDDEN,), heads=2)
        decoder = PixelDecoder(shape, DIM)
        return AutoregressiveVAE(encoder, decoder, DIM, beta=beta, norm=None if norm is None else norm(DIM))


def fit(model: nn.Module, x: Tensor, *, epochs: int, seed: int, **options) -> train.History:
    """Train by the recipe that all share; options go to :func:`gae_core.train.fit`."""
    return train.fit(
        model, x, epochs=epochs, batch_size=BATCH, lr=LR, schedule=lambda t: 1 - t, seed=seed, progress=False, **options
    )


def floor(norm: nn.Module | None) -> float:
    """What the norm guarantees of the divergence on a batch, in nats, but for eps: 0 without one."""
    return 0.0 if norm is None else norm.floor()


@torch.no_grad()
def gain(model: AutoregressiveVAE, x: Tensor, *, seed: int = 0) -> float:
    """Nats that the decoder loses with the codes of other images in place of an image's own: 0 if it ignores them."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
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
    generator = torch.Generator().manual_seed(seed)
    mu, logvar = metrics.in_batches(model.posterior, x)
    info = variational.encoder_information(mu, logvar, generator=generator)
    nll = variational.importance_weighted_nll(model, x[:images], samples=samples, generator=generator)
    return {
        "NLL": float(nll.nll.mean()),
        "NLL, fall on doubling": float((nll.halved - nll.nll).mean()),
        "KL": info.kl,
        "floor of the KL": floor(model.norm),
        "mutual information": info.mutual_information,
        "cap of the information": info.cap,
        "KL of the aggregate": info.kl_aggregate,
        "active units": variational.active_units(mu),
        "gain from z": gain(model, x, seed=seed),
    }


VARIANTS: dict[str, tuple[str, dict]] = {
    "none": ("plain VAE", {}),
    "none_beta2": ("plain VAE, the divergence with weight 2", {"beta": 2.0}),
    "layer": ("layer norm on mu, gamma = 0.7", {"norm": functools.partial(FixedScaleLayerNorm, gamma=0.7)}),
    **{
        f"gamma{gamma}": (
            f"batch norm on mu, gamma = {gamma}",
            {"norm": functools.partial(FixedScaleBatchNorm, gamma=gamma)},
        )
        for gamma in (0.4, 0.7, 1.2)
    },
    "gamma0.7_beta2": (
        "batch norm on mu, gamma = 0.7, the divergence with weight 2",
        {"norm": functools.partial(FixedScaleBatchNorm, gamma=0.7), "beta": 2.0},
    ),
    **{
        f"tau{tau}": (
            f"batch norm on mu and sigma, tau = {tau}",
            {"norm": functools.partial(CoupledBatchNorm, tau=tau)},
        )
        for tau in (0.1, 0.5)
    },
}


def _settings(about: str, name: str, size: str) -> dict:
    images, samples = TEST[size]
    return {
        "epochs": EPOCHS[size],
        "batch_size": BATCH,
        "lr": LR,
        "dim": DIM,
        "method": about,
        "images of the likelihood": images,
        "importance samples": samples,
        "proposal": "mixture",
    }


def _run(options: dict, name: str, size: str, seed: int, device: torch.device) -> Outcome:
    x_train, x_test = _load(name)
    x_train = x_train[: ROWS[size]]
    model = build(tuple(x_train.shape[1:]), seed=seed, **options)
    start = time.perf_counter()
    history = fit(model, x_train, epochs=EPOCHS[size], seed=seed, device=device)
    seconds = time.perf_counter() - start
    images, samples = TEST[size]
    found = measure(model, x_test[: 10 * images], images=images, samples=samples, seed=seed)
    draws = model.sample(64, generator=torch.Generator().manual_seed(seed)).cpu()
    window = max(1, len(history["kl"]) // 100)
    return Outcome(
        metrics={**found, "smallest KL of a training batch": float(history["kl"].min())},
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=len(history["kl"]) * BATCH,
        curves={"KL in training": [float(part.mean()) for part in history["kl"].split(window)]},
        figure=plots.image_panels({"samples": draws}, columns=16, size=6),
    )


# ---- one model's likelihood by its proposals -------------------------------------------------------------------------

ESTIMATED = {"gamma0.7": "batch norm on μ", "tau0.1": "coupled, τ = 0.1", "tau0.5": "coupled, τ = 0.5"}
DRAWS = {"short": (2, 4), "medium": (4, 16, 64, 256, 1024), "full": (4, 16, 64, 256, 1024, 4096)}


def _estimates_settings(name: str, size: str) -> dict:
    settings = _settings("NLL of the same trained models by each proposal", name, size)
    return settings | {"images of the likelihood": TEST[size][0] // 5, "importance samples": DRAWS[size]}


def _run_estimates(name: str, size: str, seed: int, device: torch.device) -> Outcome:
    """NLL of trained models against the number of draws, by proposal: the images are the first test images."""
    x_train, x_test = _load(name)
    x_train, x_test = x_train[: ROWS[size]], x_test[: TEST[size][0] // 5]
    curves, seconds = {}, 0.0
    figure, axes = plt.subplots(1, len(ESTIMATED), figsize=(9, 3), sharey=True, layout="constrained")
    for ax, (variant, title) in zip(axes, ESTIMATED.items(), strict=True):
        model, start = build(tuple(x_train.shape[1:]), seed=seed, **VARIANTS[variant][1]), time.perf_counter()
        fit(model, x_train, epochs=EPOCHS[size], seed=seed, device=device)
        seconds += time.perf_counter() - start
        for proposal, mark in zip(variational.PROPOSALS, "os^", strict=True):
            noise = torch.Generator().manual_seed(seed)
            estimate = functools.partial(variational.importance_weighted_nll, model, x_test, generator=noise)
            nll = [float(estimate(samples=s, proposal=proposal).nll.mean()) for s in DRAWS[size]]
            curves[f"{title}, {proposal}"] = nll
            ax.plot(DRAWS[size], nll, marker=mark, label=proposal)
        ax.set(title=title, xlabel="draws", xscale="log")
    axes[0].set(ylabel="estimate of the NLL, nats")
    axes[-1].legend(title="proposal")
    return Outcome(
        metrics={key: values[-1] for key, values in curves.items()},
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=len(ESTIMATED) * EPOCHS[size] * (len(x_train) // BATCH) * BATCH,
        curves=curves,
        figure=figure,
    )


STUDIES = {
    f"bn_vae_{name}": Study(
        about=f"posterior collapse on images: {about}",
        data=("mnist", "digits"),
        settings=functools.partial(_settings, about),
        run=functools.partial(_run, options),
    )
    for name, (about, options) in VARIANTS.items()
} | {
    "bn_vae_estimates": Study(
        about="one model's likelihood, estimated from draws of the posterior, of the prior and of a mixture",
        data=("mnist", "digits"),
        settings=_estimates_settings,
        run=_run_estimates,
    )
}
