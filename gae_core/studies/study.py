"""What a study is: a recipe, which is run and recorded, and what a run of it gives."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gae_core import train
from gae_core.train import Training


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a run depends on, but its data, its seed and the machine. A study's own recipe has more fields.

    Attributes:
        epochs: passes over the training data, 0 where nothing is trained.
    """

    epochs: int = 0

    def settings(self) -> dict[str, Any]:
        """The fields, as a record keeps them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True, kw_only=True)
class Trained(Recipe):
    """A recipe with a training by :func:`gae_core.train.fit`, which has what else they mean.

    Attributes:
        batch_size: rows of a step.
        lr: learning rate at the start.
        schedule: "1 - t" if it falls to 0 along a line, "constant" if not.
        optimizer: "adam" or "sgd".
        betas: of Adam.
        clip: largest norm of the gradient.
    """

    batch_size: int = 128
    lr: float = 2e-3
    schedule: str = "1 - t"
    optimizer: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("1 - t", "constant"):
            raise ValueError(f'schedule must be "1 - t" or "constant", got {self.schedule!r}')

    def fit(self, model: nn.Module, x: Tensor, y: Tensor | None = None, **options) -> Training:
        """Train a model by this recipe; ``seed``, ``device`` and so on go to :func:`gae_core.train.fit`."""
        return train.fit(
            model,
            x,
            y,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule=(lambda t: 1 - t) if self.schedule == "1 - t" else None,
            optimizer=self.optimizer,
            betas=tuple(self.betas),
            clip=self.clip,
            **{"progress": False, **options},
        )


def check_known(**given: tuple[str, Collection[str]]) -> None:
    """Raise a ValueError unless each value is one of those that there are: ``check_known(size=(size, SIZES))``."""
    for name, (value, known) in given.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def together(trainings: Sequence[Training]) -> Training:
    """Several trainings of one run as one, without a history: times and rows add up, parameters are the first one's."""
    sums = {name: sum(getattr(t, name) for t in trainings) for name in ("seconds", "processor_seconds", "rows")}
    return Training({}, **sums, parameters=trainings[0].parameters)


@dataclass(frozen=True)
class Outcome:
    """What one seed of a study gave.

    Attributes:
        metrics: name -> value, with the unit in the name where it is neither nats nor plain.
        training: what the training was; its history is not recorded.
        curves: name -> values in the course of the training.
        figure: a matplotlib figure, kept for the first seed.
        classifier: of :func:`gae_core.studies.judge.about`, if metrics are in its features.
    """

    metrics: Mapping[str, float]
    training: Training
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    figure: Any = None
    classifier: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A named run that can be recorded.

    Attributes:
        about: one line on what it is.
        topic: studies of one topic stand in one table of the Results page.
        data: names of the data sets that it can run on, the first of them by default.
        recipe: ``recipe(data, size)``, the size one of "short", "medium" and "full".
        run: ``run(recipe, data, seed, device)`` trains and measures one seed.
        build: ``build(recipe, shape, seed)`` makes the model, of studies that ``python -m gae_core train`` can train.
    """

    about: str
    topic: str
    data: tuple[str, ...]
    recipe: Callable[[str, str], Recipe]
    run: Callable[[Any, str, int, torch.device], Outcome]
    build: Callable[[Any, Sequence[int], int], nn.Module] | None = None


SIZES = {
    "short": "seconds, to see that it runs",
    "medium": "minutes on two cores",
    "full": "for a GPU, as published where there is a publication",
}
