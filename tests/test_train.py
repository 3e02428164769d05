"""The training loop: Adam by hand, resumption bit by bit, errors that lose nothing, no randomness from outside."""

import dataclasses
import math
import sys

import pytest
import torch
from torch import nn

from gae_core import train
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


def test_it_is_adam_on_the_mean_of_the_total_written_out():
    """One linear weight, the whole data set as a batch, against the update rule of Kingma and Ba in plain Python."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def loss(self, x, y=None, *, generator=None):
            return dataclasses.make_dataclass("L", ["total"])((self.w - x[:, 0]).square())

    x, model = rows(7, 1, dtype=torch.float64), Mean()
    history = fit(model, x, epochs=6, batch_size=7, lr=0.1, schedule=lambda t: 1 - t, device="cpu", progress=False)
    w, m, v, losses, centre = 0.5, 0.0, 0.0, [], x.mean().item()
    spread = x.var(correction=0).item()
    for step in range(1, 7):
        losses.append((w - centre) ** 2 + spread)
        gradient = 2 * (w - centre)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        lr = 0.1 * (1 - (step - 1) / 6)  # the schedule's factor at the start of the step
        w -= lr * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
    assert model.w.item() == pytest.approx(w, abs=1e-12)
    assert history["total"].tolist() == pytest.approx(losses, rel=1e-6)


def test_history_has_every_term_of_every_step_and_the_model_is_left_in_evaluation_mode():
    model = Net()
    history = fit(model, rows(), epochs=3, **OPTIONS)
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
        history = fit(model, rows(), epochs=2, **{**OPTIONS, "seed": seed})
        assert torch.equal(torch.random.get_rng_state(), before)
        results.append((state(model), history))
    (a, history_a), (b, history_b), (c, _) = results
    assert same(a, b) and same(history_a, history_b)
    assert not same(a, c)


def test_noise_comes_from_the_seed_and_not_from_the_order():
    """The whole data set in one batch: the order does not matter, the noise drawn for the loss still does."""
    losses = []
    for seed in (0, 1):
        losses.append(fit(Net(), rows(), epochs=1, **{**OPTIONS, "batch_size": 22, "seed": seed})["noise"])
    assert not torch.equal(*losses)


def test_it_learns():
    x = rows(200)
    history = fit(model := Net(width=8), x, epochs=60, **{**OPTIONS, "batch_size": 20})
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
    return model, fit(model, rows(), torch.arange(22), epochs=epochs, schedule=schedule, **OPTIONS)


def assert_identical(model, history, schedule=None):
    reference, reference_history = unbroken(schedule)
    assert same(state(model), state(reference))
    assert same(history, reference_history)


def test_a_training_in_two_parts_is_that_of_one(tmp_path):
    path = tmp_path / "new" / "folder" / "state.pt"
    fit(Net(), rows(), torch.arange(22), epochs=2, checkpoint=path, **OPTIONS)
    model = Net(seed=9)  # its weights do not matter: all comes from the file
    history = fit(model, rows(), torch.arange(22), epochs=4, checkpoint=path, resume=True, **OPTIONS)
    assert model.calls == 8  # two epochs of four steps
    assert_identical(model, history)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_a_training_stopped_in_the_callback_goes_on_bit_by_bit(schedule, epoch, tmp_path):
    options = dict(epochs=4, schedule=SCHEDULES[schedule], checkpoint=tmp_path / "state.pt", **OPTIONS)
    with pytest.raises(StoppedError):
        fit(Net(), rows(), torch.arange(22), callback=stop_after(epoch), **options)
    model = Net(seed=9)
    history = fit(model, rows(), torch.arange(22), resume=True, **options)
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
    history = fit(model, rows(), torch.arange(22), resume=True, **options)
    assert_identical(model, history, SCHEDULES[schedule])


def test_several_stops_are_as_good_as_one(tmp_path):
    for epochs in (1, 2, 3, 4):
        model = Net(seed=epochs)
        options = dict(checkpoint=tmp_path / "state.pt", resume=True, **OPTIONS)
        if epochs == 1:
            model = Net()  # nothing to go on from: resume starts
        history = fit(model, rows(), torch.arange(22), epochs=epochs, **options)
    assert_identical(model, history)


def test_a_finished_training_is_loaded_and_not_repeated(tmp_path):
    options = dict(epochs=4, checkpoint=tmp_path / "state.pt", **OPTIONS)
    fit(Net(), rows(), torch.arange(22), **options)
    model = Net(seed=9)
    history = fit(model, rows(), torch.arange(22), resume=True, **options)
    assert model.calls == 0 and not model.training
    assert_identical(model, history)


def test_checkpoints_do_not_change_the_training_and_leave_one_file(tmp_path):
    model = Net()
    history = fit(model, rows(), torch.arange(22), epochs=4, checkpoint=tmp_path / "state.pt", **OPTIONS)
    assert_identical(model, history)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_callback_sees_each_epoch_in_evaluation_mode_and_its_randomness_changes_nothing():
    seen = []

    def callback(model, epoch):
        seen.append((epoch, model.training, model.calls))
        torch.randn(100)
        model.train()

    model = Net()
    history = fit(model, rows(), torch.arange(22), epochs=4, callback=callback, **OPTIONS)
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
    with pytest.raises(FloatingPointError, match=rf"'{field}' is -?(nan|inf) at epoch 2, step 2"):
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
    with pytest.raises(FloatingPointError, match="gradient's norm is nan at epoch 2, step 3"):
        fit(model, rows(), epochs=3, checkpoint=path, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model.parameters_before, strict=True))
    assert torch.load(path, weights_only=True)["epoch"] == 1


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
    assert_identical(model, fit(model, rows(), torch.arange(22), epochs=4, resume=True, **options))


BAD = {
    "no epoch": (dict(epochs=0), "epochs must be at least 1.*epochs=0"),
    "no batch": (dict(batch_size=0), "batch_size between 1 and n, got .*batch_size=0"),
    "batch above n": (dict(batch_size=23), "batch_size=23, n=22"),
    "no data": (dict(x=rows(0)), "n=0"),
    "y of other length": (dict(y=torch.arange(21)), "one row for each row of x, got 21 and 22"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_do_not_fit_are_named(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fit(Net(), **{"x": rows(), "epochs": 1, **OPTIONS, **arguments})


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


def test_on_a_gpu_it_resumes_and_returns_history_on_the_cpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")

    class OnDevice(Net):
        def loss(self, x, y=None, *, generator=None):
            eps = torch.randn(x.shape, generator=generator, device=x.device)
            error = (self(x + 0.1 * eps) - x).square().sum(1)
            return Loss(error, error, eps.sum(1))

    options = {**OPTIONS, "device": "auto"}
    whole, path = OnDevice(), tmp_path / "state.pt"
    history = fit(whole, rows(), epochs=4, **options)
    fit(OnDevice(), rows(), epochs=2, checkpoint=path, **options)
    resumed = fit(model := OnDevice(seed=9), rows(), epochs=4, checkpoint=path, resume=True, **options)
    assert next(model.parameters()).is_cuda and history["total"].device.type == "cpu"
    for name in history:
        torch.testing.assert_close(resumed[name], history[name], rtol=1e-4, atol=1e-4)
