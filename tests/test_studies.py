"""Recorded runs: the same twice, resumable, never overwriting what is worth more; and the archives of `make gpu`."""

import concurrent.futures
import dataclasses
import json
import math
import shutil
import tarfile
import types
from pathlib import Path

import gpu
import pytest
import torch
import training

from gae_core import data, metrics, plots, records, train
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.eae import EAE
from gae_core.seeds import stream
from gae_core.studies import image_models, judge, recording, registry
from gae_core.studies.study import SIZES, Outcome, Recipe, Study
from gae_core.train import Training

ROOT = Path(__file__).parents[1]
REAL = data.data_root()
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A data folder that keeps the classifier of the digits for all tests of this file."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def tiny(kept, monkeypatch):
    """Runs of two epochs, and nothing kept in the real data folder."""
    monkeypatch.setenv("GAE_DATA", str(kept))
    monkeypatch.setitem(image_models.SIZES, "short", ((256, 128), 3))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def go(out, name="eae", seeds=(0, 1), device="cpu"):
    return registry.record(name, data="digits", seeds=seeds, size="short", device=device, out=out)


@pytest.mark.parametrize("name", image_models.STUDIES)
def test_a_seed_gives_the_same_metrics_to_the_last_digit(name, digits, tmp_path):
    first, second = (records.check(go(tmp_path / str(i), name, [3])) for i in range(2))
    assert first["metrics"] == second["metrics"]
    assert all(math.isfinite(m["mean"]) and m["standard error"] is None for m in first["metrics"].values())


@pytest.mark.parametrize("device", DEVICES)
def test_the_record_has_what_is_needed_to_do_it_again(device, digits, tmp_path):
    path = go(tmp_path, device=device)
    assert path == tmp_path / "eae" / "digits-short.json"
    assert sorted(p.name for p in path.parent.iterdir()) == ["digits-short.json", "digits-short.png"]
    record = records.check(path)
    assert record["command"] == "python -m gae_core run eae --data digits --size short --seeds 0,1"
    assert (record["seeds"], record["epochs"], record["batch_size"]) == ([0, 1], 2, 128)
    assert record["wall seconds"] > record["training seconds"] > 0 < record["samples a second"]
    assert record["peak memory, MiB"] > 0
    assert record["peak memory of"].startswith("the process" if device == "cpu" else "tensors")
    assert record["classifier"]["accuracy"] > 0.95
    error = record["metrics"]["squared error"]
    a, b = error["by seed"]
    assert a != b
    assert error["mean"] == pytest.approx((a + b) / 2)
    assert error["standard error"] == pytest.approx(abs(a - b) / 2)  # of two values: |a - b| / sqrt(2) / sqrt(2)
    assert (record["device"] == "CPU") == (device == "cpu")


def test_a_killed_run_goes_on_with_the_next_seed(digits, tmp_path, monkeypatch):
    whole = records.check(go(tmp_path / "whole"))
    real, seeds = train.fit, []

    def fit(*arguments, seed, **options):
        seeds.append(seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return real(*arguments, seed=seed, **options)

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    assert not (tmp_path / "eae" / "digits-short.json").exists()
    path = go(tmp_path)
    assert seeds == [0, 1, 1], "the finished seed is not trained again"
    assert records.check(path)["metrics"] == whole["metrics"]
    assert go(tmp_path, seeds=[1]) == path and len(seeds) == 3, "what is there is not made again"
    monkeypatch.setattr(recording, "code", lambda study: "other code")
    go(tmp_path)
    assert seeds[3:] == [0, 1], "other code makes other records"


def test_a_cpu_does_not_overwrite_a_gpu(digits, tmp_path, monkeypatch):
    path = tmp_path / "eae" / "digits-short.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"device": "NVIDIA H200"}))
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("found only after the training"))
    with pytest.raises(FileExistsError, match="record of a GPU"):
        go(tmp_path)


