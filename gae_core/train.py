"""One training loop for every model."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gae_core.data import to_unit

History = dict[str, Tensor]


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device named, or for "auto" CUDA when it is there and the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    schedule: Callable[[float], float] | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    callback: Callable[[nn.Module, int], None] | None = None,
    progress: bool = True,
) -> History:
    """Train a model in place with Adam on the mean of its loss.

    Each epoch passes over the data once, in a new order; the rows left over by the last whole batch are left out of
    that epoch (a small batch would be no fair sample for what is computed over a batch). The order and the model's
    noise come from ``seed`` alone; the initial weights are the caller's.

    Args:
        model: has ``loss(x, y, generator=...)``, which returns a dataclass with ``total`` and other terms,
            each of shape (batch,). It is moved to the device, and left in evaluation mode.
        x: data, (n, ...): floating point, or bytes, which become floats in [0, 1] by the batch. Held on the device.
        y: labels or other conditions, (n, ...), passed on to the loss.
        epochs: passes over the data in total, those before a resumption included.
        batch_size: rows of a step, at most n.
        lr: learning rate of Adam, at its start when there is a schedule.
        schedule: factor of the learning rate as a function of the progress in [0, 1), for example
            ``lambda t: 1 - t``.
        device: "auto" takes CUDA when it is there.
        seed: of the order of the data and of the generator given to the loss.
        checkpoint: file that receives the state of the training after each epoch, written beside it and then renamed.
        resume: go on from ``checkpoint`` if it exists. On the CPU the result is that of a training never stopped.
        callback: called as ``callback(model, epoch)`` after each epoch, counted from 1, in evaluation mode. Its use of
            randomness does not change the training, unless it changes the model.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        Mean of each term of the loss on each step, float32, shape (steps,), on the CPU.

    Raises:
        ValueError: for arguments that do not fit together, or a checkpoint of another training.
        FileExistsError: if ``checkpoint`` exists and ``resume`` was not asked for.
        FloatingPointError: if a term or the gradient becomes NaN or infinite; the weights stay those before the step
            (batch norm's running averages have seen the batch), and the last checkpoint is left as it is.
    """
    if epochs < 1 or not 1 <= batch_size <= len(x):
        raise ValueError(
            f"epochs must be at least 1 and batch_size between 1 and n, "
            f"got epochs={epochs}, batch_size={batch_size}, n={len(x)}"
        )
    if y is not None and len(y) != len(x):
        raise ValueError(f"y must have one row for each row of x, got {len(y)} and {len(x)}")
    device = pick_device(device)
    model.to(device)
    x, y = x.to(device), None if y is None else y.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    steps = len(x) // batch_size
    history: dict[str, list[Tensor]] = {}
    done = 0

    # What must agree for a checkpoint to be of this training.
    settings = {"rows": len(x), "batch_size": batch_size, "lr": lr, "seed": seed}
    if schedule is not None:
        settings["epochs"] = epochs  # the schedule depends on the end
    if checkpoint is not None and (checkpoint := Path(checkpoint)).exists():
        if not resume:
            raise FileExistsError(f"{checkpoint} exists: pass resume=True to go on from it, or remove it")
        done, history = _load(checkpoint, settings, epochs, model, optimizer, order, noise)

    show = progress and sys.stderr.isatty()
    for epoch in range(done, epochs):
        model.train()
        rows = torch.randperm(len(x), generator=order).to(device)
        for step in tqdm(range(steps), desc=f"epoch {epoch + 1}/{epochs}", leave=False, disable=not show):
            batch = rows[step * batch_size : (step + 1) * batch_size]
            if schedule is not None:
                optimizer.param_groups[0]["lr"] = lr * schedule((epoch * steps + step) / (epochs * steps))
            loss = model.loss(to_unit(x[batch]), None if y is None else y[batch], generator=noise)
            terms = {field.name: getattr(loss, field.name).mean() for field in dataclasses.fields(loss)}
            for name, value in terms.items():
                if not torch.isfinite(value):
                    raise FloatingPointError(f"loss term {name!r} is {value.item()} at epoch {epoch + 1}, step {step}")
                history.setdefault(name, []).append(value.detach())
            optimizer.zero_grad()
            terms["total"].backward()
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            if not torch.isfinite(norm):
                raise FloatingPointError(f"gradient's norm is {norm.item()} at epoch {epoch + 1}, step {step}")
            optimizer.step()
        model.eval()
        if checkpoint is not None:
            _save(checkpoint, settings, epoch + 1, history, model, optimizer, order, noise)
        if callback is not None:
            callback(model, epoch + 1)
    model.eval()
    return {name: torch.stack(values).float().cpu() for name, values in history.items()}


def _save(path, settings, epoch, history, model, optimizer, order, noise) -> None:
    """Write a checkpoint beside ``path``, then rename it: a crash leaves the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    state = {
        "settings": settings,
        "epoch": epoch,
        "history": {name: torch.stack(values).cpu() for name, values in history.items()},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "order": order.get_state(),
        "noise": noise.get_state(),
    }
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _load(path, settings, epochs, model, optimizer, order, noise) -> tuple[int, dict[str, list[Tensor]]]:
    """Restore everything from a checkpoint of the same training; returns epochs done and the history."""
    device = next(model.parameters()).device
    state = torch.load(path, weights_only=True, map_location=device)
    if state["settings"] != settings:
        raise ValueError(f"{path} is of another training: it has {state['settings']}, this call has {settings}")
    if state["epoch"] > epochs:
        raise ValueError(f"{path} has {state['epoch']} epochs done, more than epochs={epochs}")
    shapes, here = ({name: tuple(v.shape) for name, v in s.items()} for s in (state["model"], model.state_dict()))
    if shapes != here:  # compared before anything is loaded: load_state_dict would stop half-way
        name = next(name for name in shapes | here if shapes.get(name) != here.get(name))
        raise ValueError(f"{path} is of another model: {name} is {shapes.get(name)} there and {here.get(name)} here")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    order.set_state(state["order"].cpu())
    noise.set_state(state["noise"].cpu())
    return state["epoch"], {name: list(values) for name, values in state["history"].items()}
