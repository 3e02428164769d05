"""Recorded runs and the classifier of the metrics: kept, not repeated, and the same from the same seed."""

import itertools
import json
import math

import matplotlib.pyplot as plt
import pytest
import torch

from gae_core import __main__, data, experiments, metrics, nets, train
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.eae import EAE


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    """A data folder whose classifier was trained with a global generator in a known state."""
    path = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAE_DATA", str(path))
        before = torch.random.get_rng_state()
        model = experiments.classifier(digits)
        untouched = torch.equal(torch.random.get_rng_state(), before)
    return path, model, untouched


@pytest.fixture
def trained(folder, monkeypatch):
    monkeypatch.setenv("GAE_DATA", str(folder[0]))
    return folder[1]


def test_the_classifier_is_recorded_with_the_accuracy_that_it_has(trained, folder, digits):
    path = folder[0] / "classifier-digits-0.json"
    record = json.loads(path.read_text())
    logits = trained(digits.x_test)
    right = int((logits.argmax(1) == digits.y_test).sum())
    assert record["accuracy"] == right / 450 and record["data"] == "digits" and record["seed"] == 0
    assert record["accuracy"] > 0.97  # 450 images: 0.97 is 3 standard errors below 0.99
    assert not trained.training and next(trained.parameters()).device.type == "cpu"
    assert sorted(file.name for file in folder[0].iterdir()) == ["classifier-digits-0.json", "classifier-digits-0.pt"]


def test_training_the_classifier_leaves_the_global_generator(folder):
    assert folder[2]


def test_the_classifier_is_not_trained_again(trained, folder, digits, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("it was trained again")

    monkeypatch.setattr("gae_core.models.classifier.Classifier.loss", refuse)
    files = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder[0].iterdir()}
    before = torch.random.get_rng_state()
    torch.testing.assert_close(state(experiments.classifier(digits)), state(trained), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder[0].iterdir()} == files
    with pytest.raises(AssertionError, match="trained again"):
        experiments.classifier(digits, seed=1)  # another seed is another classifier


def test_a_lost_record_is_written_again(trained, folder, digits):
    path = folder[0] / "classifier-digits-0.json"
    text = path.read_text()
    path.unlink()
    experiments.classifier(digits)
    assert path.read_text() == text


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
            states.append(state(experiments.classifier(few(digits), seed=seed)))
    assert same(states[0], states[1]) and not same(states[0], states[2])