def test_a_folder_that_cannot_be_written_is_found_before_the_training(digits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("found only after the training"))
    with pytest.raises(OSError, match="cannot write into"):
        go(tmp_path / "file")


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_must_be_different_and_some(seeds, digits, tmp_path):
    with pytest.raises(ValueError, match="seeds must be"):
        go(tmp_path, seeds=seeds)


def test_a_checkpoint_says_which_model_it_is(tmp_path):
    model = built("batch_norm", 5).eval()
    about = {"name": "batch_norm", "data": "digits", "shape": [1, 8, 8], "size": "short", "seed": 0}
    registry.label(model, **about)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pt")
    loaded, found = registry.load_checkpoint(tmp_path / "x.pt")
    assert found == about
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_the_classifier_is_kept_and_reproducible(digits, kept, tmp_path, monkeypatch):
    first = judge.classifier(digits)
    monkeypatch.setenv("GAE_DATA", str(tmp_path))
    again = judge.classifier(digits)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    told = judge.about(digits)["accuracy"]
    right = metrics.in_batches(first, digits.x_test).argmax(1) == digits.y_test
    assert told == right.double().mean().item()


def test_the_classifier_of_mnist_is_at_least_99_per_cent_right(monkeypatch):
    for path in records.RESULTS.glob("*/mnist-*.json"):
        assert records.read(path).get("classifier", {}).get("accuracy", 1) >= 0.99, path
    monkeypatch.setenv("GAE_DATA", str(REAL))
    if not (REAL / "MNIST").exists():
        pytest.skip("MNIST is not here: put it into $GAE_DATA")
    images = data.load("mnist")
    if not judge.about(images):
        pytest.skip("no classifier of MNIST is trained yet: `python -m gae_core run` trains it when first needed")
    right = metrics.in_batches(judge.classifier(images), images.x_test).argmax(1) == images.y_test
    assert right.double().mean() >= 0.99


def record(path, device="CPU", **changes):
    """Write a small record of two seeds."""
    whole = dict.fromkeys(records.KEYS, 0) | {"model": path.parent.name, "device": device, "seeds": [0, 1]}
    whole |= dict(zip(("data", "size"), path.stem.split("-"), strict=True))
    whole |= {"command": "run it", "metrics": {"error": records.summary([1.0, 3.0])}} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole))
    return path


@pytest.mark.parametrize(
    ("metric", "shown"),
    [
        (records.summary([1.0, 3.0]), "2.0\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1.0"),
        (records.summary([1234.5]), "1,234"),
        (records.summary([0.012345]), "0.0123"),
        (records.summary([5.0, 5.0]), "5\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0"),
        (records.summary([20.71304, 20.71304]), "20.713\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0"),
        (records.summary([12_300.0] * 2), "12,300\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0"),
        (records.summary([0.0, 0.0]), "0\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0"),
        (records.summary([-0.0371, -0.0371]), "-0.0371\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0"),
        ({"mean": 2.0000002, "standard error": 2e-7}, "2.00000\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.00000"),
        (None, "–"),
    ],
)
def test_cells_are_rounded_to_two_digits_of_the_error(metric, shown):
    assert records.cell(metric) == shown


def test_tables_stand_side_by_side_only_where_they_may(tmp_path):
    record(tmp_path / "a" / "mnist-full.json")
    record(tmp_path / "b" / "mnist-full.json", metrics={"other": records.summary([1.0, 1.0])})
    record(tmp_path / "c" / "mnist-full.json", device="NVIDIA H200")
    (tmp_path / "a" / "mnist-short.part.json").write_text("{}")
    both, alone = records.groups(tmp_path, ["b"]).values()
    assert [r["model"] for r in both] == ["b", "a"] and [r["model"] for r in alone] == ["c"]
    assert "| error | – | 2.0\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1.0 |" in records.table(both)
    barred = both[0] | {"metrics": {"KL(p | q)": records.summary([1.0])}}
    assert records.table([barred]).splitlines()[-1] == "| KL(p \\| q) | 1.00 |"  # not the end of a cell
    with pytest.raises(ValueError, match="rows must be"):
        records.table(both, ["eror"])
    with pytest.raises(ValueError, match="differ"):
        records.origin(both + alone)
    rows = records.table(both, transpose=True).split("\n")
    assert rows[0] == "|  | other | error |" and rows[-1] == "| a | – | 2.0\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1.0 |"


