"""Data sets: exact values and splits, files that are there or not, toy densities against quadrature."""

import gzip
import hashlib
import math
import struct
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import torchvision
from helpers import assert_z
from scipy import integrate
from scipy.special import ive
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from gae_core import data

TOYS = ["eight_gaussians", "twenty_five_gaussians", "swiss_roll", "rings"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_bytes_become_floats_in_the_unit_interval_and_floats_pass():
    x = data.to_unit(torch.arange(256, dtype=torch.uint8))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.arange(256) / 255, rtol=0, atol=0)
    for same in (torch.tensor([0.5, 7.0]), torch.tensor([2.0], dtype=torch.float64)):
        assert data.to_unit(same) is same


def test_digits_are_split_as_scikit_learn_splits_them():
    images = data.load("digits")
    x, y = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(x)), random_state=0)
    assert images.name == "digits" and images.shape == (1, 8, 8)
    assert len(train) == 1347 and len(test) == 450 and not set(train) & set(test)
    for part, x_part, y_part in ((train, images.x_train, images.y_train), (test, images.x_test, images.y_test)):
        assert x_part.dtype == torch.float32 and y_part.dtype == torch.int64
        # v / 16 is exact in binary, so that not one bit may differ
        assert (x_part.numpy() * 16 == x[part].reshape(-1, 1, 8, 8)).all()
        assert (y_part.numpy() == y[part]).all()
    assert images.x_train.min() == 0 and images.x_train.max() == 1


@pytest.mark.parametrize("name", ["MNIST", "imagenet", ""])
def test_unknown_images_are_named(name):
    with pytest.raises(ValueError, match=f"one of digits, mnist, fashion_mnist, got '{name}'"):
        data.load(name)


def test_the_folder_is_the_argument_else_the_environment_else_the_repository_else_here(monkeypatch, tmp_path):
    monkeypatch.setenv("GAE_DATA", "/elsewhere")
    assert data.data_root("x") == Path("x")
    assert data.data_root() == Path("/elsewhere")
    monkeypatch.delenv("GAE_DATA")
    module = tmp_path / "place" / "gae_core" / "data.py"
    monkeypatch.setattr(data, "__file__", str(module))
    assert data.data_root() == Path("data")  # as installed: beside the current folder
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "_toc.yml").touch()
    assert data.data_root() == tmp_path / "place" / "data"  # as checked out


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to fetch is recorded and refused."""
    asked = []

    def refuse(url, *args, **kwargs):
        asked.append(url)
        raise AssertionError(f"the network was asked for {url}")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_absent_files_are_not_fetched_and_the_message_says_how_to_get_them(name, folder, tmp_path, no_network):
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, root=tmp_path)
    for part in (f"python -m gae_core data {name}", str(tmp_path / folder / "raw"), "GAE_DATA", "four .gz"):
        assert part in str(error.value)
    assert no_network == []


def idx(array):
    """Bytes of the format in which MNIST is published: two zeros, type 8, dimensions, sizes, values."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Four small archives as they are published, with the check sums that torchvision will look for."""
    rng = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays, resources = {}, []
    for part, n in (("train", 5), ("t10k", 3)):
        arrays[part] = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[part], strict=True):
            file = raw / f"{part}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(idx(array)))
            resources.append((file.name, hashlib.md5(file.read_bytes()).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    return raw, arrays


def test_published_files_are_unpacked_and_read_without_a_network(published, no_network):
    raw, arrays = published
    root = raw.parents[1]
    for _ in range(2):  # the second time they are unpacked already
        images = data.load("mnist", root=root)
        assert images.name == "mnist" and images.shape == (1, 28, 28)
        assert images.x_train.dtype == torch.uint8 and images.y_train.dtype == torch.int64
        for part, x, y in (("train", images.x_train, images.y_train), ("t10k", images.x_test, images.y_test)):
            assert (x[:, 0].numpy() == arrays[part][0]).all() and (y.numpy() == arrays[part][1]).all()
        for archive in raw.glob("*.gz"):
            archive.unlink()
    assert no_network == []


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_incomplete_files_are_not_completed_from_the_network(damage, published, no_network):
    raw, _ = published
    file = raw / "t10k-labels-idx1-ubyte.gz"
    file.unlink() if damage == "missing" else file.write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match=r"four \.gz"):
        data.load("mnist", root=raw.parents[1])
    assert no_network == []
    with pytest.raises(AssertionError, match="the network was asked"):
        data.load("mnist", root=raw.parents[1], download=True)  # asked for: then it is tried


@pytest.fixture
def offline(monkeypatch):
    """A mirror that answers nothing: the port is closed."""
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


def test_a_fetch_that_fails_says_why_and_does_not_advise_itself(tmp_path, offline):
    with pytest.raises(
        FileNotFoundError, match=r"could not be fetched .*Connection refused.* four \.gz files"
    ) as error:
        data.load("mnist", root=tmp_path, download=True)
    assert "python -m gae_core" not in str(error.value)


@pytest.mark.parametrize("download", [True, False])
def test_a_damaged_archive_is_named(download, published, offline):
    raw, _ = published
    file = raw / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(FileNotFoundError, match=r"\(damaged: t10k-labels-idx1-ubyte\.gz\)"):
        data.load("mnist", root=raw.parents[1], download=download)


@pytest.mark.parametrize("length", [0, 5, 700])
@pytest.mark.parametrize("download", [True, False])
def test_a_damaged_file_is_unpacked_again_where_the_archives_are_whole(length, download, published, no_network):
    raw, arrays = published
    data.load("mnist", root=raw.parents[1])
    file = raw / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:length])
    images = data.load("mnist", root=raw.parents[1], download=download)
    assert (images.x_train[:, 0].numpy() == arrays["train"][0]).all() and no_network == []


