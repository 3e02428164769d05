"""Named training runs: the image models that are compared by their samples, and all studies of the chapters."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots, recording, train
from gae_core.densities import fit_gaussian_mixture
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.eae import EAE
from gae_core.models.vae import VAE
from gae_core.records import RESULTS, Outcome, Study
from gae_core.studies import bn_vae, bn_vae_text, cvae, denoising, family, image_prior, meg, vae
from gae_core.studies.judge import classifier

DIM = 8  # of the codes in all recorded runs
RECIPE = {"batch_size": 128, "lr": 2e-3, "schedule": "1 - t"}  # of the training, likewise


@dataclasses.dataclass(frozen=True)
class Size:
    """How long a run is: what its networks are, and how many images it sees.

    Attributes:
        pair: makes encoder and decoder from the shape of an image and the dimension of the code.
        images: images that the training sees, in thousands, over all epochs.
    """

    pair: Callable[..., tuple[nn.Module, nn.Module]]
    images: int

    def epochs(self, n: int) -> int:
        """Passes over n training images, at least one."""
        return max(1, round(1000 * self.images / n))


SIZES = {
    "short": Size(functools.partial(nets.mlp_pair, hidden=(256, 128)), 120),  # seconds on two cores, as in notebooks
    "medium": Size(nets.mlp_pair, 1200),  # minutes on two cores
    "full": Size(nets.conv_pair, 6000),  # for a GPU
}

# name -> what it is, and how it is made; pair(...) gives encoder and decoder, for images and codes of the run
MODELS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "autoencoder": ("squared error alone", lambda pair: Autoencoder(*pair(), DIM)),
    "batch_norm": ("autoencoder with batch norm of the code", lambda pair: EAE(*pair(), DIM, lam=0.0)),
    "eae": ("entropic autoencoder: batch norm and nearest-neighbour entropy", lambda pair: EAE(*pair(), DIM, lam=1.0)),
    "vae": (
        "variational autoencoder, Bernoulli likelihood",
        lambda pair: VAE(*pair(heads=2, output=nn.Identity), DIM, likelihood="bernoulli"),
    ),
}

# topic, which names a table of the Results page -> its studies
TOPICS: dict[str, dict[str, Study]] = {
    "bn_vae": bn_vae.STUDIES,
    "bn_vae_text": bn_vae_text.STUDIES,
    "cvae": cvae.STUDIES,
    "denoising": denoising.STUDIES,
    "family": family.STUDIES,
    "image_prior": image_prior.STUDIES,
    "meg": meg.STUDIES,
    "vae": vae.STUDIES,
}
STUDIES = {name: (topic, study) for topic, studies in TOPICS.items() for name, study in studies.items()}


def build(name: str, shape: Sequence[int], *, size: str, seed: int) -> nn.Module:
    """A model with fresh weights that depend on ``seed`` alone.

    Raises:
        ValueError: for an unknown model or size.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA too, and leave it so
        return MODELS[name][1](functools.partial(SIZES[size].pair, shape, DIM))


def label(model: nn.Module, **about) -> None:
    """Let the model's state, and with it every checkpoint, say what the model is: a buffer of JSON, as bytes."""
    model.register_buffer("about", torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8))


