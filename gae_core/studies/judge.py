"""The classifier whose features and labels the metrics use: trained here, kept with its accuracy."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gae_core import data, metrics, records, train
from gae_core.seeds import fresh, seed_of

LR = 2e-3


@dataclass(frozen=True)
class ClassifierLoss:
    """Terms of the loss, each of shape (batch,): cross-entropy in nats."""

    total: Tensor


class Classifier(nn.Module):
    """Two convolutions, each halving the image, and one hidden layer of features.

    Args:
        shape: shape of one image, (channels, height, width), sides divisible by 4.
        classes: number of classes.
        features: width of the last hidden layer.

    Raises:
        ValueError: for another shape; from the loss, for labels that are not integers 0 to classes - 1, one for each x.
    """

    def __init__(self, shape: tuple[int, ...], classes: int = 10, *, features: int = 64) -> None:
        super().__init__()
        if len(shape) != 3 or shape[1] % 4 or shape[2] % 4:
            raise ValueError(f"shape must be (channels, height, width), sides divisible by 4, got {tuple(shape)}")
        channels, height, width = shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 5, stride=2, padding=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, stride=2, padding=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images x in [0, 1], (batch, channels, height, width)."""
        return self.head(self.features(x))

    def loss(self, x: Tensor, y: Tensor, *, generator: Generator | None = None) -> ClassifierLoss:
        """Cross-entropy of labels y (batch,); ``generator`` is there for the common interface and not used."""
        if y.shape != (len(x),) or y.is_floating_point():
            raise ValueError(f"y must be integer labels of shape ({len(x)},), got {y.dtype} {tuple(y.shape)}")
        if ((y < 0) | (y >= self.head.out_features)).any():  # torch would leave out the rows of label -100
            raise ValueError(
                f"y must be labels 0 to {self.head.out_features - 1}, got {int(y.min())} to {int(y.max())}"
            )
        return ClassifierLoss(F.cross_entropy(self(x), y.long(), reduction="none"))


def about(images: data.Images, *, seed: int = 0) -> dict:
    """What is written beside the classifier of these images: its accuracy, seed and epochs. Empty if there is none."""
    return records.read(_file(images, seed).with_suffix(".json"))


def _epochs(images: data.Images) -> int:
    return max(4, 50_000 // len(images.x_train))


def _file(images: data.Images, seed: int) -> Path:
    """Where the weights are: the name has a digest of what they depend on, so that a part of a data set has its own."""
    digest = hashlib.sha256(json.dumps([_epochs(images), LR, seed_of(seed, "other training")]).encode())
    for values in (images.x_train, images.y_train):
        digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.cpu().contiguous().numpy())
    return data.data_root() / f"classifier-{images.name}-{seed}-{digest.hexdigest()[:12]}.pt"


def classifier(images: data.Images, *, seed: int = 0) -> Classifier:
    """The classifier of a data set: trained when first needed, then kept in the data folder with its accuracy.

    It is trained on the CPU wherever the models are: figures in its features can be compared if the weights are equal.

    Args:
        images: data set that it is trained on and tested with. A part of a data set gets a classifier of its own.
        seed: of its weights and of its training.

    Returns:
        The classifier on the CPU, in evaluation mode. Its test accuracy is beside its weights, in
        ``classifier-<name>-<seed>-<digest>.json`` in :func:`gae_core.data.data_root`; the digest is that of the
        training images, their labels, and how often they are seen.

    Raises:
        ValueError: if what is kept there is damaged, with its name.
    """
    path = _file(images, seed)
    own = seed_of(seed, "other training")  # no model of a run has its weights or its order
    with fresh(own):
        model = Classifier(images.shape, int(images.y_train.max()) + 1).eval()
    if path.exists() and about(images, seed=seed):
        try:
            model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model"])
        except OSError:
            raise
        except Exception as error:  # any of a dozen: what a damaged file contains is not known
            raise ValueError(f"{path} is damaged: delete it, and the classifier is trained again") from error
        return model
    records.writable(path.parent)
    epochs = _epochs(images)
    options = {"epochs": epochs, "lr": LR, "schedule": lambda t: 1 - t, "seed": own, "progress": False}
    train.fit(model, images.x_train, images.y_train, device="cpu", **options)  # weights that can be made again
    logits = metrics.in_batches(model, images.x_test)
    accuracy = (logits.argmax(1) == images.y_test).double().mean().item()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # a crash, or a second run, leaves no half of a file
    torch.save({"model": model.state_dict()}, temporary)
    temporary.replace(path)
    told = {"data": images.name, "seed": seed, "epochs": epochs, "images": len(images.x_train), "accuracy": accuracy}
    records.write(path.with_suffix(".json"), told)  # last: where it is, the weights are whole
    return model
