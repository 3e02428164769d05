"""Two processes that share a batch do what one process does with all of it. This file is also what they run."""

import contextlib
import io
import os
import re
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from gae_core import parallel
from gae_core.__main__ import main
from gae_core.models.eae import EAE
from gae_core.models.gae import GAE
from gae_core.models.meg import MEG, WGANGP
from gae_core.nets import mlp
from gae_core.normalization import CodeBatchNorm, CoupledBatchNorm, FixedScaleBatchNorm
from gae_core.studies import image_models
from gae_core.train import fit

DIM, OPTIONS = 3, dict(batch_size=128, lr=0.01, device="cpu", seed=4)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def eae(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EAE(mlp([5, 16, DIM]), mlp([DIM, 16, 5]), DIM, lam=0.5, k=2).double()
    # Batch norm hides this shift: its gradient is rounding error, which Adam would magnify.
    model.encoder[-1].bias.requires_grad_(False)
    return model


def made(kind, *arguments, seed=0, **options):
    """A model of random networks in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(*(mlp(widths) for widths in arguments), DIM, **options).double()


def drawing():
    """Models whose losses draw more than noise a row, or compare rows of the batch: name -> a new one."""
    shapes, one = ([DIM, 16, 5], [5, 16, 1]), {"energy_steps": 1}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        critic, inverse = mlp([5 + DIM, 16, 1]), mlp([5, 16, DIM])
    return {
        "WGAN-GP": made(WGANGP, *shapes, **one),
        "MEG, jsd": made(MEG, *shapes, statistics=critic, noise=0.1, **one),
        "MEG, reconstruct": made(MEG, *shapes, surrogate="reconstruct", statistics=inverse, sigma=None, **one),
        "MEG, knn": made(MEG, *shapes, surrogate="knn", **one),
        "GAE": made(GAE, [DIM, 16, 5], steps=3, step_size=0.05, n_starts=3),
    }


class Noisy(nn.Module):
    """A net that the noise it draws reaches first, whole, through weights that all differ."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(draw(5, 5, seed=1))

    def loss(self, x, y=None, *, generator=None):
        eps = parallel.randn_like(x, generator=generator)
        error = ((x + eps) @ self.weight - x * y[:, None]).square().sum(1)
        return make_dataclass("Loss", ["total", "eps"])(error, eps[:, 0])


class Bad(Noisy):
    """NaN in the third step, in the rows of the last process alone."""

    calls = 0

    def loss(self, x, y=None, *, generator=None):
        loss, self.calls = super().loss(x, y, generator=generator), self.calls + 1
        if self.calls == 3 and parallel.rank_and_size()[0] == parallel.rank_and_size()[1] - 1:
            loss.eps[-1] = torch.nan
        return loss


def state(model):
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.clone() for name, value in (model.state_dict() | gradients).items()}


def work(folder):
    """All that is compared, by name: dictionaries of tensors, or messages."""
    rank, size = parallel.rank_and_size()
    results, x, y = {}, draw(300, 5, seed=2), draw(300, seed=3)
    for name, model, n, epochs, more in (
        ("EAE, one step", eae(), 128, 1, {}),
        ("EAE, long", eae(), 300, 4, {"schedule": lambda t: 1 - t, "clip": 2.0}),
        ("noise, one step", Noisy(), 128, 1, {}),
        ("noise, long", Noisy(), 300, 4, {}),
        ("started apart", eae(seed=rank), 128, 1, {}),
        *((name, model, 300, 4, {}) for name, model in drawing().items()),
    ):
        history = fit(model, x[:n], y[:n], epochs=epochs, **OPTIONS, **more).history
        results[name] = state(model) | history

    called = []

    def callback(model, epoch):
        called.append(epoch)
        model.loss(x[:9])  # in evaluation: one that waited for the other process would wait for ever

    options = dict(checkpoint=folder / "state.pt", callback=callback, **OPTIONS)
    fit(eae(), x, epochs=2, checkpoint_every=1, **options)
    model = eae(seed=7)
    history = fit(model, x, epochs=4, resume=True, **options).history
    results["resumed"], results["called"] = state(model) | history, called
    fit(model := eae(), x, epochs=4, **OPTIONS)
    results["unbroken"] = state(model)

    with pytest.raises(FloatingPointError) as error:
        fit(model := Bad(), x, y, epochs=2, **OPTIONS)
    results["NaN"], results["weights at the NaN"] = str(error.value), state(model)
    with pytest.raises(ValueError, match="batch_size") as error:
        fit(eae(), x, epochs=1, **{**OPTIONS, "batch_size": 127 if size > 1 else 301})
    results["odd batch"] = str(error.value)

    # The parts: gradients through gather and batch norm, with respect to all rows at once.
    z, weight = draw(10, DIM, seed=5), draw(10, 10, seed=6)
    mine = parallel.own(z).clone().requires_grad_()
    (parallel.own(weight @ parallel.gather(mine).exp()) ** 2).sum().backward()
    norm = CodeBatchNorm(DIM).double()
    again = parallel.own(z).clone().requires_grad_()
    out = norm(again)
    (out * parallel.own(draw(10, DIM, seed=8))).sum().backward()
    with torch.no_grad():
        evaluated = norm.eval()(parallel.own(z))
    rows = {"gather": mine.grad, "norm": again.grad, "normalised": out.detach(), "evaluated": evaluated}
    results["parts"] = {name: parallel.gather(value) for name, value in rows.items()} | norm.state_dict()
    spoilt, norm = parallel.own(z).clone(), CodeBatchNorm(DIM).double()
    if rank == size - 1:
        spoilt[-1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="running averages are as before"):
        norm(spoilt)  # in all processes, or the others would wait for ever
    results["parts"]["averages after a NaN"] = norm.running_mean
    generator = torch.Generator().manual_seed(1)
    noise = [parallel.randn_like(parallel.own(z), generator=generator) for _ in range(2)]
    for name, norm in (("fixed", FixedScaleBatchNorm(DIM, 0.7)), ("coupled", CoupledBatchNorm(DIM, 0.4))):
        mu, raw = (parallel.own(draw(10, DIM, seed=s)).clone().requires_grad_() for s in (9, 10))
        out = torch.stack(norm.double()(mu, raw), 1)
        (out * parallel.own(draw(10, 2, DIM, seed=11))).sum().backward()
        found = {"": out.detach(), "mu": mu.grad, "raw": raw.grad}
        results["parts"] |= {f"{name} {key}": parallel.gather(value) for key, value in found.items()}
    results["parts"] |= {f"noise {i}": parallel.gather(value) for i, value in enumerate(noise)}
    return results


