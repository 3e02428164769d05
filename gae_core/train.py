"""One training loop for every model."""

import math
import numbers
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gae_core import parallel
from gae_core.data import to_unit
from gae_core.seeds import stream
from gae_core.training import Clock, State, Training

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device named, or for "auto" CUDA when it is there and the CPU otherwise.

    Raises:
        ValueError: if there is no such device, or none of that name.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one that is here, torch sees {torch.cuda.device_count()} CUDA devices here, got '{chosen}'"
        )
    return chosen


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: str = "adam",
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: Callable[[float], float] | None = None,
    clip: float | None = None,
    device: str | torch.device = "auto",
    precision: str = "float32",
    compile: bool | str = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    callback: Callable[[nn.Module, int], None] | None = None,
    progress: bool = True,
) -> Training:
    """Train a model in place, with Adam or plain gradient descent, on the mean of its loss.

    What would train, but not what was meant, is refused before the first step or at it: data that are no tensor, have
    NaN or another precision than the model; a loss without one value for each row; a ``resume`` without a file.

    Each epoch passes over the data once, in a new order; the rows left over by the last whole batch are left out of
    that epoch (a small batch would be no fair sample for what is computed over a batch). The order and the model's
    noise come from ``seed`` alone, each from its stream (:mod:`gae_core.seeds`); the initial weights are the caller's.

    A model with opposing players has ``players``, which maps each player's name to (its parameters, its steps a
    round), and a ``loss`` that takes ``player=name``. The players take turns in that order, each with an optimizer of
    its own, each step on a new batch; a step changes the parameters of its player alone.

    Started with ``torchrun``, the processes share every batch and average their gradients: see
    :mod:`gae_core.parallel`, by which a model draws its noise, lest all processes draw the same. The batch norm and the
    entropy of the code are those of the whole batch, and so is what stands for the entropy of samples; other batch
    norms and free bits see the rows of their process. The first process
    alone writes checkpoints (to a folder that all see), shows progress and calls back.

    Args:
        model: has ``loss(x, y, generator=...)``, which returns a dataclass with ``total`` and other terms,
            each of shape (batch,). It is moved to the device, and left in evaluation mode.
        x: data, (n, ...): floating point, bytes, which become floats in [0, 1] by the batch, or tokens. Held on the
            device.
        y: labels or other conditions, (n, ...), passed on to the loss.
        epochs: passes over the data in total, those before a resumption included.
        batch_size: rows of a step, at most n, over all processes.
        lr: learning rate, at its start when there is a schedule.
        optimizer: "adam" or "sgd", without momentum.
        betas: decay rates of Adam's averages of the gradient and of its square; opposing players often want less.
        schedule: factor of the learning rate as a function of the progress in [0, 1), for example
            ``lambda t: 1 - t``.
        clip: largest norm of a player's gradient; a longer one is shortened to it.
        device: "auto" takes CUDA when it is there.
        precision: "float32" leaves the model's own precision; "bf16" is torch's autocast, which pays where the
            matrices are large; "auto" is "bf16" on CUDA devices that have it. In bf16 a code keeps 8 bits of
            mantissa: in few dimensions codes coincide, and the nearest-neighbour entropy refuses those.
        compile: True compiles the loss with ``torch.compile``, for tens of seconds at the first step (of each player).
            "reduce-overhead" captures CUDA graphs as well: kernels without the time to launch each.
        seed: of the order of the data and of the generator given to the loss.
        checkpoint: file that receives the state of the training after each epoch, written beside it and then renamed.
        checkpoint_every: steps between further checkpoints within an epoch.
        resume: go on from ``checkpoint``, which must be named, if it exists. On the CPU the result is that of a
            training never stopped.
        callback: called as ``callback(model, epoch)`` after each epoch, counted from 1, in evaluation mode. Its use of
            randomness does not change the training, unless it changes the model.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        Its history, times and sizes.

    Raises:
        ValueError: for arguments that do not fit together, data with NaN or infinite entries, a model or loss of
            another kind, or a checkpoint of another training.
        FileExistsError: if ``checkpoint`` exists and ``resume`` was not asked for.
        FloatingPointError: if a term or the gradient becomes NaN or infinite; the weights stay those before the step
            (batch norm's running averages have seen the batch, but for
            :class:`gae_core.normalization.CodeBatchNorm`'s, which refuse what is not finite), and the last checkpoint
            is left as it is.
        OSError: if a checkpoint cannot be written; the one before is left as it is.
    """
    device = pick_device(device)
    _check_data(model, x, y)
    parallel.start(device)
    rank, size = parallel.rank_and_size()
    _check_options(
        len(x),
        None if y is None else len(y),
        size,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        betas=betas,
        clip=clip,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    loss_of, cast = _compiled(model.loss, compile, device), _autocast(precision, device)
    model.to(device)
    x, y = x.to(device), None if y is None else y.to(device)
    players = getattr(model, "players", {"": (model.parameters(), 1)})
    turns = [name for name, (_, count) in players.items() for _ in range(count)]
    parameters = {name: [p for p in group if p.requires_grad] for name, (group, _) in players.items()}
    if frozen := [name or "the model" for name, group in parameters.items() if not group]:
        raise ValueError(f"model must have parameters that require a gradient, got none of {', '.join(frozen)}")
    rates = {"lr": lr, "fused": True} | ({"betas": betas} if optimizer == "adam" else {})
    optimizers = {name: OPTIMIZERS[optimizer](group, **rates) for name, group in parameters.items()}
    steps = len(x) // batch_size

    # What must agree for a checkpoint to be of this training.
    settings = {
        "rows": len(x),
        "batch_size": batch_size,
        "lr": lr,
        "seed": int(seed),
        "clip": clip,
        "precision": precision,
    }
    if optimizer != "adam":
        settings["optimizer"] = optimizer
    if betas != (0.9, 0.999):
        settings["betas"] = tuple(betas)
    if schedule is not None:
        settings["epochs"] = epochs  # the schedule depends on the end
    order, noise = stream(seed, "order"), stream(seed, "noise", device=device)
    state = State(settings, model, optimizers, order, noise)
    if checkpoint is not None and (checkpoint := Path(checkpoint)).exists():
        if not resume:
            raise FileExistsError(f"{checkpoint} exists: pass resume=True to go on from it, or remove it")
        state.load(checkpoint, epochs, steps)
    done, clock = state.steps, Clock(device)
    if size > 1:
        parallel.broadcast_(model.state_dict().values())

    show = progress and rank == 0 and sys.stderr.isatty()
    try:
        for epoch in range(done // steps, epochs):
            model.train()
            order_before = order.get_state()
            rows = torch.randperm(len(x), generator=order).to(device)
            for step in tqdm(range(steps), desc=f"epoch {epoch + 1}/{epochs}", leave=False, disable=not show):
                number = epoch * steps + step
                if number < done:
                    continue
                player = turns[number % len(turns)]
                turn = optimizers[player]
                if schedule is not None:
                    factor = schedule(number / (epochs * steps))
                    if not 0 <= factor < math.inf:
                        raise ValueError(f"schedule must give factors of at least 0, got {factor} at step {number}")
                    turn.param_groups[0]["lr"] = lr * factor
                batch = rows[step * batch_size : (step + 1) * batch_size]
                own = parallel.own(batch)  # all of it on a single process
                options = {"player": player} if player else {}
                turn.zero_grad()
                place = f"at epoch {epoch + 1}, step {step}, on rows"
                try:
                    with cast:
                        loss = loss_of(to_unit(x[own]), None if y is None else y[own], generator=noise, **options)
                except FloatingPointError as error:  # of a model that notices before there is a loss
                    raise FloatingPointError(f"{error}; {place} {batch.tolist()} of x") from error
                _check_loss(loss, len(own))
                means = {name: values.mean() for name, values in vars(loss).items()}
                means["total"].backward(inputs=parameters[player])
                gradients = [p.grad for p in parameters[player] if p.grad is not None]
                values = torch.stack([mean.detach() for mean in means.values()])
                if size > 1:
                    parallel.average_([*gradients, values])
                norm = nn.utils.get_total_norm(gradients)
                # All that must be finite comes to the host in one transfer, for which a step waits for the device once.
                names = [f"{player} {name}".strip() for name in (*means, "gradient norm")]
                found = dict(zip(names, torch.cat([values, norm[None]]).tolist(), strict=True))
                if not all(map(math.isfinite, found.values())):
                    bad = ", ".join(f"{name!r} is {value}" for name, value in found.items() if not math.isfinite(value))
                    raise FloatingPointError(f"{bad} {place} {batch.tolist()} of x")
                if clip is not None:
                    nn.utils.clip_grads_with_norm_(parameters[player], clip, norm)
                turn.step()
                for name in names[:-1]:
                    state.history.setdefault(name, []).append(found[name])
                state.steps = number + 1
                last = step + 1 == steps
                if checkpoint is not None and rank == 0 and (last or (step + 1) % (checkpoint_every or steps) == 0):
                    with clock.stopped():
                        state.save(checkpoint, order.get_state() if last else order_before)  # the next, or this again
            model.eval()
            if callback is not None and rank == 0:
                with clock.stopped():
                    callback(model, epoch + 1)
    finally:
        model.eval()  # whatever happened
    trained = {id(p): p.numel() for group in parameters.values() for p in group}
    return Training(
        {name: torch.tensor(values) for name, values in state.history.items()},
        *clock.seconds(),
        rows=(state.steps - done) * batch_size,
        parameters=sum(trained.values()),
    )


def _check_data(model: nn.Module, x: Tensor, y: Tensor | None) -> None:
    """Raise a ValueError for what would stop the training with a riddle, or spoil it without a word."""
    if not callable(getattr(model, "loss", None)):
        raise ValueError(
            f"model must have loss(x, y, generator=...), as those of gae_core.models; {type(model)} has none"
        )
    precision = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    for name, value in ({"x": x} if y is None else {"x": x, "y": y}).items():
        if not isinstance(value, Tensor):
            mend = "torch.as_tensor makes one of an array; fit makes the batches itself"
            raise ValueError(f"{name} must be a tensor that holds all rows, got {type(value).__name__}: {mend}")
        if not value.is_floating_point():
            continue
        if name == "x" and precision not in (None, value.dtype):  # a model casts its conditions itself
            raise ValueError(
                f"{name} must have the model's precision, {precision}, got {value.dtype}: {name}.to({precision})"
            )
        if not value.isfinite().all():
            rows = (~value.isfinite()).flatten(1).any(1).nonzero().ravel().tolist()
            some = f"{', '.join(map(str, rows[:9]))}{', ...' if len(rows) > 9 else ''}"
            raise ValueError(f"{name} must be finite, got NaN or infinite entries in {len(rows)} rows: {some}")


def _check_options(
    n: int,
    labels: int | None,
    size: int,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    optimizer: str,
    betas: tuple[float, float],
    clip: float | None,
    seed: int,
    checkpoint: str | Path | None,
    checkpoint_every: int | None,
    resume: bool,
) -> None:
    """Raise a ValueError for options of :func:`fit` that do not fit together, n rows, or ``size`` processes."""
    for name, value in {"epochs": epochs, "batch_size": batch_size, "seed": seed}.items():
        if not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
    if epochs < 1 or not 1 <= batch_size <= n or batch_size % size:
        raise ValueError(
            f"epochs must be at least 1 and batch_size a multiple of the {size} process(es) between 1 and n, "
            f"got epochs={epochs}, batch_size={batch_size}, n={n}"
        )
    if labels not in (None, n):
        raise ValueError(f"y must have one row for each row of x, got {labels} and {n}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr must be a number of at least 0, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), and two, got {betas}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be a positive norm or None, got {clip}")
    if checkpoint_every is not None and (checkpoint_every < 1 or checkpoint is None):
        raise ValueError(f"checkpoint_every must be at least 1, with a checkpoint to write to, got {checkpoint_every}")
    if resume and checkpoint is None:
        raise ValueError("resume must have a checkpoint to go on from: pass checkpoint=path")


def _check_loss(loss, n: int) -> None:
    """Raise a ValueError unless a loss has a total for each of n rows."""
    total = getattr(loss, "__dict__", {}).get("total")
    if not isinstance(total, Tensor):
        kind = type(loss).__name__
        raise ValueError(f"loss must return a dataclass with total and other terms, each of shape (batch,), got {kind}")
    if total.shape != (n,):
        raise ValueError(f"loss must return a total for each row, ({n},), got {tuple(total.shape)}")


def _compiled(loss: Callable, compile: bool | str, device: torch.device) -> Callable:
    """The loss, compiled if asked."""
    if compile not in (False, True, "reduce-overhead"):
        raise ValueError(f'compile must be False, True or "reduce-overhead", got {compile!r}')
    if compile == "reduce-overhead" and device.type != "cuda":
        raise ValueError(f'compile="reduce-overhead" captures CUDA graphs, the device is {device}: pass compile=True')
    return torch.compile(loss, dynamic=False, mode=None if compile is True else compile) if compile else loss


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a loss in that precision."""
    if precision not in ("auto", "float32", "bf16"):
        raise ValueError(f'precision must be "auto", "float32" or "bf16", got {precision!r}')
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    use = precision == "bf16" or (precision == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=use)
