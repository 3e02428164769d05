"""Named training runs, measured and recorded, and the classifier whose features the metrics use."""

import dataclasses
import datetime
import functools
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots, records, sampling, train, variational
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.classifier import Classifier
from gae_core.models.eae import EAE
from gae_core.models.vae import VAE
from gae_core.records import RESULTS

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


def _classifier_file(images: data.Images, seed: int) -> Path:
    return data.data_root() / f"classifier-{images.name}-{seed}.pt"


def classifier(images: data.Images, *, seed: int = 0) -> Classifier:
    """The classifier of a data set: trained when first needed, then kept in the data folder with its accuracy.

    It is trained on the CPU wherever the models are: figures in its features can be compared if the weights are equal.

    Args:
        images: data set that it is trained on and tested with.
        seed: of its weights and of its training.

    Returns:
        The classifier on the CPU, in evaluation mode. Its test accuracy is in ``classifier-<name>-<seed>.json`` beside
        its weights in :func:`gae_core.data.data_root`.
    """
    path = _classifier_file(images, seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Classifier(images.shape, int(images.y_train.max()) + 1).eval()
    if path.exists() and path.with_suffix(".json").exists():
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model"])
        return model
    records.writable(path.parent)
    epochs = max(4, 50_000 // len(images.x_train))
    options = {"epochs": epochs, "lr": 2e-3, "schedule": lambda t: 1 - t, "seed": seed, "progress": False}
    train.fit(model, images.x_train, images.y_train, device="cpu", **options)  # weights that can be made again
    logits = metrics.in_batches(model, images.x_test)
    accuracy = (logits.argmax(1) == images.y_test).double().mean().item()
    torch.save({"model": model.state_dict()}, path)
    about = {"data": images.name, "seed": seed, "epochs": epochs, "accuracy": accuracy}
    path.with_suffix(".json").write_text(json.dumps(about))  # last: where it is, the weights are whole
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
        nll = variational.importance_weighted_nll(model, binary, samples=200, generator=generator)
        split = variational.encoder_information(mu, logvar, generator=generator)
        measured |= {
            "NLL of binarised images": float(nll.mean()),
            "active units": float(variational.active_units(mu)),
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
) -> Path:
    """Train a model for each seed, measure it, and record everything that is needed to do it again.

    The record's name has the size, so that a short run never overwrites a full one. Finished seeds are kept in
    ``<data>-<size>.part.json`` until all are there: a run that was killed goes on with the next seed. A record made
    by the same code on the same device, with these seeds, is left as it is.

    Args:
        name: model, a key of ``MODELS``.
        images: data.
        seeds: one training each, of weights, order and samples. On the CPU the same seed gives the same metrics.
        size: key of ``SIZES``.
        device: see :func:`gae_core.train.pick_device`.
        out: folder of the records.

    Returns:
        The record, ``<out>/<name>/<data>-<size>.json``; a picture of samples of the first seed lies beside it.

    Raises:
        ValueError: for an unknown model or size, or seeds that are none or not different.
        FileExistsError: if a CPU run would overwrite the record of a GPU.
        OSError: if the folder cannot be written; found before anything is trained.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one, got {list(seeds)}")
    model = build(name, images.shape, size=size, seed=0)  # names are checked before anything is trained
    chosen = train.pick_device(device)
    same = {  # what runs must agree in to stand in one record
        "model": name,
        "data": images.name,
        "size": size,
        "epochs": SIZES[size].epochs(len(images.x_train)),
        **RECIPE,
        "dim": DIM,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "code": _code(),
    }
    path = out / name / f"{images.name}-{size}.json"
    part = path.with_suffix(".part.json")
    old, begun = records.read(path), records.read(part)
    records.may_replace(path, same["device"])
    if same.items() <= old.items() and set(seeds) <= set(old["seeds"]):
        return path
    records.writable(path.parent)
    runs = begun["runs"] if same.items() <= begun.items() else {}
    for seed in seeds:
        if str(seed) not in runs:
            picture = part.with_suffix(".png") if seed == seeds[0] else None
            runs[str(seed)] = _run_seed(same, images, seed, chosen, picture)
            records.write(part, {**same, "runs": runs})

    chosen_runs = [runs[str(seed)] for seed in seeds]
    total = {key: [run[key] for run in chosen_runs] for key in chosen_runs[0]}
    record = {
        **same,
        "command": f"python -m gae_core run {name} --data {images.name} --size {size} "
        f"--seeds {','.join(map(str, seeds))}",
        "seeds": list(seeds),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "training seconds": sum(total["training seconds"]),
        "wall seconds": sum(total["wall seconds"]),
        "samples a second": sum(total["samples a second"]) / len(seeds),
        "peak memory, MiB": max(total["peak memory, MiB"]),
        "peak memory of": "tensors on the device" if chosen.type == "cuda" else "the process since its start",
        "classifier": records.read(_classifier_file(images, 0).with_suffix(".json")),
        "metrics": {
            key: records.summary([metrics[key] for metrics in total["metrics"]]) for key in total["metrics"][0]
        },
    }
    records.write(path, record)
    part.with_suffix(".png").replace(path.with_suffix(".png"))
    part.unlink()
    return path


def _run_seed(same: dict, images: data.Images, seed: int, device: torch.device, picture: Path | None) -> dict:
    """Train and measure one seed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = build(same["model"], images.shape, size=same["size"], seed=seed)
    start = time.perf_counter()
    fit(model, images, size=same["size"], seed=seed, device=device)
    seconds = time.perf_counter() - start
    peak = _peak_memory(device)  # of the training: before the measuring
    if picture is not None:
        figure = plots.image_panels(sample_sources(model, images, n=64, seed=seed), columns=8)
        figure.savefig(picture, dpi=100)
        plots.plt.close(figure)
    measured = measure(model, images, seed=seed)
    return {
        "training seconds": seconds,
        "wall seconds": time.perf_counter() - start,
        "samples a second": same["epochs"] * (len(images.x_train) // same["batch_size"]) * same["batch_size"] / seconds,
        "peak memory, MiB": peak,
        "metrics": measured,
    }


def _peak_memory(device: torch.device) -> float:
    """MiB: of torch's tensors on a CUDA device since the last reset, else of the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _code() -> str:
    """Digest of the package's sources: equal for runs of the same code, whether committed or not."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.rglob("*.py")))).hexdigest()[:12]


def _commit() -> str | None:
    """The checked-out commit, with a plus sign if tracked files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")