def load_checkpoint(path: Path) -> tuple[nn.Module, dict]:
    """The model of a checkpoint whose model was given to :func:`label` with name, shape, size and seed.

    Returns:
        Model on the CPU, in evaluation mode, and what it says of itself.

    Raises:
        ValueError: if the file is no such checkpoint.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")["model"]
        about = json.loads(bytes(state.pop("about").tolist()))
    except OSError:
        raise
    except Exception as error:  # any of a dozen: what a file that is none contains is not known
        raise ValueError(f"{path} is no checkpoint that `python -m gae_core train` wrote") from error
    model = build(about["name"], about["shape"], size=about["size"], seed=about["seed"])
    model.load_state_dict(state)
    return model.eval(), about


def fit(model: nn.Module, images: data.Images, *, size: str, seed: int, **options) -> train.History:
    """Train a model on images by the recipe that all recorded runs share; options go to :func:`gae_core.train.fit`."""
    return train.fit(
        model,
        images.x_train,
        images.y_train,
        epochs=SIZES[size].epochs(len(images.x_train)),
        batch_size=RECIPE["batch_size"],
        lr=RECIPE["lr"],
        schedule=lambda t: 1 - t,
        seed=seed,
        **options,
    )


def sample_sources(model: nn.Module, images: data.Images, *, n: int, seed: int) -> dict[str, Tensor]:
    """Images that the same decoder shows for four sources of codes.

    Args:
        model: trained, in evaluation mode.
        images: data; densities are fitted to codes of training images, reconstructions are of test images.
        n: images a source.
        seed: of the samples and the fit.

    Returns:
        Source of the codes -> images (n, ...): "N(0, I)", "one Gaussian" and "mixture of ten" fitted ex post,
        "reconstructions".
    """
    generator = torch.Generator().manual_seed(seed)
    z = metrics.in_batches(model.encode, images.x_train[:20_000])
    densities = {
        "one Gaussian": fit_gaussian_mixture(z),
        "mixture of ten": fit_gaussian_mixture(z[:5000], 10, seed=seed),
    }
    return {
        "N(0, I)": torch.cat(
            [model.sample(min(1000, n - i), generator=generator).to(z.device) for i in range(0, n, 1000)]
        ),
        **{
            name: metrics.in_batches(model.decode, density.sample(n, generator=generator))
            for name, density in densities.items()
        },
        "reconstructions": metrics.in_batches(model, images.x_test[:n]),
    }


def measure(model: nn.Module, images: data.Images, *, seed: int, n: int = 10_000) -> dict[str, float]:
    """The metrics of a trained model on held-out data: error, Fréchet distances, precision and recall, codes.

    Codes of a variational model are drawn from q(z | x), one for each image. Its likelihood is that of the first 1,000
    test images, binarised at random by their grey values; the importance samples are 200 for each.

    Args:
        model: trained, in evaluation mode.
        images: data.
        seed: of the samples.
        n: images for the Fréchet distances, at most those of the test set; precision and recall take at most 2,000.
    """
    generator = torch.Generator().manual_seed(seed)
    features = classifier(images).to(next(model.parameters()).device).features
    real = metrics.in_batches(features, images.x_test)
    sources = {"real images": images.x_train[:n], **sample_sources(model, images, n=min(n, len(real)), seed=seed)}
    seen = {name: metrics.in_batches(features, x) for name, x in sources.items()}
    measured = {
        "squared error": float(metrics.squared_error(model, images.x_test).mean()),
        **{f"Fréchet, {name}": metrics.frechet_distance(fake, real) for name, fake in seen.items()},
    }
    for name in ("real images", "N(0, I)"):
        found = metrics.precision_recall(real[:2000], seen[name][:2000])
        measured |= {f"precision, {name}": found.precision, f"recall, {name}": found.recall}
    codes = metrics.in_batches(model.encode, images.x_test)
    if isinstance(model, VAE):
        mu, logvar = metrics.in_batches(model.posterior, images.x_test)
        codes = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator)
        binary = torch.bernoulli(data.to_unit(images.x_test[:1000]), generator=generator)
        options = {"samples": 200, "proposal": "posterior", "generator": generator}
        nll = metrics.importance_weighted_nll(model, binary, **options).nll
        split = metrics.encoder_information(mu, logvar, generator=generator)
        measured |= {
            "NLL of binarised images": float(nll.mean()),
            "active units": float(metrics.active_units(mu)),
            "KL": split.kl,
            "mutual information": split.mutual_information,
            "cap of mutual information": split.cap,
            "KL of aggregate posterior": split.kl_aggregate,
        }
    gaussianity = dataclasses.asdict(metrics.gaussianity(codes))
    return measured | {name.replace("_", " "): value for name, value in gaussianity.items()}


def run(
    name: str,
    *,
    images: data.Images,
    seeds: Sequence[int] = (0,),
    size: str = "full",
    device: str = "auto",
    out: Path = RESULTS,
    **options,
) -> Path:
    """Train an image model for each seed, measure it, and record it: see :func:`gae_core.recording.record`.

    Args:
        name: model, a key of ``MODELS``.
        images: data.
        seeds: one training each.
        size: key of ``SIZES``.
        device: see :func:`gae_core.train.pick_device`.
        out: folder of the records.
        **options: ``replace`` and ``say`` of :func:`gae_core.recording.record`.

    Returns:
        The record; a picture of samples of the first seed lies beside it.

    Raises:
        ValueError: for an unknown model or size, and as in :func:`gae_core.recording.record`.
    """
    build(name, images.shape, size=size, seed=0)  # names are checked before anything is trained
    epochs = SIZES[size].epochs(len(images.x_train))

    def run_seed(_data: str, _size: str, seed: int, chosen: torch.device) -> Outcome:
        model = build(name, images.shape, size=size, seed=seed)
        start = time.perf_counter()
        fit(model, images, size=size, seed=seed, device=chosen)
        seconds = time.perf_counter() - start
        return Outcome(
            metrics=measure(model, images, seed=seed),
            parameters=sum(p.numel() for p in model.parameters()),
            training_seconds=seconds,
            samples=epochs * (len(images.x_train) // RECIPE["batch_size"]) * RECIPE["batch_size"],
            figure=plots.image_panels(sample_sources(model, images, n=64, seed=seed), columns=8),
        )

    settings = {"epochs": epochs, **RECIPE, "dim": DIM}
    what = Study(MODELS[name][0], (images.name,), lambda *_: settings, run_seed, judged=lambda _: images)
    how = {"seeds": seeds, "size": size, "device": device, "out": out} | options
    return recording.record(name, what, topic="image models", **how)


def record(name: str, *, data_name: str | None = None, **options) -> Path:
    """Record a model of ``MODELS`` or a study of ``STUDIES`` by its name.

    Args:
        name: key of one of the two.
        data_name: data set; by default MNIST for a model, and a study's own first.
        **options: as for :func:`run`.
    """
    if name in STUDIES:
        topic, what = STUDIES[name]
        return recording.record(name, what, topic=topic, data=data_name, **options)
    return run(name, images=data.load(data_name or "mnist"), **options)


def runs_on(name: str, data_name: str | None) -> bool:
    """Whether a model or study can run on a data set (None: on its own)."""
    return data_name is None or (data_name in STUDIES[name][1].data if name in STUDIES else data_name in data.NAMES)
