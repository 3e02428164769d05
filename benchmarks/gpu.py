"""Everything that wants a GPU, in parts: the tests, a recorded run of each model and study, the benchmark.

``python benchmarks/gpu.py --out FOLDER`` runs all parts and leaves ``gpu.tar.gz`` in the folder; ``--part 2`` runs the
second alone and leaves ``gpu-2.tar.gz``. It needs torch, torchvision, SciPy, scikit-learn, matplotlib and tqdm, no
Jupyter; the tests also need pytest and what their files import. Data come from ``$GAE_DATA``, which git may ignore. A
part that was killed goes on from what it left in the folder. ``--take FOLDER`` puts archives into the book.
"""

import argparse
import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gae_core import records  # noqa: E402
from gae_core.studies import registry  # noqa: E402

LIMIT = 16 * 10**6  # bytes of an archive


def call(*arguments: str) -> None:
    """Run Python on something, from the root of the repository; raises if it fails."""
    command = [sys.executable, *arguments]
    print("$", *command, flush=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "agg"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)


def needs(path: Path) -> set[str]:
    """What a file imports, by itself or by the files of tests/ and book/_ext that it imports."""
    ours = {p.stem: p for folder in ("tests", "book/_ext") for p in (ROOT / folder).glob("*.py")}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    top = {name.split(".")[0] for name in names}
    return set().union(top - ours.keys(), *(needs(ours[name]) for name in top & ours.keys()))


def tests_that_can_run() -> list[str]:
    """The files of tests/ whose imports are installed; says which are left out, and why."""
    found = []
    for path in [ROOT / "tests" / "conftest.py", *sorted((ROOT / "tests").glob("test_*.py"))]:
        missing = sorted(name for name in needs(path) | {"pytest"} if importlib.util.find_spec(name) is None)
        if missing:
            print(f"{path.name} is left out: {', '.join(missing)} not installed here")
            if path.name == "conftest.py":
                return []
        elif path.name != "conftest.py":
            found.append(str(path))
    return found


def parts(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Name of each part -> the commands of Python in it."""
    how = ["--size", options.size, "--seeds", options.seeds, "--device", options.device]
    how += ["--data", options.data] if options.data else []
    out = ["--out", str(options.out / "results")]
    names = [name for name, study in registry.STUDIES.items() if options.data in (None, *study.data)]
    runs = {f"run {name}": [["-m", "gae_core", "run", name, *how, *out]] for name in names}
    text = str(options.out / "training.md")
    benchmark = ["benchmarks/training.py", "--device", options.device, "--out", text]
    files = tests_that_can_run() if options.part in (None, 1) else []
    tests = [["-m", "pytest", "-q", "-m", "not pages", *files]] if files else []
    return {"tests": tests, **runs, "benchmark": [benchmark]}


def pack(out: Path, name: str) -> Path:
    """Put what the parts left into one archive.

    Raises:
        ValueError: if it is too large.
    """
    path = out / name
    with tarfile.open(path, "w:gz") as archive:
        for entry in ("results", "training.md"):
            if (out / entry).exists():
                archive.add(out / entry, entry)
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {LIMIT:,}")
    return path


def take(source: Path, results: Path = records.RESULTS) -> list[Path]:
    """Put the records of archives into the book. A CPU's record never replaces a GPU's: it is left out, and said.

    Args:
        source: an archive, or a folder of them.
        results: folder of the book's records.

    Returns:
        The records that were put there.

    Raises:
        ValueError: if there is no archive, or a record in one is not whole.
    """
    archives = sorted(source.rglob("gpu*.tar.gz")) if source.is_dir() else [source]
    if not archives or not archives[0].exists():
        raise ValueError(f"there is no gpu*.tar.gz in {source}: `make gpu OUT={source}` leaves one")
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for number, archive in enumerate(archives):
            inside = Path(folder) / str(number)
            with tarfile.open(archive) as file:
                file.extractall(inside, filter="data")
            for path in sorted(inside.glob("results/*/*.json")):
                if path.name.endswith(".part.json"):
                    continue
                record, target = records.check(path), results / path.parent.name / path.name
                try:
                    records.may_replace(target, record["device"])
                except FileExistsError as error:
                    print(f"left out: {error}")
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                for suffix in (".json", ".png"):
                    if path.with_suffix(suffix).exists():
                        shutil.copy(path.with_suffix(suffix), target.with_suffix(suffix))
                taken.append(target)
            if (inside / "training.md").exists():
                import training

                training.place((inside / "training.md").read_text(encoding="utf-8"))
    return taken


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that were asked for, or take archives; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "gpu")
    parser.add_argument("--part", type=int)
    parser.add_argument("--take", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", help="only what can run on it; by default everything, each on its own")
    parser.add_argument("--size", default="full")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    try:
        if options.take:
            print(*take(options.take), sep="\n")
            return 0
        if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device here; --device cpu tries the parts without one")
        todo = list(parts(options).items())
        if options.part is not None and not 1 <= options.part <= len(todo):
            raise ValueError(f"part must be 1 to {len(todo)}: {', '.join(name for name, _ in todo)}")
        records.writable(options.out)
        for number, (name, commands) in enumerate(todo, 1):
            if options.part in (None, number):
                start = time.perf_counter()
                for command in commands:
                    call(*command)
                print(f"part {number}, {name}: {time.perf_counter() - start:.0f} s", flush=True)
        print(pack(options.out, "gpu.tar.gz" if options.part is None else f"gpu-{options.part}.tar.gz"))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
