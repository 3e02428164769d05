"""Data sets: images as tensors, and toy densities in the plane whose log-density is known exactly.

Nothing is downloaded unless asked: ``python -m gae_core data mnist`` fetches, :func:`load` only reads.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from gae_core.seeds import stream


@dataclass(frozen=True)
class Images:
    """Labelled images, split once and for all.

    Attributes:
        name: name of the data set.
        x_train: training images, (n, channels, height, width): uint8 in 0..255, or float in [0, 1].
        y_train: their classes, int64, (n,).
        x_test: held-out images.
        y_test: their classes.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image, (channels, height, width)."""
        return tuple(self.x_train.shape[1:])


def to_unit(x: Tensor) -> Tensor:
    """Bytes 0..255 as float32 in [0, 1]; floats and tokens pass unchanged. Memory grows fourfold: do it by batch."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: ``root``, else the environment's ``GAE_DATA``, else ``data/`` in the repository.

    Outside a checkout of the repository the last is ``data/`` in the current folder.
    """
    if root is not None:
        return Path(root)
    checkout = Path(__file__).parents[1]
    return Path(os.environ.get("GAE_DATA") or (checkout if (checkout / "_toc.yml").exists() else Path()) / "data")


SIZES = ("short", "full")  # of a notebook's run


def size_from_environment(default: str) -> str:
    """How long a notebook runs: the environment's ``GAE_SIZE``, "short" or "full", else the default.

    Raises:
        ValueError: for another word, which would otherwise be taken for one of the two.
    """
    size = os.environ.get("GAE_SIZE") or default
    if size not in SIZES:
        raise ValueError(f"GAE_SIZE must be {' or '.join(SIZES)}, or not set, got {size!r}")
    return size


def _digits() -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x.reshape(-1, 1, 8, 8) / 16, y, random_state=0)  # 75 % and 25 %
    x_train, x_test = (torch.from_numpy(a).float() for a in parts[:2])
    y_train, y_test = (torch.from_numpy(a).long() for a in parts[2:])
    return Images("digits", x_train, y_train, x_test, y_test)


_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
NAMES = ("digits", *_TORCHVISION)  # of images
ROWS = {"mnist": 60_000, "fashion_mnist": 60_000, "digits": 1_347}  # for training


def load(name: str, *, root: str | Path | None = None, download: bool = False) -> Images:
    """Load images by name: ``digits`` (8x8, inside scikit-learn), ``mnist`` or ``fashion_mnist`` (28x28).

    Args:
        name: which data set.
        root: folder that holds or receives the files; see :func:`data_root`.
        download: fetch what is missing. Never done unasked.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: if the files are not there, damaged, or cannot be fetched; the message says which, and how
            to get them.
    """
    if name == "digits":
        return _digits()
    if name not in _TORCHVISION:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    import torchvision

    root = data_root(root)
    dataset = getattr(torchvision.datasets, _TORCHVISION[name])
    folder = root / _TORCHVISION[name] / "raw"
    archives = {folder / file: md5 for file, md5 in dataset.resources}
    # Files that were put there as they are published are unpacked without a network, if all are there and whole.
    broken = [path for path, md5 in archives.items() if not torchvision.datasets.utils.check_integrity(path, md5)]
    damaged = [path for path in broken if path.exists()]
    for unpacked in (path.with_suffix("") for path in archives):
        if unpacked.exists() and not _whole(unpacked):
            if download or not broken:
                unpacked.unlink()  # or it would be taken for what is in its archive
            damaged.append(unpacked)
    told = f" (damaged: {', '.join(path.name for path in damaged)})" if damaged else ""
    by_hand = f"put its four .gz files into {folder}, or name another folder with GAE_DATA"
    try:
        train, test = (dataset(root, train=part, download=download or not broken) for part in (True, False))
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        if download:
            why = " ".join(str(error).split())
            raise FileNotFoundError(
                f"{name} could not be fetched into {root}{told}: {why} Without a network, {by_hand}"
            ) from error
        raise FileNotFoundError(
            f"{name} is not in {root}{told}: run `python -m gae_core data {name}`, or {by_hand}"
        ) from error
    return Images(name, train.data[:, None], train.targets, test.data[:, None], test.targets)


def _whole(path: Path) -> bool:
    """Whether a file in MNIST's format is as long as its head says: two zeros, type, dimensions, sizes, bytes."""
    with path.open("rb") as file:
        head = file.read(16)
    if len(head) < 8 or head[:3] != b"\0\0\x08":
        return False
    sizes = [int.from_bytes(head[i : i + 4], "big") for i in range(4, 4 + 4 * head[3], 4)]
    return path.stat().st_size == 4 * (1 + len(sizes)) + math.prod(sizes)