def test_what_records_do_not_share_is_told_of_each(tmp_path):
    found = [
        records.check(record(tmp_path / name / "mnist-full.json", epochs=epochs))
        for name, epochs in (("a", 20), ("long_b", 5), ("c", 20))
    ]
    assert "Epochs: 20 (a, c); 5 (long b). Seeds: 0, 1." in records.origin(found)
    assert "Epochs: 20. " in records.origin(found[:1])


def test_commands_that_differ_in_the_name_alone_are_told_once(tmp_path):
    commands = {name: f"run {name} --seeds 0" for name in ("a", "long_b")} | {"c": "run c --seeds 0,1"}
    found = [
        records.check(record(tmp_path / name / "mnist-full.json", command=f"python -m gae_core {command}"))
        for name, command in commands.items()
    ]
    told = records.origin(found).split("Made by ")[1]
    assert told == (
        "`python -m gae_core run NAME --seeds 0` with the names `a`, `long_b`; `python -m gae_core run c --seeds 0,1`."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throw(Recipe):
    """Of a coin."""

    epochs: int = 7
    betas: tuple = (0.5, 0.9)
    height: str = ""


NOTHING = Training({}, seconds=0.5, processor_seconds=0.4, rows=100, parameters=3)


def coin(recipe, data_name, seed, device):
    """A study without a model."""
    figure, axes = plots.plt.subplots()
    axes.plot([0, seed])
    curve = [float(seed), 2.0 * seed]
    return Outcome({"seed": float(seed)}, NOTHING, {"curve": curve}, figure)


def test_a_study_is_recorded_by_seed(tmp_path):
    study = Study("a coin", "coins", ("digits",), lambda data_name, size: Throw(height=size), coin)
    open_before = plots.plt.get_fignums()
    path = recording.record("coin", study, seeds=(1, 3), size="short", device="cpu", out=tmp_path)
    found = records.check(path)
    assert path == tmp_path / "coin" / "digits-short.json" and path.with_suffix(".png").exists()
    assert found["metrics"]["seed"] == records.summary([1.0, 3.0])
    assert found["curves"] == {"curve": [[1.0, 2.0], [3.0, 6.0]]}
    assert (found["topic"], found["height"], found["epochs"], found["parameters"]) == ("coins", "short", 7, 3)
    assert (found["training seconds"], found["samples a second"]) == (1.0, 200.0)
    assert found["command"] == "python -m gae_core run coin --data digits --size short --seeds 1,3"
    assert plots.plt.get_fignums() == open_before
    assert list(records.groups(tmp_path)) == ["coins: digits, size short, CPU, 7 epochs, seeds 1, 3"]
    with pytest.raises(ValueError, match="data of coin must be one of digits, got 'mnist'"):
        recording.record("coin", study, data="mnist", out=tmp_path)


COIN = Study("a coin", "coins", ("digits",), lambda *_: Throw(), coin)


def toss(out, *seeds, study=COIN, **options):
    return recording.record("coin", study, seeds=seeds, size="short", device="cpu", out=out, **options)


def test_seeds_join_a_record_that_was_made_alike(tmp_path):
    said, tossed = [], []

    def counted(recipe, data_name, seed, device):
        tossed.append(seed)
        return coin(recipe, data_name, seed, device)

    study = dataclasses.replace(COIN, run=counted)
    picture = toss(tmp_path, 0, 1, study=study).with_suffix(".png")
    first, seen = records.check(picture.with_suffix(".json")), picture.read_bytes()
    path = toss(tmp_path, 5, 1, 2, study=study, say=said.append)
    found = records.check(path)
    assert tossed == [0, 1, 5, 2] and found["seeds"] == [0, 1, 5, 2]
    assert found["metrics"]["seed"]["by seed"] == [0.0, 1.0, 5.0, 2.0]
    assert found["curves"]["curve"] == [[float(s), 2.0 * s] for s in (0, 1, 5, 2)]
    assert found["command"].endswith("--seeds 0,1,5,2") and picture.read_bytes() == seen
    assert found["training seconds"] == pytest.approx(2 * first["training seconds"])
    assert found["samples a second"] == pytest.approx(first["samples a second"])
    assert found["wall seconds"] > first["wall seconds"]
    assert [line.removeprefix("coin, digits, short") for line in said] == [
        ": recorded already are seeds 0, 1, to run 5, 2",
        ", seed 5: trained and measured in 0 s",
        ", seed 2: trained and measured in 0 s",
    ]
    toss(tmp_path, 1, 5, study=study, say=said.append)
    assert tossed == [0, 1, 5, 2] and said[-1].endswith("to run none")


@pytest.mark.parametrize("change", ["code", "settings"])
def test_seeds_of_a_record_that_was_made_otherwise_are_not_lost_unasked(change, tmp_path, monkeypatch):
    path, said, study = toss(tmp_path, 0, 1), [], COIN
    if change == "code":
        monkeypatch.setattr(recording, "code", lambda study: "other code")
    else:
        study = dataclasses.replace(COIN, recipe=lambda *_: Throw(epochs=8))
    before, other = path.read_bytes(), {"code": "code", "settings": "epochs"}[change]
    with pytest.raises(FileExistsError, match=rf"seeds 0, 1, made with another {other}: .*--seeds 0,1,2.*--replace"):
        toss(tmp_path, 2, study=study)
    assert path.read_bytes() == before
    toss(tmp_path, 1, 0, 2, study=study, say=said.append)
    assert records.check(path)["seeds"] == [1, 0, 2] and "it stays until these are done" in said[0]
    monkeypatch.setattr(recording, "code", lambda study: "again other code")
    toss(tmp_path, 2, study=study, replace=True)
    assert records.check(path)["seeds"] == [2]


def test_seeds_that_another_run_left_or_ends_meanwhile_are_kept(tmp_path):
    """A run of the seeds 0 and 1 is stopped after 0, and while another does 2, a third one ends with 3."""

    def stopped(recipe, data_name, seed, device):
        if seed == 1:
            raise KeyboardInterrupt
        if seed == 2:
            toss(tmp_path, 3)
        return coin(recipe, data_name, seed, device)

    study = dataclasses.replace(COIN, run=stopped)
    with pytest.raises(KeyboardInterrupt):
        toss(tmp_path, 0, 1, study=study)
    path = toss(tmp_path, 2, study=study)
    assert records.check(path)["seeds"] == [3, 2]
    said = []
    toss(tmp_path, 0, 1, say=said.append)
    assert records.check(path)["seeds"] == [3, 2, 0, 1]
    assert said[1] == "coin, digits, short, seed 0: kept from a run that was stopped"
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".png"]


