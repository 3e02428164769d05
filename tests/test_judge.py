"""The classifier that judges samples, kept by what it was trained on; and the helper of the tests that judges seeds."""

import json

import pytest
import torch

from gae_core import data, train
from gae_core.studies import judge


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Nothing is kept in the real data folder, and training is a single pass; returns how often it was done."""
    monkeypatch.setenv("GAE_DATA", str(tmp_path))
    fit, done = train.fit, []

    def once(*args, **options):
        done.append(len(args[1]))
        return fit(*args, **{**options, "epochs": 1})

    monkeypatch.setattr(train, "fit", once)
    return done


def part(images, rows, **changes):
    """A part of the training images under the name of the whole."""
    fields = {"x_train": images.x_train[rows], "y_train": images.y_train[rows]} | changes
    return data.Images(images.name, **{"x_test": images.x_test, "y_test": images.y_test} | fields)


def test_a_classifier_of_a_part_is_not_that_of_the_whole(quick):
    whole = data.load("digits")
    for images in (part(whole, slice(400)), whole, part(whole, slice(1, 401))):
        found = judge.classifier(images)
        assert judge.about(images)["images"] == len(images.x_train)
        again = judge.classifier(images)  # kept
        assert all(
            torch.equal(a, b) for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True)
        )
    assert quick == [400, len(whole.x_train), 400]
    wrong = part(whole, slice(None), y_train=whole.y_train.flip(0))  # the same images, other labels
    assert not judge.about(wrong) and judge.about(whole)
    assert not judge.about(whole, seed=1)


def test_more_passes_make_another_classifier(quick, monkeypatch):
    images = part(data.load("digits"), slice(200))
    judge.classifier(images)
    epochs = judge._epochs(images)
    assert judge.about(images)["epochs"] == epochs == 250
    monkeypatch.setattr(judge, "_epochs", lambda images: epochs + 1)
    assert not judge.about(images)


@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no more", None])
def test_a_damaged_file_is_named(quick, tmp_path, suffix, damage):
    images = part(data.load("digits"), slice(200))
    judge.classifier(images)
    (path,) = tmp_path.glob(f"classifier-digits-0-*{suffix}")
    if damage is None and suffix == ".pt":  # whole, and of another network
        torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, path)
    else:
        path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(ValueError, match=path.name):
        judge.classifier(images)
    path.unlink()
    judge.classifier(images)  # trained again
    assert len(quick) == 2 and json.loads(path.with_suffix(".json").read_text())["images"] == 200
    assert {file.suffix for file in tmp_path.iterdir()} == {".pt", ".json"}  # nothing half-written stays