def example_images(*, root: str | Path | None = None) -> Images:
    """MNIST when it is there, else the digits inside scikit-learn. Prints which; it is also the result's name."""
    try:
        images = load("mnist", root=root)
    except FileNotFoundError:
        images = load("digits")
    height, width = images.shape[1:]
    print(f"data: {images.name}, {len(images.x_train):,} training images of {height}×{width}")
    return images


def stack(images: Images, digits: int = 3, *, train: int, test: int, seed: int = 0) -> Images:
    """Stacked MNIST: images of independent random classes as the channels of one, whose class is their number.

    Three digits make 1,000 classes of equal chance up to the frequencies of the digits, and known to a classifier of
    one digit. Digits of training images come from training images, those of test images from test images.

    Args:
        images: grey images of ten classes, such as MNIST.
        digits: channels of the result.
        train: how many training images are made, once and for all.
        test: how many test images.
        seed: of what is stacked.

    Returns:
        Images (n, digits, height, width) named "stacked_<name>"; class 100 a + 10 b + c of the digits a, b, c.

    Raises:
        ValueError: for images that have channels or other than ten classes, or a number below 1.
    """
    if min(digits, train, test) < 1:
        raise ValueError(f"digits, train and test must be at least 1, got {digits}, {train} and {test}")
    if images.shape[0] != 1 or int(images.y_train.max()) != 9:
        raise ValueError(f"images must be grey and of ten classes, got shape {images.shape}")
    generator = stream(seed, "data")
    parts: list[Tensor] = []
    for x, y, n in ((images.x_train, images.y_train, train), (images.x_test, images.y_test, test)):
        rows = torch.randint(len(x), (n, digits), generator=generator)
        place = 10 ** torch.arange(digits - 1, -1, -1)
        parts += [x[rows, 0], (y[rows] * place).sum(1)]
    return Images(f"stacked_{images.name}", *parts)


@dataclass(frozen=True)
class Toy:
    """A density in the plane that can be sampled and evaluated; points of another shape raise a ValueError.

    Attributes:
        name: name of the toy.
        sample: ``sample(n, generator=None)`` draws n points, (n, 2), float32.
        log_prob: ``log_prob(x)`` is the log-density in nats at x of shape (n, 2), shape (n,).
        modes: centres of the components, (modes, 2), where there are any, else None.
        std: standard deviation of the noise around centre or curve, per coordinate.
    """

    name: str
    sample: Callable[..., Tensor]
    log_prob: Callable[[Tensor], Tensor]
    modes: Tensor | None
    std: float

    def scaled(self, factor: float) -> "Toy":
        """The toy whose points are ``factor`` times those of this one.

        Raises:
            ValueError: if ``factor`` is no positive number.
        """
        if not 0 < factor < math.inf:
            raise ValueError(f"factor must be a positive number, got {factor}")

        def sample(n: int, generator: Generator | None = None) -> Tensor:
            return factor * self.sample(n, generator)

        def log_prob(x: Tensor) -> Tensor:
            return self.log_prob(_in_the_plane(x) / factor) - 2 * math.log(factor)

        return Toy(self.name, sample, log_prob, None if self.modes is None else factor * self.modes, factor * self.std)


def _in_the_plane(x: Tensor) -> Tensor:
    if x.ndim != 2 or x.shape[1] != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floats of shape (n, 2), got {x.dtype} {tuple(x.shape)}")
    return x


