"""Files of records: read, written, drawn as tables, so that no number is typed by hand.

What runs and records is ``studies/recording.py``.
"""

import contextlib
import json
import math
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "book" / "results"

KEYS = (
    *("model", "data", "size", "command", "epochs", "seeds", "device", "torch", "date", "commit"),
    *("training seconds", "samples a second", "peak memory, MiB", "metrics"),
)


def read(path: Path) -> dict:
    """The record in a file, empty if there is none.

    Raises:
        ValueError: if the file is none, with its name.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no record: {error}") from error


def write(path: Path, record: dict) -> None:
    """Write a record beside its file and rename it: a crash leaves the old one or the new one.

    Raises:
        OSError: if it cannot be written, with its name.
    """
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")  # two runs at once write two files
    try:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among processes that ask for the same folder, where the system and its disk have such locks."""
    descriptor = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def writable(folder: Path) -> None:
    """Make a folder and make sure that files can be written into it.

    Raises:
        OSError: if not, with the folder in the message.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {error.strerror}") from error


def may_replace(path: Path, device: str) -> None:
    """Make sure that a record made on ``device`` may take the place of the one at ``path``, if there is one.

    Raises:
        FileExistsError: if a run on the CPU would replace one on a GPU.
    """
    if device == "CPU" and read(path).get("device", "CPU") != "CPU":
        raise FileExistsError(f"{path} is the record of a GPU, this would be one of a CPU: move it away first")


def summary(values: Sequence[float]) -> dict:
    """Mean, its standard error (None for a single value), and the values by seed."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard error": error, "by seed": list(values)}


def less(a: Sequence[float], b: Sequence[float], level: float = 0.05) -> bool:
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
    import numpy as np
    from scipy import stats

    a, b = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (a, b))
    if a.ndim != 1 or b.ndim != 1 or (len(a) != len(b) and 1 not in (len(a), len(b))) or max(len(a), len(b)) < 3:
        raise ValueError(f"a and b must have a value for each of 3 seeds or more, got {a.shape} and {b.shape}")
    difference = b - a
    if not np.isfinite(difference).all():
        raise ValueError("a and b must be finite")
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return bool(difference.mean() > stats.t.ppf(1 - level / 2, len(difference) - 1) * error)


def check(path: Path) -> dict:
    """Read a record and make sure that it is whole and says of itself what its place says.

    Raises:
        ValueError: if a key is missing, the place is another's, or a metric does not follow from its values.
    """
    record = read(path)
    if missing := [key for key in KEYS if key not in record]:
        raise ValueError(f"{path} is no record of a run: it lacks {', '.join(missing)}")
    place = f"{record['model']}/{record['data']}-{record['size']}.json"
    if path.parts[-2:] != tuple(place.split("/")):
        raise ValueError(f"{path} is the record of {place}")
    for name, metric in record["metrics"].items():
        told, right = (metric["mean"], metric["standard error"] or 0), summary(metric["by seed"])
        if len(metric["by seed"]) != len(record["seeds"]) or not all(
            math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
            for a, b in zip(told, (right["mean"], right["standard error"] or 0), strict=True)
        ):
            raise ValueError(f"{path}: mean or standard error of {name!r} does not follow from its values by seed")
    return record


def groups(folder: Path = RESULTS, order: Sequence[str] = ()) -> dict[str, list[dict]]:
    """All records in a folder, grouped by what the columns of one table must share.

    Args:
        folder: holds ``<model>/<data>-<size>.json``; records of unfinished runs are left out.
        order: models that come first, in this order.

    Returns:
        Title that says what is shared -> records.
    """
    found: dict[str, list[dict]] = {}
    rank = {name: i for i, name in enumerate(order)}
    paths = [path for path in folder.glob("*/*.json") if not path.name.endswith(".part.json")]
    for path in sorted(paths, key=lambda path: (path.name, rank.get(path.parent.name, len(rank)), path)):
        record = check(path)
        seeds = ", ".join(map(str, record["seeds"]))
        topic = record.get("topic", "image models").replace("_", " ")
        shared = (
            f"{record['data']}, size {record['size']}, {record['device']}, {record['epochs']} epochs, seeds {seeds}"
        )
        title = f"{topic}: {shared}"
        found.setdefault(title, []).append(record)
    return found


