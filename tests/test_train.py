"""The training loop: Adam by hand, resumption bit by bit, errors that lose nothing, no randomness from outside."""

import dataclasses
import functools
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from gae_core import train
from gae_core.models.autoencoder import Autoencoder
from gae_core.train import fit


@dataclasses.dataclass(frozen=True)
class Loss:
    total: torch.Tensor
    error: torch.Tensor
    noise: torch.Tensor


class Net(nn.Module):
    """A denoising net with batch norm: its weights, its statistics and its noise all have to come back."""

    def __init__(self, dim=3, width=5, seed=0, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(dim, width, dtype=dtype)
        self.norm = nn.BatchNorm1d(width, dtype=dtype)
        self.last = nn.Linear(width, dim, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)
        self.seen, self.calls = [], 0

    def forward(self, x):
        return self.last(self.norm(self.first(x)))

    def loss(self, x, y=None, *, generator=None):
        self.calls += 1
        self.seen.append((x.clone(), None if y is None else y.clone()))
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        error = (self(x + 0.1 * eps) - x).square().sum(1)
        return Loss(error + 0.01 * eps.sum(1), error, eps.sum(1))


def rows(n=22, d=3, seed=1, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


OPTIONS = dict(batch_size=5, lr=0.05, device="cpu", seed=3, progress=False)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_it_is_adam_on_the_mean_of_the_total_written_out(betas):
    """One linear weight, the whole data set as a batch, against the update rule of Kingma and Ba in plain Python."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def loss(self, x, y=None, *, generator=None):
            return dataclasses.make_dataclass("L", ["total"])((self.w - x[:, 0]).square())

    x, model, (b, c) = rows(7, 1, dtype=torch.float64), Mean(), betas
    options = {} if betas == (0.9, 0.999) else {"betas": betas}
    options |= dict(batch_size=7, lr=0.1, schedule=lambda t: 1 - t, device="cpu", progress=False)
    history = fit(model, x, epochs=6, **options).history
    w, m, v, losses, centre = 0.5, 0.0, 0.0, [], x.mean().item()
    spread = x.var(correction=0).item()
    for step in range(1, 7):
        losses.append((w - centre) ** 2 + spread)
        gradient = 2 * (w - centre)
        m, v = b * m + (1 - b) * gradient, c * v + (1 - c) * gradient**2
        lr = 0.1 * (1 - (step - 1) / 6)  # the schedule's factor at the start of the step
        w -= lr * (m / (1 - b**step)) / (math.sqrt(v / (1 - c**step)) + 1e-8)
    assert model.w.item() == pytest.approx(w, abs=1e-12)
    assert history["total"].tolist() == pytest.approx(losses, rel=1e-6)


def test_gradient_descent_written_out_clipped_scheduled_and_resumed(tmp_path):
    """The step is -lr g, without momentum: on ½ · 10 |w|² the gradient is 10 w, shortened to length 2."""
    options = dict(batch_size=22, lr=0.1, optimizer="sgd", clip=2.0, device="cpu", progress=False)
    model, path = Line(), tmp_path / "state.pt"
    fit(model, rows(), epochs=3, schedule=lambda t: 1 - t, **options)
    torch.testing.assert_close(model.w.data, torch.tensor([3.0, 4.0]) * (1 - 0.2 * (1 + 2 / 3 + 1 / 3) / 5))
    fit(whole := Line(), rows(), epochs=4, **options)
    fit(Line(), rows(), epochs=2, checkpoint=path, **options)
    fit(model := Line(), rows(), epochs=4, checkpoint=path, resume=True, **options)
    assert torch.equal(model.w, whole.w)
    with pytest.raises(ValueError, match="is of another training"):  # Adam would start from no averages
        fit(Line(), rows(), epochs=4, checkpoint=path, resume=True, **{**options, "optimizer": "adam"})


def test_history_has_every_term_of_every_step_and_the_model_is_left_in_evaluation_mode():
    model = Net()
    history = fit(model, rows(), epochs=3, **OPTIONS).history
    assert list(history) == ["total", "error", "noise"]
    for values in history.values():
        assert values.shape == (3 * 4,) and values.dtype == torch.float32 and not values.requires_grad
    torch.testing.assert_close(history["total"], history["error"] + 0.01 * history["noise"])
    assert not model.training and model.calls == 12


def test_each_epoch_is_a_new_order_without_the_last_partial_batch_and_y_stays_with_x():
    x = torch.arange(22.0)[:, None].repeat(1, 3)
    model = Net()
    fit(model, x, torch.arange(22) * 10, epochs=2, **OPTIONS)
    assert all(len(batch) == 5 for batch, _ in model.seen)
    assert all((batch[:, 0] * 10 == y).all() for batch, y in model.seen)
    orders = [torch.cat([batch[:, 0] for batch, _ in model.seen[4 * e : 4 * e + 4]]).tolist() for e in range(2)]
    assert all(len(set(order)) == 20 for order in orders)  # 20 of the 22, none twice
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_the_rows_left_out_differ_from_epoch_to_epoch():
    model = Net()
    fit(model, torch.arange(22.0)[:, None].repeat(1, 3), epochs=12, **OPTIONS)
    seen = {float(v) for batch, _ in model.seen for v in batch[:, 0]}
    assert len(seen) == 22


def test_bytes_become_floats_in_the_unit_interval():
    x = torch.arange(60, dtype=torch.uint8).reshape(20, 3) * 4
    model, other = Net(), Net()
    fit(model, x, epochs=1, **OPTIONS)
    fit(other, x.float() / 255, epochs=1, **OPTIONS)
    assert model.seen[0][0].dtype == torch.float32 and 0 <= model.seen[0][0].min() <= model.seen[0][0].max() <= 1
    assert same(state(model), state(other))


def test_the_seed_decides_everything_and_the_global_generator_is_neither_used_nor_changed():
    results = []
    for global_seed, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(global_seed)
        model = Net()
        before = torch.random.get_rng_state()
        history = fit(model, rows(), epochs=2, **{**OPTIONS, "seed": seed}).history
        assert torch.equal(torch.random.get_rng_state(), before)
        results.append((state(model), history))
    (a, history_a), (b, history_b), (c, _) = results
    assert same(a, b) and same(history_a, history_b)
    assert not same(a, c)


def test_noise_comes_from_the_seed_and_not_from_the_order():
    """The whole data set in one batch: the order does not matter, the noise drawn for the loss still does."""
    losses = []
    for seed in (0, 1):
        losses.append(fit(Net(), rows(), epochs=1, **{**OPTIONS, "batch_size": 22, "seed": seed}).history["noise"])
    assert not torch.equal(*losses)


def test_it_learns():
    x = rows(200)
    history = fit(model := Net(width=8), x, epochs=60, **{**OPTIONS, "batch_size": 20}).history
    assert history["error"][-20:].mean() < 0.1 * history["error"][:5].mean()
    assert (model(x) - x).square().sum(1).mean() < 0.5


# ---- resumption -------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def stop_after(epochs):
    def callback(model, epoch):
        if epoch == epochs:
            raise StoppedError

    return callback


SCHEDULES = {"constant": None, "linear": lambda t: 1 - t, "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2}


def unbroken(schedule=None, epochs=4):
    model = Net()
    return model, fit(model, rows(), torch.arange(22), epochs=epochs, schedule=schedule, **OPTIONS).history


def assert_identical(model, history, schedule=None):
    reference, reference_history = unbroken(schedule)
    assert same(state(model), state(reference))
    assert same(history, reference_history)


def test_a_training_in_two_parts_is_that_of_one(tmp_path):
    path = tmp_path / "new" / "folder" / "state.pt"
    fit(Net(), rows(), torch.arange(22), epochs=2, checkpoint=path, **OPTIONS)
    model = Net(seed=9)  # its weights do not matter: all comes from the file
    history = fit(model, rows(), torch.arange(22), epochs=4, checkpoint=path, resume=True, **OPTIONS).history
    assert model.calls == 8  # two epochs of four steps
    assert_identical(model, history)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_a_training_stopped_in_the_callback_goes_on_bit_by_bit(schedule, epoch, tmp_path):
    options = dict(epochs=4, schedule=SCHEDULES[schedule], checkpoint=tmp_path / "state.pt", **OPTIONS)
    with pytest.raises(StoppedError):
        fit(Net(), rows(), torch.arange(22), callback=stop_after(epoch), **options)
    model = Net(seed=9)
    history = fit(model, rows(), torch.arange(22), resume=True, **options).history
    assert_identical(model, history, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("calls", [3, 7, 8, 14])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_training_killed_inside_a_step_goes_on_bit_by_bit(schedule, calls, fresh, tmp_path):
    """In the first epoch there is no checkpoint yet, so that a fresh model starts again; a used one must not."""
    options = dict(epochs=4, schedule=SCHEDULES[schedule], checkpoint=tmp_path / "state.pt", **OPTIONS)

    class Killed(Net):
        def loss(self, x, y=None, *, generator=None):
            if self.calls == calls:
                self.calls += 1
                raise StoppedError
            return super().loss(x, y, generator=generator)

    model = Killed()
    with pytest.raises(StoppedError):
        fit(model, rows(), torch.arange(22), **options)
    assert (tmp_path / "state.pt").exists() == (calls >= 4)
    if fresh or calls < 4:
        model = Net()
    history = fit(model, rows(), torch.arange(22), resume=True, **options).history
    assert_identical(model, history, SCHEDULES[schedule])


@pytest.mark.parametrize("calls", [3, 4, 6, 9, 11])
def test_checkpoints_within_an_epoch_are_gone_on_from(calls, tmp_path):
    """Written every two steps: what is done again is the steps since the last one, in the same order."""
    options = dict(epochs=4, checkpoint=tmp_path / "state.pt", checkpoint_every=2, **OPTIONS)

    class Killed(Net):
        def loss(self, x, y=None, *, generator=None):
            if self.calls == calls:
                raise StoppedError
            return super().loss(x, y, generator=generator)

    with pytest.raises(StoppedError):
        fit(Killed(), rows(), torch.arange(22), **options)
    model = Net(seed=9)
    history = fit(model, rows(), torch.arange(22), resume=True, **options).history
    assert model.calls == 16 - calls // 2 * 2
    assert_identical(model, history)


def train_on(path):
    model = Net()
    fit(model, rows(300), epochs=6, checkpoint=path, checkpoint_every=7, resume=True, **OPTIONS)
    torch.save(model.state_dict(), path.with_suffix(".weights"))


def life(path, seconds=None):
    """A process that trains, and is killed after some time. Returns whether that came before its end."""
    pid = os.fork()
    if pid == 0:
        try:
            train_on(path)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_ten_times(folder):
    torch.set_num_threads(1)
    train_on(folder / "undisturbed.pt")  # here, so that all that torch loads late is loaded
    start = time.monotonic()
    life(folder / "left alone.pt")
    duration = time.monotonic() - start
    undisturbed = torch.load(folder / "undisturbed.weights")
    kills, lost, found = 0, 0, 0
    while kills < 10:
        path = folder / f"{lost}-{kills}.pt"
        if not life(path, random.uniform(0, duration)):
            lost += 1  # it ended first, this machine being faster now
            assert lost < 100
            continue
        kills, found = kills + 1, found + path.exists()
        life(path)
        assert same(torch.load(path.with_suffix(".weights")), undisturbed), f"kill {kills} changed the training"
        assert not path.with_name(path.name + ".tmp").exists()
    print(f"{kills} kills, {found} after a checkpoint")


def test_a_training_killed_at_a_random_moment_ends_with_the_weights_of_one_left_alone(tmp_path):
    """Ten times, by SIGKILL, from a process that only forks: see ``kill_ten_times``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 kills")


def test_several_stops_are_as_good_as_one(tmp_path):
    for epochs in (1, 2, 3, 4):
        model = Net(seed=epochs)
        options = dict(checkpoint=tmp_path / "state.pt", resume=True, **OPTIONS)
        if epochs == 1:
            model = Net()  # nothing to go on from: resume starts
        history = fit(model, rows(), torch.arange(22), epochs=epochs, **options).history
    assert_identical(model, history)


def test_a_finished_training_is_loaded_and_not_repeated(tmp_path):
    options = dict(epochs=4, checkpoint=tmp_path / "state.pt", **OPTIONS)
    fit(Net(), rows(), torch.arange(22), **options)
    model = Net(seed=9)
    history = fit(model, rows(), torch.arange(22), resume=True, **options).history
    assert model.calls == 0 and not model.training
    assert_identical(model, history)


def test_checkpoints_do_not_change_the_training_and_leave_one_file(tmp_path):
    model = Net()
    history = fit(model, rows(), torch.arange(22), epochs=4, checkpoint=tmp_path / "state.pt", **OPTIONS).history
    assert_identical(model, history)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_callback_sees_each_epoch_in_evaluation_mode_and_its_randomness_changes_nothing():
    seen = []

    def callback(model, epoch):
        seen.append((epoch, model.training, model.calls))
        torch.randn(100)
        model.train()

    model = Net()
    history = fit(model, rows(), torch.arange(22), epochs=4, callback=callback, **OPTIONS).history
    assert seen == [(1, False, 4), (2, False, 8), (3, False, 12), (4, False, 16)]
    assert not model.training
    assert_identical(model, history)


# ---- errors that lose nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["total", "error"])
def test_a_loss_that_is_not_finite_is_named_and_leaves_weights_and_checkpoint(value, field, tmp_path):
    path = tmp_path / "state.pt"

    class Bad(Net):
        def loss(self, x, y=None, *, generator=None):
            loss = super().loss(x, y, generator=generator)
            if self.calls == 7:  # the third step of the second epoch
                self.parameters_before = [p.detach().clone() for p in self.parameters()]
                return dataclasses.replace(loss, **{field: getattr(loss, field) * 0 + value})
            return loss

    model = Bad()
    with pytest.raises(FloatingPointError, match=rf"'{field}' is -?(nan|inf).* at epoch 2, step 2, on rows "):
        fit(model, rows(), epochs=3, checkpoint=path, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model.parameters_before, strict=True))
    reference = Net()
    fit(reference, rows(), epochs=1, **OPTIONS)
    assert same(torch.load(path, weights_only=True)["model"], state(reference))


def test_a_gradient_that_is_not_finite_never_reaches_weights_or_checkpoint(tmp_path):
    """The square root of 0 is finite, its gradient times 0 is not. On an epoch's last step no later loss would tell."""
    path = tmp_path / "state.pt"

    class Bad(Net):
        def loss(self, x, y=None, *, generator=None):
            loss = super().loss(x, y, generator=generator)
            if self.calls == 8:
                self.parameters_before = [p.detach().clone() for p in self.parameters()]
                loss = dataclasses.replace(loss, total=loss.total + (0 * loss.total).sqrt())
            return loss

    model = Bad()
    with pytest.raises(FloatingPointError, match=r"^'gradient norm' is nan at epoch 2, step 3"):
        fit(model, rows(), epochs=3, checkpoint=path, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model.parameters_before, strict=True))
    assert torch.load(path, weights_only=True)["steps"] == 4


