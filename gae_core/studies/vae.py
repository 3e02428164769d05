"""Likelihoods of VAEs on MNIST by the number of importance samples in the bound and by the size of the code.

Records ``vae_k...``, ``iwae_k...`` and ``vae_d...``. The recipe is that of Burda et al. (ICLR 2016): images binarised
anew at each step, two layers of 200 tanh units either side, 50 codes, likelihoods with 5,000 importance samples.
"""

import functools
import time

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots, train, variational
from gae_core.judge import classifier
from gae_core.models.vae import IWAE, VAE
from gae_core.records import Outcome, Study

DIM, BATCH, LR = 50, 100, 2e-3
EPOCHS = {  # by k; the bound with k samples costs about k decodings a step
    "short": {1: 1, 5: 1, 50: 1},
    "medium": {1: 60, 5: 40, 50: 10},
    "full": {1: 2000, 5: 2000, 50: 2000},
}
CODES_EPOCHS = {"short": 1, "medium": 10, "full": 500}
ROWS = {"short": 1000, "medium": 60_000, "full": 60_000}
# Of the likelihood: samples for all test images; images spread over them and the samples for these; a curve's samples.
TEST = {"short": (10, 20, 50, 5), "medium": (50, 1000, 5000, 50), "full": (500, 10_000, 5000, 50)}


def build(shape: tuple[int, ...], *, samples: int = 1, dim: int = DIM, seed: int) -> VAE:
    """A model with fresh weights that depend on ``seed`` alone.

    Args:
        shape: of an image.
        samples: k of the bound; 1 is the VAE.
        dim: of the code.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        pair = nets.mlp_pair(shape, dim, hidden=(200, 200), heads=2, output=nn.Identity, activation=nn.Tanh)
        options = {"binarise": True} if samples == 1 else {"binarise": True, "samples": samples}
        return (VAE if samples == 1 else IWAE)(*pair, dim, **options)


def binarised(x: Tensor, *, seed: int) -> Tensor:
    """Binary images, drawn once with the grey values as means."""
    return torch.bernoulli(data.to_unit(x), generator=torch.Generator().manual_seed(seed))


def nll(model: VAE, x: Tensor, *, size: str, seed: int) -> dict[str, float]:
    r"""Importance-weighted -log p(x) of binary test images, in nats, and its standard error.

    Few samples S for all images, many for some of them, spread evenly:
    :math:`\bar\ell_S(\text{all}) + \overline{(\ell_{5000} - \ell_S)}(\text{some})`, which estimates the mean over all
    images with hardly any noise from the choice of some. The error is that of the second mean.
    """
    few, images, many, _ = TEST[size]
    noise = torch.Generator().manual_seed(seed)
    whole = variational.importance_weighted_nll(model, x, samples=few, generator=noise)
    some = torch.arange(0, len(x), max(1, len(x) // images))[:images]
    tight = variational.importance_weighted_nll(model, x[some], samples=many, generator=noise)
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
    split = variational.encoder_information(mu, logvar, generator=noise)
    elbo = variational.importance_weighted_nll(model, x, samples=1, generator=noise)
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
        "active units": float(variational.active_units(mu)),
        "Fréchet, N(0, I)": metrics.frechet_distance(*seen),
    }


def fit(
    model: VAE, images: data.Images, *, epochs: int, size: str, seed: int, device: torch.device | str = "auto"
) -> tuple[train.History, list[float]]:
    """Train by the recipe that all share; returns the history and the NLL of some test images after each epoch."""
    x = binarised(images.x_test[:: max(1, len(images.x_test) // TEST[size][1])], seed=0)
    noise, curve, every = torch.Generator(), [], max(1, epochs // 40)

    def look(model: nn.Module, epoch: int) -> None:
        if epoch % every == 0:
            found = variational.importance_weighted_nll(model, x, samples=TEST[size][3], generator=noise.manual_seed(0))
            curve.append(float(found.mean()))

    history = train.fit(
        model,
        images.x_train[: ROWS[size]],
        epochs=epochs,
        batch_size=BATCH,
        lr=LR,
        schedule=lambda t: 1 - t,
        seed=seed,
        device=device,
        callback=look,
        progress=False,
    )
    return history, curve


def _settings(epochs: dict[str, int], samples: int, dim: int, name: str, size: str) -> dict:
    few, images, many, _ = TEST[size]
    return {
        "epochs": epochs[size],
        "batch_size": BATCH,
        "lr": LR,
        "schedule": "1 - t",
        "samples": samples,
        "dim": dim,
        "hidden": "200-200 tanh",
        "binarised": "at each step",
        "NLL": f"{few} samples for all test images, {many} for {images}",
    }


def _run(epochs: dict[str, int], samples: int, dim: int, name: str, size: str, seed: int, device) -> Outcome:
    images = data.load(name)
    model = build(images.shape, samples=samples, dim=dim, seed=seed)
    start = time.process_time() if device.type == "cpu" else time.perf_counter()
    history, curve = fit(model, images, epochs=epochs[size], size=size, seed=seed, device=device)
    seconds = (time.process_time() if device.type == "cpu" else time.perf_counter()) - start
    window = max(1, len(history["total"]) // 40)
    draws = model.sample(64, generator=torch.Generator().manual_seed(seed)).cpu()
    return Outcome(
        metrics=measure(model, images, size=size, seed=seed),
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=len(history["total"]) * BATCH,
        curves={"NLL of some test images": curve, "loss": [float(v.mean()) for v in history["total"].split(window)]},
        figure=plots.image_panels({"means of p(x | z), z from N(0, I)": draws}, columns=16, size=6),
    )


def _study(about: str, epochs: dict[str, int], samples: int, dim: int) -> Study:
    parts = (epochs, samples, dim)
    return Study(
        about, ("mnist", "digits"), functools.partial(_settings, *parts), functools.partial(_run, *parts), judged=True
    )


STUDIES: dict[str, Study] = {
    **{
        f"{'vae' if k == 1 else 'iwae'}_k{k}": _study(
            f"likelihood of an MLP trained on the bound with k = {k}", {s: EPOCHS[s][k] for s in EPOCHS}, k, DIM
        )
        for k in (1, 5, 50)
    },
    **{f"vae_d{d}": _study(f"VAE with {d} codes", CODES_EPOCHS, 1, d) for d in (2, 10, 50, 200)},
}
