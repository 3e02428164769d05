"""Named training runs, measured and recorded, and the classifier whose features the metrics use."""

import dataclasses
import datetime
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots, sampling, train
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.classifier import Classifier
from gae_core.models.eae import EAE

DIM = 8  # of the codes in all recorded runs


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


def _small_pair(shape: Sequence[int], dim: int) -> tuple[nn.Module, nn.Module]:
    return nets.mlp_pair(shape, dim, hidden=(256, 128))


SIZES = {
    "short": Size(_small_pair, 120),  # seconds on two cores: what the notebooks do
    "medium": Size(nets.mlp_pair, 1200),  # minutes on two cores
    "full": Size(nets.conv_pair, 6000),  # for a GPU
}

# name -> makes the model from encoder and decoder
MODELS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "autoencoder": lambda encoder, decoder: Autoencoder(encoder, decoder, DIM),
    "batch_norm": lambda encoder, decoder: EAE(encoder, decoder, DIM, lam=0.0),
    "eae": lambda encoder, decoder: EAE(encoder, decoder, DIM, lam=1.0),
}


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
        return MODELS[name](*SIZES[size].pair(shape, DIM))


def fit(model: nn.Module, images: data.Images, *, size: str, seed: int, **options) -> train.History:
    """Train a model on images by the recipe that all recorded runs share; options go to :func:`gae_core.train.fit`."""
    return train.fit(
        model,
        images.x_train,
        images.y_train,
        epochs=SIZES[size].epochs(len(images.x_train)),
        batch_size=128,
        lr=2e-3,
        schedule=lambda t: 1 - t,
        seed=seed,
        **options,
    )


def classifier(images: data.Images, *, seed: int = 0) -> Classifier:
    """The classifier of a data set: trained when first needed, then kept in the data folder with its accuracy.

    Args:
        images: data set that it is trained on and tested with.
        seed: of its weights and of its training.

    Returns:
        The classifier on the CPU, in evaluation mode. Its test accuracy is in ``classifier-<name>-<seed>.json`` beside
        its weights in :func:`gae_core.data.data_root`.
    """
    path = data.data_root() / f"classifier-{images.name}-{seed}.pt"
    record = path.with_suffix(".json")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA too, and leave it so
        model = Classifier(images.shape, int(images.y_train.max()) + 1)
    epochs = max(4, 50_000 // len(images.x_train))
    train.fit(
        model,
        images.x_train,
        images.y_train,
        epochs=epochs,
        lr=2e-3,
        schedule=lambda t: 1 - t,
        seed=seed,
        checkpoint=path,
        resume=True,
        progress=False,
    )
    model.cpu()
    if not record.exists():
        logits = metrics.in_batches(model, images.x_test)
        accuracy = (logits.argmax(1) == images.y_test).double().mean().item()
        record.write_text(json.dumps({"data": images.name, "seed": seed, "epochs": epochs, "accuracy": accuracy}))
    return model


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
        "one Gaussian": sampling.fit_gaussian_mixture(z),
        "mixture of ten": sampling.fit_gaussian_mixture(z[:5000], 10, seed=seed),
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
    """The metrics of a trained model on held-out data: error, Fréchet distances, Gaussianity of the codes.

    Args:
        model: trained, in evaluation mode.
        images: data.
        seed: of the samples.
        n: images for the Fréchet distances, at most those of the test set.
    """
    features = classifier(images).features
    real = metrics.in_batches(features, images.x_test)
    sources = {"real images": images.x_train[:n], **sample_sources(model, images, n=min(n, len(real)), seed=seed)}
    codes = metrics.gaussianity(metrics.in_batches(model.encode, images.x_test))
    return {
        "squared error": float(metrics.squared_error(model, images.x_test).mean()),
        **{
            f"Fréchet, {name}": metrics.frechet_distance(metrics.in_batches(features, x), real)
            for name, x in sources.items()
        },
        **{name.replace("_", " "): value for name, value in dataclasses.asdict(codes).items()},
    }


RESULTS = Path(__file__).parents[1] / "book" / "results"


def run(
    name: str,
    *,
    images: data.Images,
    seeds: Sequence[int] = (0,),
    size: str = "full",
    device: str = "auto",
    out: Path = RESULTS,
) -> Path:
    """Train a model for each seed, measure it, and record everything that is needed to do it again.

    Args:
        name: model, a key of ``MODELS``.
        images: data.
        seeds: one training each, of weights, order and samples.
        size: key of ``SIZES``.
        device: see :func:`gae_core.train.fit`.
        out: folder of the records.

    Returns:
        The record, ``<out>/<name>/<data>-<size>.json``; a picture of samples of the first seed lies beside it.

    Raises:
        ValueError: for an unknown model or size, or no seeds.
        FileExistsError: if a CPU run would overwrite the record of a GPU.
    """
    if not seeds:
        raise ValueError("seeds must name at least one, got none")
    build(name, images.shape, size=size, seed=0)  # names are checked before anything is trained
    chosen = train.pick_device(device)
    path = out / name / f"{images.name}-{size}.json"
    if path.exists() and chosen.type == "cpu" and json.loads(path.read_text())["device"] != "CPU":
        raise FileExistsError(f"{path} is the record of a GPU, this would be one of a CPU: move it away first")
    runs, seconds, speed = [], 0.0, []
    for seed in seeds:
        model = build(name, images.shape, size=size, seed=seed)
        start = time.perf_counter()
        history = fit(model, images, size=size, seed=seed, device=device)
        elapsed = time.perf_counter() - start
        seconds += elapsed
        speed.append(len(history["total"]) * 128 / elapsed)
        runs.append(measure(model, images, seed=seed))
        if seed == seeds[0]:
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = sample_sources(model, images, n=64, seed=seed)
            figure = plots.image_panels(samples, columns=8, per_row=4, size=2.4)
            figure.savefig(path.with_suffix(".png"), dpi=100)
    seed_list = ",".join(map(str, seeds))
    record = {
        "model": name,
        "data": images.name,
        "size": size,
        "command": f"python -m gae_core run {name} --data {images.name} --size {size} --seeds {seed_list}",
        "epochs": SIZES[size].epochs(len(images.x_train)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seeds": list(seeds),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "peak memory, MiB": torch.cuda.max_memory_allocated(chosen) / 2**20 if chosen.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "training seconds": seconds,
        "samples a second": sum(speed) / len(speed),
        "metrics": {
            key: {
                "mean": sum(r[key] for r in runs) / len(runs),
                "standard error": _standard_error([r[key] for r in runs]),
                "by seed": [r[key] for r in runs],
            }
            for key in runs[0]
        },
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, or None for a single value."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _commit() -> str | None:
    """The checked-out commit, with a plus sign if tracked files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")