def command_line(folder):
    """What each process says, and returns, when torchrun starts the program on three thousand digits."""
    image_models.SIZES["short"] = ((256, 128), 3)
    train = ["train", "autoencoder", "--data", "digits", "--size", "short", "--device", "cpu"]
    results = {"status": [], "out": [], "err": []}
    for arguments in ([*train, "--checkpoint", str(folder / "autoencoder.pt")], ["list"]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            results["status"].append(main(arguments))
        results["out"].append(out.getvalue())
        results["err"].append(err.getvalue())
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process finds, and each of two under torchrun."""
    folder = tmp_path_factory.mktemp("two")
    alone = work(tmp_path_factory.mktemp("one"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return alone, *(torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))


@pytest.mark.parametrize("name", ["EAE, one step", "EAE, long", "noise, one step", "noise, long", *drawing(), "parts"])
def test_two_processes_give_gradients_weights_statistics_and_losses_of_one(name, results):
    alone, *both = results
    for found in both:
        assert found[name].keys() == alone[name].keys()
        for key, value in alone[name].items():
            tolerance = 1e-5 if value.dtype == torch.float32 else 1e-10  # the history is float32
            torch.testing.assert_close(found[name][key], value, rtol=tolerance, atol=tolerance, msg=f"{name}: {key}")


def test_the_entropy_would_differ_if_each_process_saw_its_own_codes(results):
    """The comparison above can fail: halves of a batch have other gradients."""
    alone = results[0]["EAE, one step"]
    order = torch.randperm(128, generator=torch.Generator().manual_seed(OPTIONS["seed"]))
    models = [eae(), eae()]
    for model, half in zip(models, order.chunk(2), strict=True):
        model.train().loss(draw(300, 5, seed=2)[half]).total.mean().backward()
    mean = sum(model.encoder[0].weight.grad for model in models) / 2
    assert (mean - alone["gradient of encoder.0.weight"]).abs().max() > 1e-3


def test_the_first_process_gives_its_weights_to_the_others(results):
    _, first, second = results
    for key, value in first["started apart"].items():
        assert torch.equal(value, second["started apart"][key]), key


def test_all_resume_and_the_first_alone_calls_back(results):
    alone, first, second = results
    for found in (alone, first, second):
        assert all(torch.equal(value, found["resumed"][key]) for key, value in found["unbroken"].items())
    assert alone["called"] == first["called"] == [1, 2, 3, 4] and second["called"] == []


def test_all_stop_at_a_nan_of_one(results):
    for found in results:
        assert found["NaN"].startswith("'eps' is nan at epoch 2, step 0, on rows [")
        assert found["NaN"] == results[0]["NaN"]
        torch.testing.assert_close(found["weights at the NaN"]["weight"], results[0]["weights at the NaN"]["weight"])


def test_a_batch_that_cannot_be_shared_is_named(results):
    for found in results[1:]:
        assert "a multiple of the 2 process(es) between 1 and n, got epochs=1, batch_size=127" in found["odd batch"]


def test_the_program_trains_on_all_and_speaks_once(results, tmp_path, monkeypatch):
    monkeypatch.setitem(image_models.SIZES, "short", image_models.SIZES["short"])  # as before, afterwards
    alone, first, second = command_line(tmp_path), *(found["command line"] for found in results[1:])
    assert alone["status"] == [0, 0] and first["status"] == second["status"] == [0, 1]
    assert first["out"][0].count("mean of the last steps") == 1 and second["out"] == ["", ""]
    numbers = [[float(v) for v in re.findall(r" (\d+\.\d+)", found["out"][0])] for found in (alone, first)]
    assert numbers[0] and numbers[1] == pytest.approx(numbers[0], abs=0.002)  # printed to 0.001
    for found in (first, second):
        assert found["err"] == [
            "",
            "error: torchrun starts `train` alone, which shares its batches: call list without\n",
        ]


@pytest.mark.parametrize(("device", "local", "devices"), [("cuda:0", 0, 2), ("cuda", 2, 2), ("cuda", 0, 0)])
def test_processes_have_a_device_each(device, local, devices, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(ValueError, match=f"these are {devices}: got {device} for process {local}"):
        parallel.start(torch.device(device))


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"))
    folder, rank = Path(sys.argv[1]), parallel.rank_and_size()[0]
    found = work(folder)
    torch.save(found | {"command line": command_line(folder)}, folder / f"{rank}.pt")