@pytest.mark.parametrize("size", experiments.SIZES)
@pytest.mark.parametrize("name", experiments.MODELS)
def test_models_are_built_from_their_seed_alone(name, size):
    before = torch.random.get_rng_state()
    first, again, other = (experiments.build(name, (1, 8, 8), size=size, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(state(first), state(again)) and not same(state(first), state(other))
    assert isinstance(first, Autoencoder) and first(torch.rand(4, 1, 8, 8)).shape == (4, 1, 8, 8)


def test_building_leaves_the_generator_of_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    experiments.build("autoencoder", (1, 8, 8), size="short", seed=123)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_batch_norm_alone_is_the_entropic_autoencoder_without_entropy():
    models = {name: experiments.build(name, (1, 8, 8), size="short", seed=0) for name in ("batch_norm", "eae")}
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
        experiments.build(name, (1, 8, 8), size=size, seed=0)


@pytest.mark.parametrize(("n", "epochs"), [(1000, 180), (60_000, 3), (120_000, 2), (10**9, 1)])
def test_a_size_is_a_number_of_images_seen(n, epochs):
    assert experiments.Size(nets.mlp_pair, 180).epochs(n) == epochs


@pytest.fixture
def tiny(monkeypatch):
    """A size of one epoch, for tests."""
    monkeypatch.setitem(experiments.SIZES, "tiny", experiments.Size(experiments._small_pair, 1))
    monkeypatch.setattr(train, "pick_device", lambda device: torch.device("cpu"))


@pytest.fixture
def model(tiny, digits):
    model = experiments.build("eae", digits.shape, size="tiny", seed=0)
    experiments.fit(model, digits, size="tiny", seed=0, progress=False)
    return model


def test_four_sources_go_through_the_same_decoder_and_repeat(model, digits):
    sources = experiments.sample_sources(model, digits, n=30, seed=3)
    assert list(sources) == ["N(0, I)", "one Gaussian", "mixture of ten", "reconstructions"]
    for x in sources.values():
        assert x.shape == (30, 1, 8, 8) and x.min() >= 0 and x.max() <= 1
    torch.testing.assert_close(sources["reconstructions"], model(digits.x_test[:30]).detach())
    generator = torch.Generator().manual_seed(3)
    torch.testing.assert_close(sources["N(0, I)"], model.sample(30, generator=generator))
    again, other = (experiments.sample_sources(model, digits, n=30, seed=s) for s in (3, 4))
    for name, x in sources.items():
        assert torch.equal(x, again[name])
        assert torch.equal(x, other[name]) == (name == "reconstructions")


def test_measures_are_the_metrics_of_the_sources(trained, model, digits):
    values = experiments.measure(model, digits, seed=3, n=100)
    error = (digits.x_test - model(digits.x_test).detach()).square().sum((1, 2, 3)).mean()
    assert values["squared error"] == pytest.approx(float(error), rel=1e-5)
    real = trained.features(digits.x_test).detach()
    sources = experiments.sample_sources(model, digits, n=100, seed=3) | {"real images": digits.x_train[:100]}
    for name, x in sources.items():
        distance = metrics.frechet_distance(trained.features(x).detach(), real)
        assert values[f"Fréchet, {name}"] == pytest.approx(distance, rel=1e-4)
    codes = metrics.gaussianity(model.encode(digits.x_test))
    assert values["ks marginal"] == pytest.approx(codes.ks_marginal, rel=1e-5)
    assert values["radius std"] == pytest.approx(codes.radius_std, rel=1e-5)
    assert all(math.isfinite(value) for value in values.values())


def test_a_run_records_all_that_is_needed_to_do_it_again(trained, tiny, digits, tmp_path):
    options = dict(images=digits, seeds=(0, 1), size="tiny", device="cpu")
    path = experiments.run("autoencoder", out=tmp_path, **options)
    assert path == tmp_path / "autoencoder" / "digits-tiny.json" and path.with_suffix(".png").stat().st_size > 1000
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["command"] == "python -m gae_core run autoencoder --data digits --size tiny --seeds 0,1"
    assert (record["model"], record["seeds"], record["device"], record["epochs"]) == ("autoencoder", [0, 1], "CPU", 1)
    layers = [64, 256, 128, 8], [8, 128, 256, 64]
    assert record["parameters"] == sum((a + 1) * b for w in layers for a, b in itertools.pairwise(w))
    for metric in record["metrics"].values():
        first, second = metric["by seed"]
        assert metric["mean"] == pytest.approx((first + second) / 2, rel=1e-12)
        assert metric["standard error"] == pytest.approx(abs(first - second) / 2, rel=1e-9, abs=1e-12)
    again = json.loads(experiments.run("autoencoder", out=tmp_path / "again", **options).read_text(encoding="utf-8"))
    assert again["metrics"] == record["metrics"]


def test_one_seed_has_no_standard_error_and_three_have_theirs():
    assert experiments._standard_error([3.0]) is None
    assert experiments._standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3), rel=1e-14)


def test_a_cpu_run_does_not_overwrite_the_record_of_a_gpu(tiny, digits, tmp_path, monkeypatch):
    path = tmp_path / "eae" / "digits-tiny.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"device": "NVIDIA T4"}))
    monkeypatch.setattr(train, "fit", None)  # refused before anything is trained
    with pytest.raises(FileExistsError, match="record of a GPU, this would be one of a CPU: move it away first"):
        experiments.run("eae", images=digits, size="tiny", device="cpu", out=tmp_path)
    assert json.loads(path.read_text()) == {"device": "NVIDIA T4"}


def test_a_run_without_seeds_is_refused(tiny, digits, tmp_path):
    with pytest.raises(ValueError, match="seeds must name at least one"):
        experiments.run("eae", images=digits, seeds=(), size="tiny", out=tmp_path)


def test_command_line_reports_data_and_errors(monkeypatch, tmp_path, capsys):
    assert __main__.main(["data", "digits"]) == 0
    assert capsys.readouterr().out == "digits: 1,347 training and 450 test images\n"
    monkeypatch.setenv("GAE_DATA", str(tmp_path))
    assert __main__.main(["run", "eae", "--data", "mnist"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: mnist is not in ")
    assert "python -m gae_core data mnist" in captured.err


def test_command_line_passes_its_options_to_the_run(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(
        experiments, "run", lambda name, **options: calls.append((name, options)) or tmp_path / "x.json"
    )
    words = f"run eae --data digits --size short --seeds 4,7 --device cpu --out {tmp_path}"
    assert __main__.main(words.split()) == 0
    ((name, options),) = calls
    assert options.pop("images").name == "digits"
    assert (name, options) == ("eae", dict(seeds=[4, 7], size="short", device="cpu", out=tmp_path))
    assert capsys.readouterr().out == f"{tmp_path / 'x.json'}\n"
