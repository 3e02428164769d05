"""The command line: what it does, and what it says to those who get it wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gae_core import data, records
from gae_core.__main__ import DATA, main
from gae_core.studies import image_models, registry
from gae_core.studies.study import SIZES, Outcome, Recipe, Study
from gae_core.train import Training


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("GAE_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(image_models.SIZES, "short", ((256, 128), 3))
    monkeypatch.chdir(tmp_path)


def short(*arguments):
    return [*arguments, "--data", "digits", "--size", "short", "--device", "cpu"]


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "gae_core", "list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stderr == ""


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*registry.STUDIES, *DATA, *SIZES])


def test_list_says_how_a_study_is_made(capsys):
    assert main(["list", "eae", "--size", "short", "--data", "digits"]) == 0
    out = capsys.readouterr().out
    assert "made in gae_core/studies/image_models.py, topic image models" in out and "  lam: 1.0\n" in out
    assert main(["list", "text_bn_0.7"]) == 0
    out = capsys.readouterr().out
    assert "gae_core/studies/bn_vae_text.py" in out and "  gamma: 0.7\n" in out and "  test: 1000\n" in out
    assert main(["list", "text_bn_0.7", "--data", "mnist"]) == 1
    assert "must be one of learnable, he2019, got 'mnist'" in capsys.readouterr().err


def test_list_says_which_records_are_not_of_todays_code(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "STUDIES", {"coin": COINS[0]})
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert main([*short("run", "coin"), "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["list", "--stale"]) == 0
    assert capsys.readouterr().out.strip() == ""
    monkeypatch.setattr(registry, "STUDIES", {"coin": COINS[1]})
    assert main(["list", "--stale"]) == 0
    assert capsys.readouterr().out == "coin/digits-short: another epochs\n"
    monkeypatch.setattr(registry, "STUDIES", {})
    assert main(["list", "--stale"]) == 0
    assert capsys.readouterr().out == "coin/digits-short: another model\n"


def test_the_data_sets_are_those_that_can_be_loaded():
    for name in DATA:
        try:
            data.load(name)
        except FileNotFoundError as error:
            assert f"python -m gae_core data {name}" in str(error)


@pytest.mark.parametrize("name", registry.MODELS)
def test_train_resume_and_sample(name, tmp_path, capsys):
    path = tmp_path / "new" / "x.pt"
    train = short("train", name, "--checkpoint", str(path), "--seed", "2")
    assert main(train) == 0
    assert main([*train, "--resume"]) == 0
    assert main(["sample", str(path), "-n", "6"]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "nan" not in capsys.readouterr().out


def coin(*_):
    return Outcome({"heads": 0.5}, Training({}, seconds=1.0, processor_seconds=1.0, rows=1, parameters=0))


COINS = [Study("a coin", "coins", ("digits",), lambda *_, n=n: Recipe(epochs=n), coin) for n in range(2)]


def test_run_all_and_report(capsys, tmp_path, monkeypatch):
    elsewhere = Study("not on these data", "coins", ("mnist",), lambda *_: Recipe(), coin)
    studies = {**image_models.STUDIES, "coin": COINS[0], "other": elsewhere}
    monkeypatch.setattr(registry, "STUDIES", studies)
    out = ["--out", str(tmp_path / "out")]
    assert main([*short("run", "all", "--seeds", "0"), *out]) == 0
    assert len(capsys.readouterr().out.split()) == len(image_models.STUDIES) + 1
    assert main(["report", *out]) == 0
    table = capsys.readouterr().out
    assert "| squared error |" in table and all(name.replace("_", " ") in table for name in registry.MODELS)


def test_run_says_what_it_does_and_does_not_lose_seeds(capsys, tmp_path, monkeypatch):
    run = [*short("run", "coin"), "--out", str(tmp_path / "out"), "--seeds"]
    monkeypatch.setattr(registry, "STUDIES", {"coin": COINS[0]})
    path = tmp_path / "out" / "coin" / "digits-short.json"
    for seeds, said in (("0,1", "seed 1: trained"), ("2", "already are seeds 0, 1, to run 2"), ("1", "to run none")):
        assert main([*run, seeds]) == 0
        told = capsys.readouterr()
        assert told.out == f"{path}\n" and said in told.err
    assert records.check(path)["seeds"] == [0, 1, 2]
    monkeypatch.setattr(registry, "STUDIES", {"coin": COINS[1]})
    assert main([*run, "0"]) == 1
    assert "--replace" in capsys.readouterr().err and records.check(path)["seeds"] == [0, 1, 2]
    assert main([*run, "0", "--replace"]) == 0
    assert records.check(path)["seeds"] == [0]
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "others join it" in " ".join(capsys.readouterr().out.split())


def test_data_says_what_it_found(capsys):
    assert main(["data", "digits"]) == 0
    assert "1,347 training and 450 test images of 8×8 in 10 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "eea"], "do you mean eae?"),
        (["run", "al"], "do you mean all?"),
        (["data", "mnits"], "do you mean mnist?"),
        (["run", "eae", "--size", "fulll"], "do you mean full?"),
        (["run", "zzz"], "There are: autoencoder"),
        (["run", "eae", "--seeds", "0,,1"], "whole numbers like 0,1,2"),
        (["run", "eae", "--seeds", "1,1"], "different"),
        (["run", "eae", "--seeds", "-1"], "whole numbers"),
        (["run", "eae", "--device", "gpu"], "auto, cpu, cuda"),
        (["run", "eae", "--device", "cuda:99"], "CUDA devices here"),
        ([], "required"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_failures_return_1_and_say_what_to_do(tmp_path, capsys):
    (tmp_path / "file").write_text("no checkpoint")
    checkpoint = str(tmp_path / "eae.pt")
    assert main(short("train", "eae")) == 0  # writes eae.pt here
    cases = {
        "python -m gae_core data mnist": ["run", "eae", "--data", "mnist", "--device", "cpu"],
        "--resume": short("train", "eae"),
        "is of another training": short("train", "batch_norm", "--checkpoint", checkpoint, "--resume"),
        "cannot write into": [*short("run", "eae"), "--out", str(tmp_path / "file")],
        "is no checkpoint": ["sample", str(tmp_path / "file")],
        "No such file": ["sample", "missing.pt"],
        "-n must be": ["sample", checkpoint, "-n", "0"],
        "run all": ["report", "--out", str(tmp_path / "empty")],
    }
    for said, arguments in cases.items():
        assert main(arguments) == 1, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error, (arguments, error)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
@pytest.mark.parametrize(("asked", "there", "right"), [("3.13", "3.11", False), ("3.11", "3.11", True)])
def test_make_does_not_take_another_python_than_the_one_asked_for(asked, there, right, tmp_path):
    root = Path(__file__).parents[1]
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    for path, version in ((tmp_path / "python", asked), (tmp_path / ".venv" / "bin" / "python", there)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {version}\n")
        path.chmod(0o755)
    book = tmp_path / ".venv" / "bin" / "jupyter-book"
    shutil.copy(tmp_path / "python", book)
    (tmp_path / ".venv" / ".ready").touch()
    # `make test` hands its own arguments on.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("MFLAGS", "PYTHON")}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["make", f"PYTHON={tmp_path / 'python'}", "book"], **options)
    assert (done.returncode == 0) == right
    assert right or (f".venv has Python {there}" in done.stdout and "rm -rf .venv" in done.stdout)
    plain = subprocess.run(["make", "book"], **options)
    assert plain.returncode == 0, "without a word of which Python, the one that is there will do"
