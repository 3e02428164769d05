"""What a training is: what it was in the end, where it stands, and the clock beside it."""

import contextlib
import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

History = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """What a training was.

    Attributes:
        history: mean of each term of the loss on each step, float32, shape (steps,), on the CPU. With players the names
            are "player term", and each has the steps of its player. It begins with the training, wherever it was
            resumed.
        seconds: of this call's steps by the clock on the wall, without what the callback and the checkpoints took.
        processor_seconds: of this process meanwhile: what others do on the machine does not count, each thread does.
        rows: that this call's steps saw, each as often as it was seen.
        parameters: numbers that were trained.
    """

    history: History
    seconds: float
    processor_seconds: float
    rows: int
    parameters: int


class Clock:
    """Seconds by the clock on the wall and of the processor, without those in which it was stopped."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.wall, self.busy = device, 0.0, 0.0
        self._go()

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def _go(self) -> None:
        self.started = self._now()

    def _stop(self) -> None:
        wall, busy = self._now()
        self.wall, self.busy = self.wall + wall - self.started[0], self.busy + busy - self.started[1]

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens within it does not count."""
        self._stop()
        try:
            yield
        finally:
            self._go()

    def seconds(self) -> tuple[float, float]:
        """All of them; after it the clock is of no use."""
        self._stop()
        return self.wall, self.busy


@dataclass
class State:
    """Where a training stands, as it is kept in a checkpoint.

    Attributes:
        settings: what must agree for a checkpoint to be of this training.
        model: that is trained.
        optimizers: of each player.
        order: stream of the order of the rows.
        noise: stream of the model's noise.
        history: of each term, one value a step.
        steps: that were made.
    """

    settings: dict
    model: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    order: torch.Generator
    noise: torch.Generator
    history: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0

    def save(self, path: Path, order: Tensor) -> None:
        """Write beside ``path``, then rename: a crash leaves the old file or the new one, never half of one.

        Args:
            path: of the checkpoint.
            order: state of the stream of the order, with which the training goes on from there.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        state = {
            "settings": self.settings,
            "steps": self.steps,
            "history": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.history.items()},
            "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "order": order,
            "noise": self.noise.get_state(),
        }
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch answers a full disk with the latter
            temporary.unlink(missing_ok=True)
            told = str(error).partition("\n")[0]
            raise OSError(f"cannot write {path}, is the disk full? What was there is as it was. {told}") from error
        temporary.replace(path)

    def load(self, path: Path, epochs: int, steps: int) -> None:
        """Restore everything from a checkpoint of the same training, with ``steps`` an epoch, or nothing."""
        device = next(self.model.parameters()).device
        try:
            state = torch.load(path, weights_only=True, map_location=device)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is no checkpoint, or a damaged one: {error}") from error
        if state.get("settings") != self.settings:
            raise ValueError(
                f"{path} is of another training: it has {state.get('settings')}, this call has {self.settings}"
            )
        if state["steps"] > epochs * steps:
            raise ValueError(f"{path} has {state['steps'] / steps:g} epochs done, more than epochs={epochs}")
        shapes, here = (
            {name: tuple(v.shape) for name, v in s.items()} for s in (state["model"], self.model.state_dict())
        )
        if shapes != here:  # compared before anything is loaded: load_state_dict would stop half-way
            name = next(name for name in shapes | here if shapes.get(name) != here.get(name))
            raise ValueError(
                f"{path} is of another model: {name} is {shapes.get(name)} there and {here.get(name)} here"
            )
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.order.set_state(state["order"].cpu())
        self.noise.set_state(state["noise"].cpu())
        self.steps = state["steps"]
        self.history = {name: values.tolist() for name, values in state["history"].items()}