def _gaussians(name: str, modes: Tensor, std: float) -> Toy:
    def sample(n: int, generator: Generator | None = None) -> Tensor:
        return modes[torch.randint(len(modes), (n,), generator=generator)] + std * torch.randn(
            n, 2, generator=generator
        )

    def log_prob(x: Tensor) -> Tensor:
        squared = (_in_the_plane(x)[:, None] - modes.to(x)).square().sum(-1)
        return torch.logsumexp(-squared / (2 * std**2), 1) - math.log(2 * math.pi * std**2 * len(modes))

    return Toy(name, sample, log_prob, modes, std)


def _eight_gaussians() -> Toy:
    angle = torch.arange(8) * math.pi / 4
    return _gaussians("eight_gaussians", 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.1)


def _twenty_five_gaussians() -> Toy:
    axis = torch.arange(-4.0, 5.0, 2.0)
    return _gaussians("twenty_five_gaussians", torch.cartesian_prod(axis, axis), 0.05)


def _swiss_roll(std: float = 0.1) -> Toy:
    """Noise N(0, std² I) around the spiral t (cos t, sin t) / 5 with t uniform on [1.5 pi, 4.5 pi]."""
    low, high = 1.5 * math.pi, 4.5 * math.pi

    def curve(t: Tensor) -> Tensor:
        return torch.stack([t * t.cos(), t * t.sin()], -1) / 5

    def sample(n: int, generator: Generator | None = None) -> Tensor:
        t = low + (high - low) * torch.rand(n, generator=generator)
        return curve(t) + std * torch.randn(n, 2, generator=generator)

    def log_prob(x: Tensor) -> Tensor:
        # The integral over t by Simpson's rule, whose step along the curve is at most std / 8.
        t = torch.linspace(low, high, 2401, dtype=torch.float64, device=x.device)
        weight = torch.full_like(t, (high - low) / 2400 * 2 / 3)
        weight[1::2] *= 2
        weight[[0, -1]] /= 2
        squared = torch.cdist(_in_the_plane(x).double(), curve(t)).square()
        log_integral = torch.logsumexp(-squared / (2 * std**2) + weight.log(), 1)
        return (log_integral - math.log((high - low) * 2 * math.pi * std**2)).to(x.dtype)

    return Toy("swiss_roll", sample, log_prob, None, std)


def _rings(std: float = 0.1) -> Toy:
    """Noise N(0, std² I) around circles of radius 1, 2, 3, each with a third of the points."""
    radii = torch.tensor([1.0, 2.0, 3.0])

    def sample(n: int, generator: Generator | None = None) -> Tensor:
        radius = radii[torch.randint(3, (n,), generator=generator)]
        angle = 2 * math.pi * torch.rand(n, generator=generator)
        circle = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        return circle + std * torch.randn(n, 2, generator=generator)

    def log_prob(x: Tensor) -> Tensor:
        # Averaging the Gaussian over the angle gives the Bessel function I_0; i0e is I_0(u) exp(-u).
        norm, radius = torch.linalg.vector_norm(_in_the_plane(x), dim=-1, keepdim=True), radii.to(x)
        log_ring = torch.special.i0e(norm * radius / std**2).log() - (norm - radius) ** 2 / (2 * std**2)
        return torch.logsumexp(log_ring, 1) - math.log(3 * 2 * math.pi * std**2)

    return Toy("rings", sample, log_prob, None, std)


_TOYS = {
    "eight_gaussians": _eight_gaussians,
    "twenty_five_gaussians": _twenty_five_gaussians,
    "swiss_roll": _swiss_roll,
    "rings": _rings,
}


def toy(name: str) -> Toy:
    """A toy density: ``eight_gaussians``, ``twenty_five_gaussians``, ``swiss_roll`` or ``rings``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _TOYS:
        raise ValueError(f"name must be one of {', '.join(_TOYS)}, got {name!r}")
    return _TOYS[name]()
