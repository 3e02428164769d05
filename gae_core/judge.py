"""The classifier whose features and labels the metrics use: trained here, kept with its accuracy."""

import hashlib
import json
import os
from pathlib import Path

import torch

from gae_core import data, metrics, records, train
from gae_core.models.classifier import Classifier

LR = 2e-3


def about(images: data.Images, *, seed: int = 0) -> dict:
    """What is written beside the classifier of these images: its accuracy, seed and epochs. Empty if there is none."""
    return records.read(_file(images, seed).with_suffix(".json"))


def _epochs(images: data.Images) -> int:
    return max(4, 50_000 // len(images.x_train))


def _file(images: data.Images, seed: int) -> Path:
    """Where the weights are: the name has a digest of what they depend on, so that a part of a data set has its own."""
    digest = hashlib.sha256(json.dumps([_epochs(images), LR]).encode())
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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
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
    options = {"epochs": epochs, "lr": LR, "schedule": lambda t: 1 - t, "seed": seed, "progress": False}
    train.fit(model, images.x_train, images.y_train, device="cpu", **options)  # weights that can be made again
    logits = metrics.in_batches(model, images.x_test)
    accuracy = (logits.argmax(1) == images.y_test).double().mean().item()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # a crash, or a second run, leaves no half of a file
    torch.save({"model": model.state_dict()}, temporary)
    temporary.replace(path)
    told = {"data": images.name, "seed": seed, "epochs": epochs, "images": len(images.x_train), "accuracy": accuracy}
    records.write(path.with_suffix(".json"), told)  # last: where it is, the weights are whole
    return model