def cell(metric: dict | None) -> str:
    """Mean and standard error, rounded to the first two digits of the error (three of the mean where there is none).

    An error below a ten-thousandth of the mean counts as that much: what lies behind is rounding. An error of 0, where
    nothing depends on the seed, is told as "0" beside five digits of the mean, so that it can be compared with means
    that have an error.
    """
    if metric is None:
        return "–"
    mean, error = metric["mean"], metric["standard error"]
    if error == 0:
        text = f"{mean:,.{max(0, 4 - math.floor(math.log10(abs(mean) or 1)))}f}"
        return f"{text.rstrip('0').rstrip('.') if '.' in text else text}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0"
    smallest = max(error, 1e-4 * abs(mean)) if error else abs(mean) / 10
    digits = 0 if smallest == 0 else max(0, 1 - math.floor(math.log10(smallest)))
    text = f"{mean:,.{digits}f}"
    return text if error is None else f"{text}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:.{digits}f}"


def table(records: Sequence[dict], rows: Sequence[str] | None = None, *, transpose: bool = False) -> str:
    """A table in Markdown: a column for each record, a row for each metric (all, if ``rows`` is None).

    Args:
        records: what is compared.
        rows: metrics.
        transpose: a row for each record and a column for each metric.

    Raises:
        ValueError: for a row that no record has.
    """
    known = list(dict.fromkeys(key for record in records for key in record["metrics"]))
    rows = known if rows is None else rows
    if missing := set(rows) - set(known):
        raise ValueError(f"rows must be metrics of the records, got {sorted(missing)}; there are {known}")
    grid = [["", *(record["model"].replace("_", " ") for record in records)]]
    grid += [[row, *(cell(record["metrics"].get(row)) for record in records)] for row in rows]
    grid = [[text.replace("|", "\\|") for text in line] for line in grid]
    head, *body = zip(*grid, strict=True) if transpose else grid
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(records: Sequence[dict]) -> str:
    """How the records of a table were made, in Markdown.

    Raises:
        ValueError: if they differ in device or data.
    """
    first = records[0]
    alike = ("device", "data")
    if any(r[key] != first[key] for r in records for key in alike):
        raise ValueError(f"the records differ in one of {', '.join(alike)}: not one table")
    seconds = sum(r["training seconds"] for r in records)
    took = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    by_command: dict[str, list[str]] = {}
    for r in records:
        by_command.setdefault(r["command"].replace(f" run {r['model']} ", " run NAME "), []).append(r["model"])
    commands = "; ".join(
        f"`{command.replace(' NAME ', f' {names[0]} ')}`"
        if len(names) == 1
        else f"`{command}` with the names " + ", ".join(f"`{name}`" for name in names)
        for command, names in by_command.items()
    )
    judge = first.get("classifier")

    def of(key: str, show: Callable[[Any], str] = str) -> str:
        """The value that all records share, or each value with the records that have it."""
        values: dict[str, list[str]] = {}
        for r in records:
            values.setdefault(show(r[key]), []).append(r["model"].replace("_", " "))
        if len(values) == 1:
            return show(first[key])
        return "; ".join(f"{value} ({', '.join(names)})" for value, names in values.items())

    return (
        f"Device: {first['device']}. Data: {first['data']}. Epochs: {of('epochs')}. "
        f"Seeds: {of('seeds', lambda seeds: ', '.join(map(str, seeds)))}. Training in all: {took}. "
        + (f"The classifier of the features is right on {judge['accuracy']:.2%} of the test images. " if judge else "")
        + f"torch {of('torch')}, {of('date')}. Made by {commands}."
    )
