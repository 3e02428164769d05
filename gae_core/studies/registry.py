"""Every study by its name, and models that are trained by the name of their study."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from gae_core import records, train
from gae_core.studies import (
    bn_vae,
    bn_vae_text,
    completion,
    cvae,
    denoising,
    family,
    image_models,
    image_prior,
    meg_chains,
    meg_controls,
    meg_images,
    meg_plane,
    recording,
    vae,
)
from gae_core.studies.study import Study

TOPICS = (
    *(image_models, bn_vae, bn_vae_text, completion, cvae, denoising, family, image_prior),
    *(meg_plane, meg_controls, meg_chains, meg_images, vae),
)
STUDIES: dict[str, Study] = {name: study for topic in TOPICS for name, study in topic.STUDIES.items()}
MODELS = {name: study for name, study in STUDIES.items() if study.build}  # that are trained without being recorded


def record(name: str, **options) -> Path:
    """Record a study by its name: see :func:`gae_core.studies.recording.record`."""
    return recording.record(name, STUDIES[name], **options)


def file_of(study: Study) -> str:
    """The file in which a study is made."""
    return f"{recording.unwrapped(study.run).__module__.replace('.', '/')}.py"


def stale(folder: Path) -> dict[Path, list[str]]:
    """The records in a folder that today's studies would make otherwise -> the keys in which they differ."""
    differ = {}
    for path in sorted(folder.glob("*/*-*.json")):
        if not path.name.endswith(".part.json"):
            old, (data, _, size) = records.read(path), path.stem.rpartition("-")
            study = STUDIES.get(path.parent.name)
            made = recording.made_as(path.parent.name, study, data, size) if study else {"model": None}
            if keys := [key for key, value in made.items() if old.get(key) != value]:
                differ[path] = keys
    return differ


def build(name: str, shape: Sequence[int], *, data: str, size: str, seed: int) -> nn.Module:
    """The model of a study, with fresh weights that depend on ``seed`` alone.

    Raises:
        ValueError: for an unknown name, or one whose study trains more than a model.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name].build(MODELS[name].recipe(data, size), shape, seed)


def fit(name: str, model: nn.Module, x: torch.Tensor, *, data: str, size: str, **options) -> train.Training:
    """Train a model as its study does; options go to :func:`gae_core.train.fit`."""
    return MODELS[name].recipe(data, size).fit(model, x, **options)


def label(model: nn.Module, **about) -> None:
    """Let the model's state, and with it every checkpoint, say what the model is: a buffer of JSON, as bytes."""
    model.register_buffer("about", torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8))


def load_checkpoint(path: Path) -> tuple[nn.Module, dict]:
    """The model of a checkpoint whose model was given to :func:`label` with name, data, shape, size and seed.

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
    model = build(about["name"], about["shape"], data=about["data"], size=about["size"], seed=about["seed"])
    model.load_state_dict(state)
    return model.eval(), about
