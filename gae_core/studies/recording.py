"""Recorded runs: a study is trained and measured for each seed, and the record says how to do it again."""

import ast
import contextlib
import datetime
import functools
import hashlib
import inspect
import json
import math
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gae_core import records, train
from gae_core.records import RESULTS
from gae_core.studies.study import Recipe, Study


def record(
    name: str,
    study: Study,
    *,
    data: str | None = None,
    seeds: Sequence[int] = (0,),
    size: str = "full",
    device: str = "auto",
    out: Path = RESULTS,
    replace: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Run a study for each seed and record everything that is needed to do it again.

    The record's name has the size, so that a short run never overwrites a full one. Finished seeds are kept in
    ``<data>-<size>.part.json`` until all are there: a run that was killed goes on with the next seed.

    Seeds that are recorded stay. Where the record was made by the same code, with the same settings, on the same
    device, only the seeds that it lacks are run, and join it. Where it was not, its seeds and new ones cannot stand in
    one record: if all of its seeds are asked for, they are run again, and the record is replaced when they are done;
    if not, nothing is run, since seeds would be lost.

    Args:
        name: folder of the record.
        study: what is run.
        data: data set, by default the study's first.
        seeds: one training each, of weights, order and samples. On the CPU the same seed gives the same metrics.
        size: "short", "medium" or "full".
        device: see :func:`gae_core.train.pick_device`.
        out: folder of the records.
        replace: whether a record that was made otherwise is replaced even if it has seeds that are not asked for.
        say: is told in a line what is done with each seed.

    Returns:
        The record, ``<out>/<name>/<data>-<size>.json``; the figure of its first seed lies beside it.

    Raises:
        ValueError: for data that the study cannot run on, or seeds that are none or not different.
        FileExistsError: if seeds would be lost, or a CPU run would overwrite the record of a GPU.
        OSError: if the folder cannot be written, found before anything is trained; or a file of it later.
    """
    data = study.data[0] if data is None else data
    if data not in study.data:
        raise ValueError(f"data of {name} must be one of {', '.join(study.data)}, got {data!r}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one, got {list(seeds)}")
    chosen, recipe = train.pick_device(device), study.recipe(data, size)
    same = {  # what runs must agree in to stand in one record
        **made_as(name, study, data, size),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
    }
    path = out / name / f"{data}-{size}.json"
    part, title = path.with_suffix(".part.json"), f"{name}, {data}, {size}"
    tell = say or (lambda line: None)
    old = records.read(path)
    records.may_replace(path, same["device"])
    recorded = _runs(old, same)
    if old and not recorded:
        other = [key for key, value in same.items() if old.get(key) != value]
        what = f"{path} has seeds {_listed(old.get('seeds', []))}, made with another {', '.join(other)}"
        lost = [seed for seed in old.get("seeds", []) if seed not in seeds]
        if lost and not replace:
            raise FileExistsError(
                f"{what}: seeds {_listed(seeds)} cannot join it, and would replace it without {_listed(lost)}. "
                f"Ask for all of them (--seeds {_listed(dict.fromkeys([*old['seeds'], *seeds]), ',')}), for another "
                "folder (--out), or for the loss (--replace)"
            )
        tell(f"{title}: {what}; it stays until these are done")
    missing = [seed for seed in seeds if str(seed) not in recorded]
    if recorded:
        tell(f"{title}: recorded already are seeds {_listed(old['seeds'])}, to run {_listed(missing) or 'none'}")
    if not missing:
        return path
    records.writable(path.parent)
    runs = {}
    for seed in missing:
        runs = _runs(records.read(part), same) | runs
        if str(seed) in runs:
            tell(f"{title}, seed {seed}: kept from a run that was stopped")
            continue
        runs[str(seed)], figure = _seed(study, recipe, same, seed, chosen)
        with records.locked(path.parent):  # another process may be at other seeds
            runs = _runs(records.read(part), same) | runs
            records.write(part, {**same, "runs": runs})
        if seed == seeds[0] and figure is not None and not recorded:  # after the numbers, which are whole without it
            _save(figure, part.with_suffix(".png"))
        _close(figure)
        tell(f"{title}, seed {seed}: trained and measured in {runs[str(seed)]['wall seconds']:.0f} s")

    with records.locked(path.parent):
        joined = _runs(records.read(path), same) | {str(seed): runs[str(seed)] for seed in missing}
        _write(path, same, joined, chosen)
        with contextlib.suppress(FileNotFoundError):  # there is none, or another process was first
            part.with_suffix(".png").replace(path.with_suffix(".png"))
        if left := {seed: run for seed, run in _runs(records.read(part), same).items() if seed not in joined}:
            records.write(part, {**same, "runs": left})  # of a run that was stopped, or that is still at it
        else:
            part.unlink(missing_ok=True)
    return path


def made_as(name: str, study: Study, data: str, size: str) -> dict[str, Any]:
    """What a record of a study says of how it was made, but for the machine: its settings and its code."""
    about = {"model": name, "topic": study.topic, "data": data, "size": size, "code": code(study)}
    settings = study.recipe(data, size).settings()
    if taken := settings.keys() & {*about, *records.KEYS} - {"epochs"}:
        raise ValueError(
            f"a recipe must not have fields that a record has itself, {name} has {', '.join(sorted(taken))}"
        )
    return about | settings


def _write(path: Path, same: dict, runs: dict[str, dict], device: torch.device) -> None:
    """Write the record of some seeds."""
    found = list(runs.values())
    total = {key: [run[key] for run in found] for key in found[0]}
    if len({json.dumps(judge, sort_keys=True) for judge in total["classifier"]}) > 1:
        raise ValueError(f"{path}: seeds must be measured by one classifier, got {total['classifier']}")
    seconds = sum(total["training seconds"])
    command = f"python -m gae_core run {same['model']} --data {same['data']} --size {same['size']}"
    records.write(
        path,
        {
            **same,
            "command": f"{command} --seeds {_listed(runs, ',')}",
            "seeds": list(map(int, runs)),
            "commit": _commit(),
            "date": datetime.date.today().isoformat(),
            "parameters": total["parameters"][0],
            "training seconds": seconds,
            "wall seconds": sum(total["wall seconds"]),
            "samples a second": sum(total["samples"]) / seconds if seconds else 0.0,  # where nothing is trained
            "peak memory, MiB": max(total["peak memory, MiB"]),
            "peak memory of": "tensors on the device" if device.type == "cuda" else "the process since its start",
            "classifier": found[-1]["classifier"],
            "metrics": {  # that all seeds have: a spread of no samples is none
                key: records.summary([run["metrics"][key] for run in found])
                for key in found[0]["metrics"]
                if all(key in run["metrics"] for run in found)
            },
            "curves": {
                key: [run["curves"][key] for run in found]
                for key in found[0]["curves"]
                if all(key in run["curves"] for run in found)
            },
        },
    )


def _runs(record: dict, same: dict) -> dict[str, dict]:
    """Seed -> run, of a record or the part of one; none if it was made otherwise than ``same`` says.

    A whole record has the times of all seeds together: each gets its share, so that they add up to them again.
    """
    if not same.items() <= record.items():
        return {}
    if "runs" in record:
        return record["runs"]
    n, seconds = len(record["seeds"]), record["training seconds"]
    return {
        str(seed): {
            "training seconds": seconds / n,
            "wall seconds": record["wall seconds"] / n,
            "samples": record["samples a second"] * seconds / n,
            "parameters": record["parameters"],
            "peak memory, MiB": record["peak memory, MiB"],
            "classifier": record["classifier"],
            "metrics": {key: metric["by seed"][i] for key, metric in record["metrics"].items()},
            "curves": {key: values[i] for key, values in record["curves"].items()},
        }
        for i, seed in enumerate(record["seeds"])
    }


def _listed(seeds: Iterable, comma: str = ", ") -> str:
    return comma.join(map(str, seeds))


def _save(figure: Any, path: Path) -> None:
    """Write a figure; the numbers are written before."""
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {error.strerror}. The numbers are kept, and the same command goes on from there, "
            "without this picture"
        ) from error


def _close(figure: Any) -> None:
    if figure is not None:
        from matplotlib import pyplot

        pyplot.close(figure)


def _seed(study: Study, recipe: Recipe, same: dict, seed: int, device: torch.device) -> tuple[dict, Any]:
    """What is kept of one seed, and its figure."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    outcome = study.run(recipe, same["data"], seed, device)
    seconds = time.perf_counter() - start
    numbers = {**outcome.metrics, **{name: sum(values) for name, values in outcome.curves.items()}}
    if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise ValueError(f"metrics and curves must be finite, seed {seed} of {same['model']} gave {', '.join(wrong)}")
    kept = {
        "training seconds": outcome.training.seconds,
        "wall seconds": seconds,
        "samples": outcome.training.rows,
        "parameters": outcome.training.parameters,
        "peak memory, MiB": _peak_memory(device),
        "metrics": dict(outcome.metrics),
        "curves": {name: list(values) for name, values in outcome.curves.items()},
        "classifier": dict(outcome.classifier),
    }
    return kept, outcome.figure


def _peak_memory(device: torch.device) -> float:
    """MiB: of torch's tensors on a CUDA device since the last reset, else of the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


PARSING = threading.Lock()  # CPython's ast is not for several threads at once


@functools.cache
def _parsed(path: Path, _changed: int) -> tuple[str, list[str]]:
    """A file's code without comments, docstrings and layout, and the dotted names of what it uses."""
    with PARSING:
        tree, names = ast.parse(path.read_text(encoding="utf-8")), []
        for node in ast.walk(tree):
            first = node.body[:1] if isinstance(getattr(node, "body", None), list) else []
            if first and isinstance(first[0], ast.Expr) and isinstance(first[0].value, ast.Constant):
                node.body.pop(0)
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    raise ValueError(f"{path} must import by full names, got a relative import")
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        own = {name.rpartition(".")[2]: name for name in names}
        names += [  # of a folder with a face, what is taken from it
            f"{own[node.value.id]}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own
        ]
        return ast.dump(tree), names


def parsed(path: Path) -> tuple[str, list[str]]:
    """The same, read again when the file has changed."""
    return _parsed(path, path.stat().st_mtime_ns)


def sources(path: Path) -> list[Path]:
    """The files of the package that a file uses, however deep, and itself, in the order of their names.

    Of a folder whose ``__init__`` shows what is in its files, such as ``metrics``, they are those that are used.
    """
    package, found, waiting = Path(__file__).parents[1], set(), [path]
    while waiting:
        found.add(path := waiting.pop())
        for name in parsed(path)[1]:
            if name.startswith(package.name + "."):
                folder, _, last = name.rpartition(".")
                face = package.parent.joinpath(*folder.split("."), "__init__.py")
                shown = {n.rpartition(".")[2]: n.rpartition(".")[0] for n in parsed(face)[1]} if face.exists() else {}
                names = [shown.get(last, name), folder]
                files = [package.parent.joinpath(*n.split(".")).with_suffix(".py") for n in names]
                waiting += [file for file in files if file.exists() and file not in found]
    return sorted(found)


def unwrapped(run: Callable) -> Callable:
    """The function in a partial one."""
    return unwrapped(run.func) if isinstance(run, functools.partial) else run


def code(study: Study) -> str:
    """Digest of the code that a study runs, whether committed or not: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in sources(Path(inspect.getsourcefile(unwrapped(study.run))).resolve()):
        digest.update(f"{path.name} {parsed(path)[0]}".encode())
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """The checked-out commit, with a plus sign if tracked files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")
