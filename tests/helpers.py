"""Helpers of the tests."""

import math

import numpy as np
from scipy import stats


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


def less(a, b, level: float = 0.05) -> bool:
    """Whether a is below b by more than its seeds explain: the paired t test of the difference, seed by seed.

    Runs of one seed share what the seed decides (the order of the data, the noise), so that the difference is taken
    within seeds, and its mean compared with Student's quantile at the number of seeds less one. This is what the
    book's chapters mean by "clearly".

    Args:
        a: values by seed, at least 3; or one value, of something in which nothing is random, which counts as exact.
        b: the same for the other, in the same order of seeds.
        level: probability of a difference that large, either way, if there is none.

    Raises:
        ValueError: if there are fewer than 3 pairs, or they cannot be paired, or a value is not finite.
    """
    a, b = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (a, b))
    if a.ndim != 1 or b.ndim != 1 or (len(a) != len(b) and 1 not in (len(a), len(b))) or max(len(a), len(b)) < 3:
        raise ValueError(f"a and b must have a value for each of 3 seeds or more, got {a.shape} and {b.shape}")
    difference = b - a
    if not np.isfinite(difference).all():
        raise ValueError("a and b must be finite")
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return bool(difference.mean() > stats.t.ppf(1 - level / 2, len(difference) - 1) * error)
