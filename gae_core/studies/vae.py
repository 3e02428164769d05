"""Likelihoods of VAEs on MNIST by the number of importance samples in the bound and by the size of the code.

Records ``vae_k...``, ``iwae_k...`` and ``vae_d...``. The recipe is that of Burda et al. (ICLR 2016): images binarised
anew at each step, two layers of 200 tanh units either side, 50 codes, likelihoods with 5,000 importance samples.
"""

import functools
import time

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots, train
from gae_core.models.vae import IWAE, VAE
from gae_core.records import Outcome, Study
from gae_core.studies.judge import classifier

DIM = 50
Recipe = dict[str, tuple[int, int, float]]  # size -> epochs, rows of a batch, learning rate at the start
# By k: a step costs about k decodings a row. The medium trainings have equal numbers of steps, 24,000, with learning
# rates in proportion to the root of the batch.
BOUND: dict[int, Recipe] = {
    1: {"short": (1, 100, 4e-3), "medium": (40, 100, 4e-3), "full": (500, 100, 1e-3)},
    5: {"short": (1, 100, 4e-3), "medium": (20, 50, 2.8e-3), "full": (500, 100, 1e-3)},
    50: {"short": (1, 100, 4e-3), "medium": (8, 20, 1.8e-3), "full": (500, 100, 1e-3)},
}
CODES: Recipe = {"short": (1, 100, 4e-3), "medium": (8, 100, 4e-3), "full": (500, 100, 1e-3)}
ROWS = {"short": 1000, "medium": 60_000, "full": 60_000}
# Of the likelihood: samples for all test images; images spread over them and the samples for these; a curve's samples.
TEST = {"short": (10, 20, 50, 5), "medium": (50, 500, 5000, 50), "full": (500, 1000, 5000, 50)}


