"""The classifier whose features and labels the metrics use: trained here, kept with its accuracy."""

import json
from pathlib import Path

import torch

from gae_core import data, metrics, records, train
from gae_core.models.classifier import Classifier


def about(name: str, seed: int = 0) -> dict:
    """What is written beside the classifier of a data set: its accuracy, seed and epochs. Empty if it is not there."""
    return records.read(_file(name, seed).with_suffix(".json"))


def _file(name: str, seed: int) -> Path:
    return data.data_root() / f"classifier-{name}-{seed}.pt"


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
    path = _file(images.name, seed)
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
    told = {"data": images.name, "seed": seed, "epochs": epochs, "accuracy": accuracy}
    path.with_suffix(".json").write_text(json.dumps(told))  # last: where it is, the weights are whole
    return model
