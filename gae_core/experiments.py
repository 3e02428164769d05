"""What the notebooks share and would otherwise repeat: the classifier whose features the metrics use."""

import json

import torch

from gae_core import data, train
from gae_core.metrics import in_batches
from gae_core.models.classifier import Classifier


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
        torch.manual_seed(seed)
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
        logits = in_batches(model, images.x_test)
        accuracy = (logits.argmax(1) == images.y_test).double().mean().item()
        record.write_text(json.dumps({"data": images.name, "seed": seed, "epochs": epochs, "accuracy": accuracy}))
    return model
