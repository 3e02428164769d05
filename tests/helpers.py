"""Helpers of the tests."""

import math

import numpy as np

from gae_core import seeds


def assert_z(values, expected: float, bound: float = 4.0) -> None:
    """Assert that the mean of independent replicates agrees with its expected value.

    The mean is compared in units of its standard error, z = (mean - expected) / (s / sqrt(n)). A correct value
    exceeds the default bound once in about 16,000 runs with many replicates; the seeds of the tests are fixed.

    Args:
        values: independent replicates, at least 8, one dimension.
        expected: the value that their mean should have.
        bound: largest |z| that passes.

    Raises:
        ValueError: if there are fewer than 8 values, or they are not finite, or all alike: then there is no
            standard error to compare with.
        AssertionError: if |z| exceeds the bound.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 8:
        raise ValueError(f"values must be at least 8 independent replicates, got shape {values.shape}")
    if not np.isfinite(values).all() or not math.isfinite(expected):
        raise ValueError("values and expected must be finite")
    error = values.std(ddof=1) / math.sqrt(len(values))
    if error == 0:
        raise ValueError(f"all values are {values[0]}: compare them exactly, there is no noise to allow for")
    z = (values.mean() - float(expected)) / error
    message = f"mean {values.mean():.6g} ± {error:.2g} against {float(expected):.6g}: z = {z:.2f}"
    assert abs(z) <= bound, message + f", beyond {bound}"


def numbers_of(outcome) -> tuple:
    """What an outcome of a study measured, its curves, and the history of its training: what repeats, if all does."""
    history = {name: values.tolist() for name, values in outcome.training.history.items()}
    return dict(outcome.metrics), dict(outcome.curves), history


def begun_states(monkeypatch, study) -> list[int]:
    """A list that will have the seed of each state of randomness that is begun from now on, in the order of its use."""
    begun, seed_of = [], seeds.seed_of

    def watched(seed, name, *index):
        begun.append(seed_of(seed, name, *index))
        return begun[-1]

    monkeypatch.setattr(seeds, "seed_of", watched)
    if hasattr(study, "seed_of"):
        monkeypatch.setattr(study, "seed_of", watched)
    return begun


ANOTHER_TRAINING = {  # fields of any recipe with a training, and other values than its own
    "epochs": 3,
    "batch_size": 7,
    "lr": 1e-3,
    "schedule": "constant",
    "optimizer": "sgd",
    "betas": (0.5, 0.9),
    "clip": 0.01,
}