OTHER = {
    "rows": dict(x=rows(23)),
    "batch_size": dict(batch_size=4),
    "lr": dict(lr=0.01),
    "seed": dict(seed=5),
    "a schedule": dict(schedule=lambda t: 1 - t),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_of_other_settings_is_refused_and_nothing_is_lost(name, tmp_path):
    path = tmp_path / "state.pt"
    fit(Net(), rows(), epochs=2, checkpoint=path, **OPTIONS)
    content = path.read_bytes()
    model = Net(seed=9)
    before = state(model)
    arguments = {"x": rows(), "epochs": 4, "checkpoint": path, "resume": True, **OPTIONS, **OTHER[name]}
    with pytest.raises(ValueError, match=r"is of another training: it has .* this call has"):
        fit(model, **arguments)
    assert same(state(model), before) and model.calls == 0
    assert path.read_bytes() == content


def test_with_a_schedule_the_number_of_epochs_belongs_to_the_training(tmp_path):
    options = dict(schedule=lambda t: 1 - t, checkpoint=tmp_path / "state.pt", **OPTIONS)
    fit(Net(), rows(), epochs=2, **options)
    with pytest.raises(ValueError, match=r"another training.*'epochs': 2.*'epochs': 4"):
        fit(Net(), rows(), epochs=4, resume=True, **options)


def test_a_checkpoint_beyond_the_epochs_asked_for_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    fit(Net(), rows(), epochs=3, checkpoint=path, **OPTIONS)
    model = Net(seed=9)
    before = state(model)
    with pytest.raises(ValueError, match="has 3 epochs done, more than epochs=2"):
        fit(model, rows(), epochs=2, checkpoint=path, resume=True, **OPTIONS)
    assert same(state(model), before)


class Deeper(Net):
    def __init__(self):
        super().__init__(seed=9)
        self.extra = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Net(width=6, seed=9), r"first.weight is \(5, 3\) there and \(6, 3\) here"),
        (Deeper, r"extra.weight is None there and \(3, 3\) here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_lost(make, message, tmp_path):
    """Neither the file nor a single weight: some would fit, and must not be copied before the others are compared."""
    path = tmp_path / "state.pt"
    fit(Net(), rows(), epochs=2, checkpoint=path, **OPTIONS)
    content, model = path.read_bytes(), make()
    before = state(model)
    with pytest.raises(ValueError, match=f"is of another model: {message}"):
        fit(model, rows(), epochs=4, checkpoint=path, resume=True, **OPTIONS)
    assert same(state(model), before) and path.read_bytes() == content


def test_an_existing_checkpoint_is_not_overwritten_unasked(tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"weeks of work")
    model = Net()
    with pytest.raises(FileExistsError, match="pass resume=True to go on from it, or remove it"):
        fit(model, rows(), epochs=1, checkpoint=str(path), **OPTIONS)
    assert path.read_bytes() == b"weeks of work" and model.calls == 0


def test_a_write_that_fails_leaves_the_old_checkpoint_and_the_training_can_go_on(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    options = dict(checkpoint=path, **OPTIONS)
    fit(Net(), rows(), torch.arange(22), epochs=2, **options)
    content = path.read_bytes()

    def half(state, file):
        file.write(content[: len(content) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space left"):
            fit(Net(), rows(), torch.arange(22), epochs=4, resume=True, **options)
    assert path.read_bytes() == content
    model = Net(seed=9)
    assert_identical(model, fit(model, rows(), torch.arange(22), epochs=4, resume=True, **options).history)


BAD = {
    "no clip": (dict(clip=0.0), "clip must be a positive norm or None, got 0.0"),
    "nowhere to write": (dict(checkpoint_every=3), "checkpoint_every must be .* with a checkpoint to write to, got 3"),
    "every zero steps": (dict(checkpoint="a.pt", checkpoint_every=0), "checkpoint_every must be at least 1.* got 0"),
    "optimizer": (dict(optimizer="lion"), "optimizer must be one of adam, sgd, got 'lion'"),
    "betas": (dict(betas=(0.9, 1.0)), r"betas must be in \[0, 1\), and two, got \(0.9, 1.0\)"),
    "precision": (dict(precision="half"), '"auto", "float32" or "bf16", got .half'),
    "compile": (dict(compile="fast"), 'False, True or "reduce-overhead", got .fast'),
    "graphs on the CPU": (dict(compile="reduce-overhead"), "captures CUDA graphs, the device is cpu: pass compile=Tr"),
    "no epoch": (dict(epochs=0), "epochs must be at least 1.*epochs=0"),
    "no batch": (dict(batch_size=0), "batch_size a multiple .* between 1 and n, got .*batch_size=0"),
    "batch above n": (dict(batch_size=23), "batch_size=23, n=22"),
    "no data": (dict(x=rows(0)), "n=0"),
    "y of other length": (dict(y=torch.arange(21)), "one row for each row of x, got 21 and 22"),
    "half an epoch": (dict(epochs=1.5), "epochs must be a whole number, got 1.5"),
    "seed": (dict(seed=0.5), "seed must be a whole number, got 0.5"),
    "rate below 0": (dict(lr=-1.0), "lr must be a number of at least 0, got -1.0"),
    "rate of NaN": (dict(lr=math.nan), "lr must be a number of at least 0, got nan"),
    "three betas": (dict(betas=(0.9, 0.9, 0.9)), "betas must be .* two, got"),
    "climbing": (dict(schedule=lambda t: -1), "schedule must give factors of at least 0, got -1 at step 0"),
    "no device of that name": (dict(device="gpu"), "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    "a device that is not here": (
        dict(device="cuda:99"),
        "device must be one that is here, torch sees .* got 'cuda:99'",
    ),
    "nothing to go on from": (dict(resume=True), "resume must have a checkpoint to go on from"),
    "an array": (dict(x=rows().numpy()), "x must be a tensor .* got ndarray: torch.as_tensor"),
    "batches": (dict(x=[rows()]), "x must be a tensor .* got list: .* fit makes the batches itself"),
    "another precision": (
        dict(x=rows().double()),
        r"model's precision, torch.float32, got torch.float64: x.to\(torch.f",
    ),
    "NaN": (
        dict(x=rows().index_fill(0, torch.tensor([3, 20]), math.nan)),
        "x must be finite, .* in 2 rows: 3, 20",
    ),
    "conditions of NaN": (dict(y=torch.full((22, 2), math.inf)), "y must be finite, .* in 22 rows: 0, 1, .*8, "),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_do_not_fit_are_named(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fit(Net(), **{"x": rows(), "epochs": 1, **OPTIONS, **arguments})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x.sum(1), r"loss must return a dataclass with total .*, got Tensor"),
        (lambda x: {"total": x.sum(1)}, r"loss must return a dataclass with total .*, got dict"),
        (lambda x: Loss(x.sum(), x, x), r"loss must return a total for each row, \(5,\), got \(\)"),
        (lambda x: Loss(x, x, x), r"loss must return a total for each row, \(5,\), got \(5, 3\)"),
    ],
)
def test_a_loss_of_another_kind_is_named(returned, message):
    class Other(Net):
        def loss(self, x, y=None, *, generator=None):
            return returned(self(x))

    with pytest.raises(ValueError, match=message):
        fit(Other(), rows(), epochs=1, **OPTIONS)


def test_models_that_cannot_be_trained_are_named():
    with pytest.raises(ValueError, match=r"model must have loss\(x, y, generator=...\)"):
        fit(nn.Linear(3, 3), rows(), epochs=1, **OPTIONS)
    with pytest.raises(ValueError, match="model must have parameters that require a gradient"):
        fit(Net().requires_grad_(False), rows(), epochs=1, **OPTIONS)


def test_what_a_model_says_of_its_batch_is_told_with_the_place_and_the_model_left_in_evaluation_mode():
    class Bad(Net):
        def loss(self, x, y=None, *, generator=None):
            if self.calls == 5:
                raise FloatingPointError("the codes ran away")
            return super().loss(x, y, generator=generator)

    with pytest.raises(FloatingPointError, match=r"^the codes ran away; at epoch 2, step 1, on rows \[\d+, "):
        fit(model := Bad(), rows(), epochs=3, **OPTIONS)
    assert not model.training


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(tmp_path):
    """Truly: from here on the process may write no file longer than half a checkpoint."""
    import resource

    path = tmp_path / "state.pt"
    fit(Net(), rows(), epochs=1, checkpoint=path, **OPTIONS)
    content, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*state\.pt, is the disk full\?"):
            fit(Net(), rows(), epochs=2, checkpoint=path, resume=True, **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"] and path.read_bytes() == content


# ---- clipping, precision, compilation ---------------------------------------------------------------------------


class Line(nn.Module):
    """One weight w, the gradient 10 w at first; Adam would hide its length from the weights, not from the gradient."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 4.0]))

    def loss(self, x, y=None, *, generator=None):
        return dataclasses.make_dataclass("L", ["total"])(5 * self.w.square().sum().expand(len(x)))


@pytest.mark.parametrize(("clip", "length"), [(None, 50.0), (70.0, 50.0), (2.0, 2.0)])
def test_a_gradient_longer_than_clip_is_shortened_to_it(clip, length):
    model = Line()
    fit(model, rows(), epochs=1, clip=clip, **{**OPTIONS, "batch_size": 22})
    torch.testing.assert_close(model.w.grad, torch.tensor([0.6, 0.8]) * length)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("auto", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precision_is_that_of_the_matrix_products_and_never_of_weights_and_gradients(precision, dtype):
    """On the CPU "auto" is float32."""
    seen = []

    class Watched(Net):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    model = Watched()
    history = fit(model, rows(200), epochs=20, precision=precision, **{**OPTIONS, "batch_size": 20}).history
    assert set(seen) == {dtype}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert history["error"][-20:].mean() < 0.5 * history["error"][:5].mean()


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_asks_a_cuda_device_whether_it_has_bf16_itself(native, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: enabled)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    assert train._autocast("auto", torch.device("cuda")) == native
    assert not train._autocast("float32", torch.device("cuda"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of torch about Python 3.13.0
def test_a_compiled_loss_gives_the_same_training(monkeypatch):
    """Traced with its gradient, generator and all; the kernels that torch would then write are torch's to test."""
    plain, compiled = Net(), Net()
    expected = fit(plain, rows(), torch.arange(22), epochs=2, **OPTIONS).history
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    history = fit(compiled, rows(), torch.arange(22), epochs=2, compile=True, **OPTIONS).history
    for name, value in state(plain).items():
        torch.testing.assert_close(state(compiled)[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(history["total"], expected["total"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("compile", "mode"), [(True, None), ("reduce-overhead", "reduce-overhead")])
def test_what_is_asked_of_the_compiler(compile, mode, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, **options: options)
    assert train._compiled(None, compile, torch.device("cuda")) == {"dynamic": False, "mode": mode}


# ---- opposing players -------------------------------------------------------------------------------------------


class Game(nn.Module):
    """u minimises E (u - x)²/2 + u v, v minimises v²/2 - u v: at the only equilibrium both are E x / 2."""

    def __init__(self):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in (2.0, -1.0))
        self.log = []

    @property
    def players(self):
        return {"v": ([self.v], 2), "u": ([self.u], 1)}

    def loss(self, x, y=None, *, generator=None, player):
        self.log.append((player, self.u.item(), self.v.item()))
        product = (self.u * self.v).expand(len(x))
        if player == "u":
            fit = (self.u - x[:, 0]).square() / 2
            return dataclasses.make_dataclass("U", ["total", "fit"])(fit + product, fit)
        return dataclasses.make_dataclass("V", ["total"])(self.v**2 / 2 - product)


def test_players_take_turns_and_each_changes_its_own_parameters():
    model = Game()
    history = fit(model, rows(60, dtype=torch.float64), epochs=1, **OPTIONS).history
    assert [player for player, *_ in model.log] == ["v", "v", "u"] * 4
    for (player, u, v), (_, next_u, next_v) in zip(model.log, model.log[1:], strict=False):
        assert (u == next_u) == (player == "v") and (v == next_v) == (player == "u")
    assert {name: len(values) for name, values in history.items()} == {"v total": 8, "u total": 4, "u fit": 4}


def test_players_find_the_equilibrium():
    x, model = rows(30, 1, dtype=torch.float64), Game()
    fit(model, x, epochs=1500, schedule=lambda t: (1 - t) ** 2, **{**OPTIONS, "batch_size": 30})
    assert model.u.item() == pytest.approx(x.mean().item() / 2, abs=1e-3)
    assert model.v.item() == pytest.approx(x.mean().item() / 2, abs=1e-3)


def test_players_resume_in_the_middle_of_a_round(tmp_path):
    x, options = rows(20, dtype=torch.float64), dict(checkpoint=tmp_path / "state.pt", **OPTIONS)  # four steps an epoch
    reference = Game()
    expected = fit(reference, x, epochs=5, **OPTIONS).history
    fit(Game(), x, epochs=2, **options)
    model = Game()
    history = fit(model, x, epochs=5, resume=True, **options).history
    assert same(state(model), state(reference)) and same(history, expected)


def test_the_player_whose_term_is_not_finite_is_named():
    class Bad(Game):
        def loss(self, x, y=None, *, generator=None, player):
            loss = super().loss(x, y, player=player)
            return dataclasses.replace(loss, fit=loss.fit * torch.nan) if player == "u" else loss

    with pytest.raises(FloatingPointError, match=r"^'u fit' is nan at epoch 1, step 2, on rows"):
        fit(Bad(), rows(60, dtype=torch.float64), epochs=1, **OPTIONS)


# ---- progress and device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"), [(False, True, False), (True, False, False), (True, True, True)]
)
def test_progress_is_shown_on_a_terminal_only(terminal, progress, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    fit(Net(), rows(), epochs=1, **{**OPTIONS, "progress": progress})
    captured = capsys.readouterr()
    assert captured.out == "" and ("epoch 1/1" in captured.err) == shown
    assert shown or captured.err == ""


@pytest.mark.parametrize("cuda", [True, False])
def test_auto_is_cuda_where_it_is(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert train.pick_device().type == ("cuda" if cuda else "cpu")
    assert train.pick_device("cpu") == torch.device("cpu")
    assert train.pick_device(torch.device("meta")).type == "meta"


@pytest.mark.parametrize("more", [{}, {"precision": "bf16"}, {"compile": "reduce-overhead"}], ids=str)
def test_on_a_gpu_it_resumes_and_returns_history_on_the_cpu(more, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")

    class OnDevice(Net):
        def loss(self, x, y=None, *, generator=None):
            eps = torch.randn(x.shape, generator=generator, device=x.device)
            error = (self(x + 0.1 * eps) - x).square().sum(1)
            return Loss(error, error, eps.sum(1))

    options = {**OPTIONS, **more, "device": "auto"}
    whole, path = OnDevice(), tmp_path / "state.pt"
    history = fit(whole, rows(), epochs=4, **options).history
    fit(OnDevice(), rows(), epochs=2, checkpoint=path, **options)
    resumed = fit(model := OnDevice(seed=9), rows(), epochs=4, checkpoint=path, resume=True, **options).history
    assert next(model.parameters()).is_cuda and history["total"].device.type == "cpu"
    for name in history:
        torch.testing.assert_close(resumed[name], history[name], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    kill_ten_times(Path(sys.argv[1]))


@pytest.mark.parametrize("damage", ["text", "truncated", "foreign"])
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(damage, tmp_path):
    path, x = tmp_path / "a.pt", torch.rand(8, 3)
    model = Autoencoder(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3), 2)
    fit(model, x, epochs=1, batch_size=4, device="cpu", checkpoint=path)
    if damage == "text":
        path.write_text("no checkpoint")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        torch.save({"weights": torch.zeros(2)}, path)
    before, weights = path.read_bytes(), [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"a\.pt is (no checkpoint|of another training)"):
        fit(model, x, epochs=2, batch_size=4, device="cpu", checkpoint=path, resume=True)
    assert path.read_bytes() == before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_training_says_what_it_was(tmp_path):
    """Seconds are those of the steps: what the callback takes, awake or asleep, is not counted."""

    def slow(model, epoch):
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        time.sleep(0.2)

    model, path = Net(), tmp_path / "state.pt"
    model.idle = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    start = time.perf_counter()
    first = fit(model, rows(), epochs=2, checkpoint=path, callback=slow, **OPTIONS)
    whole = time.perf_counter() - start
    batch = OPTIONS["batch_size"]
    steps = 22 // batch
    assert first.rows == 2 * steps * batch and len(first.history["total"]) == 2 * steps
    assert first.parameters == sum(p.numel() for p in model.parameters()) - 5
    assert 0 < first.seconds < whole - 0.8 and 0 < first.processor_seconds < whole - 0.8
    again = fit(Net(), rows(), epochs=3, checkpoint=tmp_path / "other.pt", **OPTIONS)
    assert again.rows == 3 * steps * batch
    model = Net()
    model.idle = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    resumed = fit(model, rows(), epochs=3, checkpoint=path, resume=True, **OPTIONS)
    assert resumed.rows == steps * batch and len(resumed.history["total"]) == 3 * steps


def test_players_that_share_parameters_train_each_number_once():
    training = fit(Game(), rows(60, dtype=torch.float64), epochs=1, **OPTIONS)
    assert training.parameters == sum(p.numel() for p in Game().parameters())
