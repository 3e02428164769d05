"""Recorded runs: a study is trained and measured for each seed, and the record says how to do it again."""

import datetime
import hashlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gae_core import judge, records, train
from gae_core.records import RESULTS, Study


def record(
    name: str,
    study: Study,
    *,
    topic: str,
    data: str | None = None,
    seeds: Sequence[int] = (0,),
    size: str = "full",
    device: str = "auto",
    out: Path = RESULTS,
) -> Path:
    """Run a study for each seed and record everything that is needed to do it again.

    The record's name has the size, so that a short run never overwrites a full one. Finished seeds are kept in
    ``<data>-<size>.part.json`` until all are there: a run that was killed goes on with the next seed. A record made
    by the same code on the same device, with these seeds, is left as it is.

    Args:
        name: folder of the record.
        study: what is run.
        topic: runs of one topic stand in one table of the Results page.
        data: data set, by default the study's first.
        seeds: one training each, of weights, order and samples. On the CPU the same seed gives the same metrics.
        size: "short", "medium" or "full".
        device: see :func:`gae_core.train.pick_device`.
        out: folder of the records.

    Returns:
        The record, ``<out>/<name>/<data>-<size>.json``; the figure of the first seed lies beside it.

    Raises:
        ValueError: for data that the study cannot run on, or seeds that are none or not different.
        FileExistsError: if a CPU run would overwrite the record of a GPU.
        OSError: if the folder cannot be written; found before anything is trained.
    """
    data = study.data[0] if data is None else data
    if data not in study.data:
        raise ValueError(f"data of {name} must be one of {', '.join(study.data)}, got {data!r}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one, got {list(seeds)}")
    chosen = train.pick_device(device)
    same = {  # what runs must agree in to stand in one record
        "model": name,
        "topic": topic,
        "data": data,
        "size": size,
        **study.settings(data, size),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "code": code(),
    }
    path = out / name / f"{data}-{size}.json"
    part = path.with_suffix(".part.json")
    old, begun = records.read(path), records.read(part)
    records.may_replace(path, same["device"])
    if same.items() <= old.items() and set(seeds) <= set(old["seeds"]):
        return path
    records.writable(path.parent)
    runs = begun["runs"] if same.items() <= begun.items() else {}
    for seed in seeds:
        if str(seed) not in runs:
            runs[str(seed)] = _seed(study, same, seed, chosen, part.with_suffix(".png") if seed == seeds[0] else None)
            records.write(part, {**same, "runs": runs})

    found = [runs[str(seed)] for seed in seeds]
    total = {key: [run[key] for run in found] for key in found[0]}
    records.write(
        path,
        {
            **same,
            "command": f"python -m gae_core run {name} --data {data} --size {size} --seeds {','.join(map(str, seeds))}",
            "seeds": list(seeds),
            "commit": _commit(),
            "date": datetime.date.today().isoformat(),
            "parameters": total["parameters"][0],
            "training seconds": sum(total["training seconds"]),
            "wall seconds": sum(total["wall seconds"]),
            "samples a second": sum(total["samples"]) / sum(total["training seconds"]),
            "peak memory, MiB": max(total["peak memory, MiB"]),
            "peak memory of": "tensors on the device" if chosen.type == "cuda" else "the process since its start",
            "classifier": judge.about(study.judged(data)) if study.judged else {},
            "metrics": {  # that all seeds have: a spread of no samples is none
                key: records.summary([run["metrics"][key] for run in found])
                for key in found[0]["metrics"]
                if all(key in run["metrics"] for run in found)
            },
            "curves": {key: [run["curves"][key] for run in found] for key in found[0]["curves"]},
        },
    )
    if part.with_suffix(".png").exists():
        part.with_suffix(".png").replace(path.with_suffix(".png"))
    part.unlink()
    return path


def _seed(study: Study, same: dict, seed: int, device: torch.device, picture: Path | None) -> dict:
    """Run one seed; its figure goes into the file ``picture``, if there are both."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    outcome = study.run(same["data"], same["size"], seed, device)
    seconds = time.perf_counter() - start
    if outcome.figure is not None:
        from matplotlib import pyplot

        if picture is not None:
            outcome.figure.savefig(picture, dpi=100)
        pyplot.close(outcome.figure)
    return {
        "training seconds": outcome.training_seconds,
        "wall seconds": seconds,
        "samples": outcome.samples,
        "parameters": outcome.parameters,
        "peak memory, MiB": _peak_memory(device),
        "metrics": dict(outcome.metrics),
        "curves": {name: list(values) for name, values in outcome.curves.items()},
    }


def _peak_memory(device: torch.device) -> float:
    """MiB: of torch's tensors on a CUDA device since the last reset, else of the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def code() -> str:
    """Digest of the package's sources: equal for runs of the same code, whether committed or not."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.rglob("*.py")))).hexdigest()[:12]


def _commit() -> str | None:
    """The checked-out commit, with a plus sign if tracked files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")