def test_a_damaged_file_without_its_archive_is_named_and_kept(published, no_network):
    raw, _ = published
    data.load("mnist", root=raw.parents[1])
    for archive in raw.glob("*.gz"):
        archive.unlink()
    file = raw / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match=r"\(damaged: train-images-idx3-ubyte\): run `python -m"):
        data.load("mnist", root=raw.parents[1])
    assert file.exists() and no_network == []


def test_example_images_are_the_digits_where_there_is_no_mnist_and_say_so(tmp_path, no_network, capsys):
    images = data.example_images(root=tmp_path)
    assert images.name == "digits" and no_network == []
    assert capsys.readouterr().out == "data: digits, 1,347 training images of 8×8\n"


def test_example_images_are_mnist_where_it_is(published, capsys):
    assert data.example_images(root=published[0].parents[1]).name == "mnist"
    assert capsys.readouterr().out == "data: mnist, 5 training images of 28×28\n"


def test_mnist_is_what_was_published():
    try:
        images = data.load("mnist")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert images.x_train.shape == (60_000, 1, 28, 28) and images.x_test.shape == (10_000, 1, 28, 28)
    # Counts of the classes 0 to 9 in the published labels.
    assert images.y_train.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert images.y_test.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def grid(limit, step):
    axis = torch.arange(-limit, limit + step / 2, step, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


@pytest.fixture(scope="module")
def on_a_grid():
    """Log-densities on a grid of 0.6 of their noise: there the sum over a Gaussian squared is exact to 1e-11."""
    values = {}
    for name in TOYS:
        toy = data.toy(name)
        step, limit = 0.6 * toy.std, 4.5 if name == "twenty_five_gaussians" else 3.8
        x = grid(limit, step)
        values[name] = torch.cat([toy.log_prob(part) for part in x.split(10_000)]), step**2
    return values


@pytest.mark.parametrize("name", TOYS)
def test_density_integrates_to_one(name, on_a_grid):
    log_prob, area = on_a_grid[name]
    assert float(log_prob.exp().sum()) * area == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", TOYS)
def test_samples_follow_the_density(name, on_a_grid):
    """Means over samples of log p, of p, and of the coordinates' squares, against sums over the grid."""
    toy = data.toy(name)
    log_prob, area = on_a_grid[name]
    x = toy.sample(10_000, generator=generator(1))
    values = torch.cat([toy.log_prob(part) for part in x.double().split(5000)])
    assert_z(values.numpy(), float((log_prob.exp() * log_prob).sum() * area))
    assert_z(values.exp().numpy(), float((2 * log_prob).exp().sum() * area))
    points = grid(4.5 if name == "twenty_five_gaussians" else 3.8, 0.6 * toy.std)
    for i, j in ((0, 0), (0, 1), (1, 1)):
        product = float((log_prob.exp() * points[:, i] * points[:, j]).sum() * area)
        assert_z((x[:, i] * x[:, j]).double().numpy(), product)


@pytest.mark.parametrize("name", TOYS)
def test_samples_repeat_with_their_generator_and_leave_the_global_one(name):
    toy, before = data.toy(name), torch.random.get_rng_state()
    x = toy.sample(50, generator=generator())
    assert toy.name == name and x.shape == (50, 2) and x.dtype == torch.float32
    assert torch.equal(x, toy.sample(50, generator=generator()))
    assert not torch.equal(x, toy.sample(50, generator=generator(1)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert toy.sample(3).shape == (3, 2)


@pytest.mark.parametrize("name", TOYS)
def test_log_prob_is_finite_far_away_keeps_the_type_and_has_a_gradient(name):
    toy = data.toy(name)
    far = torch.tensor([[0.0, 0.0], [50.0, -80.0], [1e3, 1e3]])
    assert toy.log_prob(far).dtype == torch.float32 and torch.isfinite(toy.log_prob(far)).all()
    torch.testing.assert_close(toy.log_prob(far).double(), toy.log_prob(far.double()), rtol=1e-5, atol=1e-3)
    x = toy.sample(5, generator=generator()).double().requires_grad_()
    assert torch.autograd.gradcheck(toy.log_prob, (x,), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize(("name", "count"), [("eight_gaussians", 8), ("twenty_five_gaussians", 25)])
def test_gaussians_are_where_they_are_said_to_be(name, count):
    toy = data.toy(name)
    if count == 8:
        expected = [[2 * math.cos(k * math.pi / 4), 2 * math.sin(k * math.pi / 4)] for k in range(8)]
    else:
        expected = [[2 * i, 2 * j] for i in range(-2, 3) for j in range(-2, 3)]
    torch.testing.assert_close(toy.modes, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)
    nearest = torch.cdist(toy.sample(20_000, generator=generator()), toy.modes).min(1)
    # No mode is lost, and the squared distance over std^2 is chi-squared with 2 degrees of freedom.
    assert torch.bincount(nearest.indices, minlength=count).min() > 0.8 * 20_000 / count
    assert_z((nearest.values.double() / toy.std).square().numpy(), 2.0)
    x = toy.sample(20, generator=generator(1)).double()
    density = sum(multivariate_normal(m, toy.std**2).pdf(x.numpy()) for m in toy.modes.numpy()) / count
    np.testing.assert_allclose(toy.log_prob(x).numpy(), np.log(density), rtol=0, atol=1e-6)  # modes are float32


def spiral(t):
    return t * mpmath.cos(t) / 5, t * mpmath.sin(t) / 5


# Beyond both ends, beside them, on the curve, between its turns, at the origin.
ROLL = [(0.0, -0.94), (-0.3, -0.95), (0.1, 2.83), (0.2, 2.85), (1.0, 1.0), (1.2566, 0.0), (-1.9, 0.05), (0.0, 0.0)]


@pytest.mark.parametrize("point", ROLL)
def test_swiss_roll_is_the_integral_along_the_curve(point):
    low, high, var = 1.5 * mpmath.pi, 4.5 * mpmath.pi, mpmath.mpf("0.01")

    def integrand(t):
        a, b = spiral(t)
        squared = (point[0] - a) ** 2 + (point[1] - b) ** 2
        return mpmath.exp(-squared / (2 * var)) / (2 * mpmath.pi * var) / (high - low)

    with mpmath.workdps(20):
        pieces = mpmath.linspace(low, high, 120)
        expected = mpmath.log(mpmath.quad(integrand, pieces, maxdegree=4))
    log_prob = data.toy("swiss_roll").log_prob(torch.tensor([point], dtype=torch.float64))
    assert float(log_prob) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("radius", [0.0, 0.05, 1.0, 1.5, 2.93, 3.4])
def test_rings_are_the_integral_over_the_angle(radius):
    def ring(r):
        value, _ = integrate.quad(
            lambda a: math.exp(-((radius - r) ** 2 + 4 * radius * r * math.sin(a / 2) ** 2) / 0.02),
            -math.pi,
            math.pi,
            points=[0.0, -0.1, 0.1],
            epsabs=0,
            epsrel=1e-12,
        )
        return value / (2 * math.pi) / (2 * math.pi * 0.01)

    expected = math.log(sum(ring(r) for r in (1, 2, 3)) / 3)
    by_bessel = sum(math.exp(-((radius - r) ** 2) / 0.02) * ive(0, radius * r / 0.01) for r in (1, 2, 3))
    assert math.log(by_bessel / 3 / (2 * math.pi * 0.01)) == pytest.approx(expected, abs=1e-10)
    for angle in (0.0, 1.0, 4.0):  # the density does not depend on it
        x = torch.tensor([[radius * math.cos(angle), radius * math.sin(angle)]], dtype=torch.float64)
        assert float(data.toy("rings").log_prob(x)) == pytest.approx(expected, abs=1e-10)


def test_curves_have_no_modes():
    assert data.toy("swiss_roll").modes is None and data.toy("rings").modes is None


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("shape", [(5, 3), (5, 1), (2,), (5, 2, 2)])
def test_points_that_are_not_in_the_plane_are_named(name, shape):
    with pytest.raises(ValueError, match=r"x must be floats of shape \(n, 2\), got torch.float32"):
        data.toy(name).log_prob(torch.zeros(shape))


@pytest.mark.parametrize("options", [dict(digits=0), dict(train=0), dict(test=-1)])
def test_stacks_of_nothing_are_named(options):
    with pytest.raises(ValueError, match="digits, train and test must be at least 1, got"):
        data.stack(data.load("digits"), **{"train": 5, "test": 5, **options})


@pytest.mark.parametrize("word", ["Short", "tiny", "medium", "FULL", " short"])
def test_a_size_that_is_mistyped_is_named(word, monkeypatch):
    monkeypatch.setenv("GAE_SIZE", word)
    with pytest.raises(ValueError, match=f"GAE_SIZE must be short or full, or not set, got '{word}'"):
        data.size_from_environment("short")


def test_the_size_is_the_environments_else_the_default(monkeypatch):
    for given, expected in (("short", "short"), ("full", "full"), ("", "full"), (None, "full")):
        monkeypatch.delenv("GAE_SIZE", raising=False) if given is None else monkeypatch.setenv("GAE_SIZE", given)
        assert data.size_from_environment("full") == expected


def test_unknown_toys_are_named():
    with pytest.raises(ValueError, match=r"one of eight_gaussians, .*rings, got 'moons'"):
        data.toy("moons")


@pytest.mark.parametrize("name", TOYS)
def test_a_scaled_toy_is_the_toy_in_other_units(name):
    toy, small = data.toy(name), data.toy(name).scaled(0.25)
    assert small.name == name and small.std == 0.25 * toy.std
    torch.testing.assert_close(small.sample(9, generator()), 0.25 * toy.sample(9, generator()))
    x = toy.sample(9, generator()).double()
    torch.testing.assert_close(small.log_prob(0.25 * x), toy.log_prob(x) + math.log(16))  # a sixteenth of the area
    assert (small.modes is None) == (toy.modes is None)
    if toy.modes is not None:
        torch.testing.assert_close(small.modes, 0.25 * toy.modes)
    with pytest.raises(ValueError, match="x must be floats of shape"):
        small.log_prob(torch.zeros(3))
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="factor must be a positive number, got"):
            toy.scaled(factor)