def test_runs_at_once_do_not_disturb_each_other(tmp_path):
    """Threads see the same files as processes; a study without a figure, since pyplot is for one thread."""
    study = dataclasses.replace(COIN, run=lambda *a: Outcome({"seed": float(a[2])}, NOTHING))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(toss, tmp_path, *seeds, study=study) for seeds in [(i % 8, 8 + i % 8) for i in range(48)]]
    path = {job.result() for job in jobs}.pop()
    assert sorted(records.check(path)["seeds"]) == list(range(16))
    assert [p.name for p in path.parent.iterdir()] == ["digits-short.json"]


def test_a_picture_that_cannot_be_written_does_not_lose_the_numbers(tmp_path, monkeypatch):
    tossed = []

    def heavy(recipe, data_name, seed, device):
        tossed.append(seed)
        return coin(recipe, data_name, seed, device)

    def full(figure, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    study = dataclasses.replace(COIN, run=heavy)
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", full)
        with pytest.raises(OSError, match=r"cannot write .*digits-short\.part\.png: No space left.*numbers are kept"):
            toss(tmp_path, 0, 1, study=study)
    path = toss(tmp_path, 0, 1, study=study)
    assert tossed == [0, 1] and records.check(path)["seeds"] == [0, 1]
    assert [p.name for p in path.parent.iterdir()] == ["digits-short.json"]
    plots.plt.close("all")


def test_a_record_that_cannot_be_written_is_named_and_leaves_the_old_one(tmp_path):
    """Truly: the process may write no file longer than ten bytes."""
    import resource

    path, limits = tmp_path / "a.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    records.write(path, {"a": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*a\.json: "):
            records.write(path, {"a": "b" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert records.read(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_damaged_classifier_is_found_before_the_training(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("GAE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("found only after the training"))
    monkeypatch.setattr(judge, "about", lambda *a, **k: {"accuracy": 1.0})
    path = judge._file(digits, 0)
    path.parent.mkdir()
    path.write_bytes(b"half a classifier")
    with pytest.raises(ValueError, match=r"classifier-digits-0.*\.pt is damaged: delete it"):
        go(tmp_path / "out")


def test_the_digest_is_of_the_code_that_a_study_runs(tmp_path, monkeypatch):
    """Of its imports, however deep; comments, docstrings, layout and other studies do not count."""
    package = tmp_path / "gae_core"
    shutil.copytree(ROOT / "gae_core", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(recording, "__file__", str(package / "studies" / "recording.py"))
    monkeypatch.setattr(recording.inspect, "getsourcefile", lambda run: str(package / "studies" / "image_models.py"))
    study, path = registry.STUDIES["eae"], package / "models" / "eae.py"
    names = {str(p.relative_to(package)) for p in recording.sources(package / "studies" / "image_models.py")}
    assert {"entropy.py", "models/eae.py", "metrics/samples.py", "train.py", "studies/judge.py", "seeds.py"} <= names
    other = {"studies/family.py", "studies/recording.py", "energy.py", "__main__.py"}
    assert not (other | {"metrics/__init__.py", "metrics/chains.py", "metrics/density.py"}) & names
    first, source = recording.code(study), path.read_text(encoding="utf-8")
    path.write_text(f"# A comment.\n\n\n{source}", encoding="utf-8")
    assert recording.code(study) == first
    (package / "energy.py").write_text("x = 1\n", encoding="utf-8")
    assert recording.code(study) == first
    path.write_text(source.replace('"""', '"""Another word: ', 1), encoding="utf-8")
    assert recording.code(study) == first
    path.write_text(source + "\nx = 1\n", encoding="utf-8")
    assert recording.code(study) != first
    path.write_text("from . import vae\n" + source, encoding="utf-8")
    with pytest.raises(ValueError, match=r"eae\.py must import by full names"):
        recording.code(study)


def test_a_recipe_leaves_a_records_own_keys_alone(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Named(Recipe):
        model: str = "other"
        seeds: int = 3

    with pytest.raises(ValueError, match=r"must not have fields that a record has itself, coin has model, seeds"):
        toss(tmp_path, 0, study=dataclasses.replace(COIN, recipe=lambda *_: Named()))


@pytest.mark.parametrize(
    "outcome", [Outcome({"a": math.nan, "b": 1.0}, NOTHING), Outcome({"b": 1.0}, NOTHING, {"a": [1.0, math.inf]})]
)
def test_what_is_not_finite_is_named_and_not_kept(outcome, tmp_path):
    with pytest.raises(ValueError, match="metrics and curves must be finite, seed 4 of coin gave a"):
        toss(tmp_path, 4, study=dataclasses.replace(COIN, run=lambda *_: outcome))
    assert not list((tmp_path / "coin").glob("*.json"))


def test_curves_that_not_all_seeds_have_are_left_out(tmp_path):
    def run(recipe, data_name, seed, device):
        return Outcome({"seed": float(seed)}, NOTHING, {"all": [1.0], **({"some": [2.0]} if seed else {})})

    path = toss(tmp_path, 1, 0, study=dataclasses.replace(COIN, run=run))
    assert records.check(path)["curves"] == {"all": [[1.0], [1.0]]}


def test_seeds_of_two_judges_do_not_join(tmp_path):
    def run(recipe, data_name, seed, device):
        return Outcome({"seed": float(seed)}, NOTHING, classifier={"accuracy": seed / 10})

    with pytest.raises(ValueError, match="seeds must be measured by one classifier"):
        toss(tmp_path, 1, 2, study=dataclasses.replace(COIN, run=run))


@pytest.mark.parametrize("name", registry.STUDIES)
def test_every_study_says_what_it_is(name):
    study = registry.STUDIES[name]
    assert study.topic and study.about and study.data
    for size in SIZES:
        for data_name in study.data:
            settings = study.recipe(data_name, size).settings()
            assert settings["epochs"] >= 0  # 0 where nothing is trained
            assert json.loads(json.dumps(settings)) == settings


def test_the_rows_of_data_sets_are_as_many_as_is_said(digits):
    assert data.ROWS["digits"] == len(digits.x_train) and set(data.ROWS) == set(data.NAMES)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metrics": {"error": records.summary([1.0, 3.0]) | {"mean": 2.5}}}, "does not follow"),
        ({"metrics": {"error": records.summary([1.0])}}, "does not follow"),
        ({"model": "b"}, "is the record of b/mnist-full"),
    ],
)
def test_a_record_that_is_not_whole_is_refused(changes, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        records.check(record(tmp_path / "a" / "mnist-full.json", **changes))


def test_tests_whose_tools_need_what_is_not_here_are_left_out(monkeypatch, capsys):
    """The ledger's tests import the ledger, which imports the parser that the book is built with."""
    find = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "myst_parser" else find(name))
    found = {Path(path).name for path in gpu.tests_that_can_run()}
    assert "test_studies.py" in found and "test_ledger.py" not in found
    assert "test_ledger.py is left out: myst_parser not installed here" in capsys.readouterr().out


def archive(folder, name, path):
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w:gz") as file:
        file.add(path, f"results/{path.parent.name}/{path.name}")


def test_archives_are_taken_into_the_book(tmp_path, capsys):
    book, made = tmp_path / "book", tmp_path / "made"
    record(book / "a" / "mnist-full.json", device="NVIDIA H200")
    archive(tmp_path / "from", "gpu-1.tar.gz", record(made / "a" / "mnist-full.json"))
    archive(tmp_path / "from", "gpu-2.tar.gz", record(made / "b" / "mnist-full.json", device="NVIDIA H200"))
    assert gpu.take(tmp_path / "from", book) == [book / "b" / "mnist-full.json"]
    assert "left out" in capsys.readouterr().out
    assert records.check(book / "a" / "mnist-full.json")["device"] == "NVIDIA H200"
    archive(tmp_path / "bad", "gpu.tar.gz", record(made / "c" / "mnist-full.json", model="d"))
    with pytest.raises(ValueError, match="is the record of d"):
        gpu.take(tmp_path / "bad", book)


def test_a_part_leaves_one_archive_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    from gae_core.__main__ import main

    calls = []
    monkeypatch.setattr(gpu, "call", lambda *a: calls.append(main(list(a[2:]))))  # in this process: the tiny size
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--data", "digits", "--size", "short", "--seeds", "0"]
    for _ in range(2):
        assert gpu.main([*arguments, "--part", "2"]) == 0
    assert calls == [0, 0]
    taken = gpu.take(tmp_path / "gpu-2.tar.gz", tmp_path / "book")
    assert [p.name for p in taken] == ["digits-short.json"] and taken[0].with_suffix(".png").exists()
    assert gpu.main([*arguments, "--part", "99"]) == 1
    assert "part must be 1 to" in capsys.readouterr().err


def test_the_benchmark_measures_and_places_its_table(tmp_path, monkeypatch):
    monkeypatch.setitem(training.ROWS["cpu"], "MLP", 300)
    lines = training.measure("MLP", torch.device("cpu"), rounds=1)
    assert [line.split(" | ")[1] for line in lines][:2] == ["fit", "bare loop"]
    (tmp_path / "benchmarks").mkdir()
    readme = tmp_path / "benchmarks" / "README.md"
    readme.write_text((ROOT / "benchmarks" / "README.md").read_text())
    monkeypatch.setattr(training, "ROOT", tmp_path)
    for text in ("CPU, before\n", "CPU, after\n", "NVIDIA\n"):
        training.place(text)
    found = readme.read_text()
    assert "CPU, after\n" in found and "CPU, before" not in found and "NVIDIA\n" in found


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def few(images, n=64):
    """The first images of a data set, under a name of their own."""
    return data.Images("few", images.x_train[:n], images.y_train[:n], images.x_test[:40], images.y_test[:40])


def test_a_classifier_depends_on_its_seed_alone(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "pick_device", lambda device: torch.device("cpu"))
    fit, states = train.fit, []
    monkeypatch.setattr(train, "fit", lambda *args, **options: fit(*args, **{**options, "epochs": 2, "batch_size": 32}))
    for number, (global_seed, seed) in enumerate(((0, 0), (1, 0), (0, 1))):
        monkeypatch.setenv("GAE_DATA", str(tmp_path / str(number)))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(global_seed)
            states.append(state(judge.classifier(few(digits), seed=seed)))
    assert same(states[0], states[1]) and not same(states[0], states[2])


def built(name, seed, size="short"):
    return registry.build(name, (1, 8, 8), data="digits", size=size, seed=seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", registry.MODELS)
def test_models_are_built_from_their_seed_alone(name, size):
    before = torch.random.get_rng_state()
    first, again, other = (built(name, seed, size) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(state(first), state(again)) and not same(state(first), state(other))
    assert isinstance(first, Autoencoder) and first(torch.rand(4, 1, 8, 8)).shape == (4, 1, 8, 8)


def test_building_leaves_the_generator_of_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    built("autoencoder", 123)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_batch_norm_alone_is_the_entropic_autoencoder_without_entropy():
    models = {name: built(name, 0) for name in ("batch_norm", "eae")}
    assert all(isinstance(model, EAE) for model in models.values())
    assert models["batch_norm"].lam == 0 and models["eae"].lam == 1
    assert same(state(models["batch_norm"]), state(models["eae"]))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("gan", "short", "name must be one of autoencoder, .*got 'gan'"),
        ("eae", "huge", "size must be one of short, .*got 'huge'"),
    ],
)
def test_unknown_names_and_sizes_are_named(name, size, message):
    with pytest.raises(ValueError, match=message):
        built(name, 0, size)


@pytest.mark.parametrize(("n", "epochs"), [(1000, 180), (60_000, 3), (120_000, 2), (10**9, 1)])
def test_a_size_is_a_number_of_images_seen(n, epochs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(data.ROWS, "digits", n)
        patch.setitem(image_models.SIZES, "short", ((256, 128), 180))
        assert image_models.recipe("eae", "digits", "short").epochs == epochs


RECIPE = dataclasses.replace(image_models.recipe("eae", "digits", "short"), drawn=100)


@pytest.fixture
def model(digits):
    model = built("eae", 0)
    image_models.recipe("eae", "digits", "short").fit(model, digits.x_train, seed=0)
    return model


def test_four_sources_go_through_the_same_decoder_and_repeat(model, digits):
    sources = image_models.sample_sources(model, digits, RECIPE, n=30, seed=3)
    assert list(sources) == ["N(0, I)", "one Gaussian", "mixture of ten", "reconstructions"]
    for x in sources.values():
        assert x.shape == (30, 1, 8, 8) and x.min() >= 0 and x.max() <= 1
    torch.testing.assert_close(sources["reconstructions"], model(digits.x_test[:30]).detach())
    generator = stream(3, "samples")
    torch.testing.assert_close(sources["N(0, I)"], model.sample(30, generator=generator))
    again, other = (image_models.sample_sources(model, digits, RECIPE, n=30, seed=s) for s in (3, 4))
    for name, x in sources.items():
        assert torch.equal(x, again[name])
        assert torch.equal(x, other[name]) == (name == "reconstructions")


def test_measures_are_the_metrics_of_the_sources(model, digits):
    values = image_models.measure(model, digits, RECIPE, seed=3)
    error = (digits.x_test - model(digits.x_test).detach()).square().sum((1, 2, 3)).mean()
    assert values["squared error"] == pytest.approx(float(error), rel=1e-5)
    real = judge.classifier(digits).features(digits.x_test).detach()
    sources = image_models.sample_sources(model, digits, RECIPE, n=100, seed=3) | {"real images": digits.x_train[:100]}
    for name, x in sources.items():
        distance = metrics.frechet_distance(judge.classifier(digits).features(x).detach(), real)
        assert values[f"Fréchet, {name}"] == pytest.approx(distance, rel=1e-4)
    codes = metrics.gaussianity(model.encode(digits.x_test))
    assert values["ks marginal"] == pytest.approx(codes.ks_marginal, rel=1e-5)
    assert values["radius std"] == pytest.approx(codes.radius_std, rel=1e-5)
    assert all(math.isfinite(value) for value in values.values())


def test_what_an_image_models_recipe_says_is_what_is_recorded_and_run(digits, monkeypatch):
    """Each field changes what is trained or measured, and the record says so."""
    monkeypatch.setattr(data, "load", lambda name: few(digits, 120))
    features = types.SimpleNamespace(features=torch.nn.Flatten())
    monkeypatch.setattr(judge, "classifier", lambda images: types.SimpleNamespace(to=lambda device: features))
    small = {"epochs": 2, "batch_size": 20, "hidden": (16,), "dim": 3, "coded": 100, "fitted": 90, "components": 2}
    small |= {"drawn": 30, "compared": 20, "binarised": 10, "samples": 8}
    eae = image_models.Recipe(kind="eae", lam=1.0, k=1, **small)
    vae = image_models.Recipe(kind="vae", **small)
    changes = {"kind": "autoencoder", "lam": 0.1, "k": 2, "hidden": (12,), "dim": 4, "coded": 80, "fitted": 60}
    changes |= {"components": 3, "drawn": 25, "compared": 15, "epochs": 3, "batch_size": 30, "lr": 1e-3}
    changes |= {"schedule": "constant", "optimizer": "sgd", "betas": (0.5, 0.9), "clip": 0.01}
    of_vae = {"binarised": 5, "samples": 4}
    assert {*changes, *of_vae} == set(eae.settings())

    def measured(recipe):
        outcome = image_models.run(recipe, "digits", 0, torch.device("cpu"))
        plots.plt.close(outcome.figure)
        return outcome.metrics

    before = {recipe: measured(recipe) for recipe in (eae, vae)}
    assert measured(eae) == before[eae]
    for recipe, name, value in [(eae, *c) for c in changes.items()] + [(vae, *c) for c in of_vae.items()]:
        other = dataclasses.replace(recipe, **{name: value})
        assert other.settings()[name] != recipe.settings()[name] and measured(other) != before[recipe], name


@pytest.mark.parametrize("size", SIZES)
def test_models_that_differ_in_their_codes_differ_in_nothing_else(size):
    by_dim = {d: registry.STUDIES[f"vae_d{d}"].recipe("mnist", size) for d in (2, 10, 50, 200)}
    assert all(recipe == dataclasses.replace(by_dim[50], dim=d) for d, recipe in by_dim.items())
    bound = [registry.STUDIES[name].recipe("mnist", "medium") for name in ("vae_k1", "iwae_k5", "iwae_k50")]
    assert {r.epochs * 60_000 // r.batch_size for r in bound} == {24_000}