def build(images: data.Images, *, samples: int = 1, dim: int = DIM, seed: int) -> VAE:
    """A model with fresh weights that depend on ``seed`` alone, and with the mean training image in its last bias.

    Args:
        images: data.
        samples: k of the bound; 1 is the VAE.
        dim: of the code.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        pair = nets.mlp_pair(images.shape, dim, hidden=(200, 200), heads=2, output=nn.Identity, activation=nn.Tanh)
        options = {"binarise": True} if samples == 1 else {"binarise": True, "samples": samples}
        model = (VAE if samples == 1 else IWAE)(*pair, dim, **options)
    mean = data.to_unit(images.x_train).mean(0).clamp(0.001, 0.999).flatten()
    with torch.no_grad():  # without it the first epochs go into learning where the background is
        model.decoder[0][-1].bias.copy_(mean.logit())
    return model


def binarised(x: Tensor, *, seed: int) -> Tensor:
    """Binary images, drawn once with the grey values as means."""
    return torch.bernoulli(data.to_unit(x), generator=torch.Generator().manual_seed(seed))


def nll(model: VAE, x: Tensor, *, size: str, seed: int) -> dict[str, float]:
    r"""Importance-weighted -log p(x) of binary test images, in nats, and its standard error.

    Few samples S for all images, many for some of them, spread evenly:
    :math:`\bar\ell_S(\text{all}) + \overline{(\ell_{5000} - \ell_S)}(\text{some})`, which estimates the mean over all
    images with hardly any noise from the choice of some. The error is that of the second mean. The proposal is the
    posterior alone, as where the figures to compare with come from; the correction is what many more draws change.
    """
    few, images, many, _ = TEST[size]
    noise = torch.Generator().manual_seed(seed)
    estimate = functools.partial(metrics.importance_weighted_nll, model, proposal="posterior", generator=noise)
    whole = estimate(x, samples=few).nll
    some = torch.arange(0, len(x), max(1, len(x) // images))[:images]
    tight = estimate(x[some], samples=many).nll
    gain = tight - whole[some]
    return {
        "NLL": float(whole.mean() + gain.mean()),
        "error of the correction": float(gain.std() / len(some) ** 0.5),
        "NLL, few samples": float(whole.mean()),
    }


def measure(model: VAE, images: data.Images, *, size: str, seed: int) -> dict[str, float]:
    """Figures on the test images, binarised once, the same for all models; in nats where they have a unit."""
    noise = torch.Generator().manual_seed(seed)
    x = binarised(images.x_test, seed=0)
    mu, logvar = metrics.in_batches(model.posterior, x)
    split = metrics.encoder_information(mu, logvar, generator=noise)
    elbo = metrics.importance_weighted_nll(model, x, samples=1, generator=noise).nll
    features = classifier(images).features
    fake = torch.cat([model.sample(1000, generator=noise).cpu() for _ in range(max(1, len(x) // 1000))])
    seen = [metrics.in_batches(features, v) for v in (fake, images.x_test)]
    return {
        **nll(model, x, size=size, seed=seed),
        "negative ELBO": float(elbo.mean()),
        "KL": split.kl,
        "mutual information": split.mutual_information,
        "cap of the information": split.cap,
        "KL of the aggregate": split.kl_aggregate,
        "active units": float(metrics.active_units(mu)),
        "Fréchet, N(0, I)": metrics.frechet_distance(*seen),
    }


def fit(
    model: VAE, images: data.Images, recipe: Recipe, *, size: str, seed: int, device: torch.device | str = "auto"
) -> tuple[train.History, list[float]]:
    """Train by a recipe; returns the history and the NLL of some test images, after each epoch or every few."""
    x = binarised(images.x_test[:: max(1, len(images.x_test) // TEST[size][1])], seed=0)
    epochs, batch_size, lr = recipe[size]
    noise, curve, every = torch.Generator(), [], max(1, epochs // 40)

    def look(model: nn.Module, epoch: int) -> None:
        if epoch % every == 0:
            noise.manual_seed(0)
            options = {"samples": TEST[size][3], "proposal": "posterior", "generator": noise}
            curve.append(float(metrics.importance_weighted_nll(model, x, **options).nll.mean()))

    history = train.fit(
        model,
        images.x_train[: ROWS[size]],
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        schedule=lambda t: 1 - t,
        seed=seed,
        device=device,
        callback=look,
        progress=False,
    )
    return history, curve


def _settings(recipe: Recipe, samples: int, dim: int, name: str, size: str) -> dict:
    epochs, batch_size, lr = recipe[size]
    few, images, many, _ = TEST[size]
    return {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "schedule": "1 - t",
        "samples": samples,
        "dim": dim,
        "hidden": "200-200 tanh",
        "last bias": "mean image",
        "binarised": "at each step",
        "NLL": f"{few} samples for all test images, {many} for {images}",
    }


def _run(recipe: Recipe, samples: int, dim: int, name: str, size: str, seed: int, device: torch.device) -> Outcome:
    images = data.load(name)
    model = build(images, samples=samples, dim=dim, seed=seed)
    clock = time.process_time if device.type == "cpu" else time.perf_counter  # neighbours on the CPU do not count
    start = clock()
    history, curve = fit(model, images, recipe, size=size, seed=seed, device=device)
    seconds = clock() - start
    draws = model.sample(64, generator=torch.Generator().manual_seed(seed)).cpu()
    return Outcome(
        metrics=measure(model, images, size=size, seed=seed),
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=len(history["total"]) * recipe[size][1],
        curves={"NLL of some test images": curve},
        figure=plots.image_panels({"means of p(x | z), z from N(0, I)": draws}, columns=16, size=6),
    )


def _study(about: str, *parts) -> Study:
    settings, run = functools.partial(_settings, *parts), functools.partial(_run, *parts)
    return Study(about, ("mnist", "digits"), settings, run, judged=data.load)


STUDIES: dict[str, Study] = {
    **{
        f"{'vae' if k == 1 else 'iwae'}_k{k}": _study(
            f"likelihood of an MLP trained on the bound with k = {k}", recipe, k, DIM
        )
        for k, recipe in BOUND.items()
    },
    **{f"vae_d{d}": _study(f"VAE with {d} codes", CODES, 1, d) for d in (2, 10, 50, 200)},
}
