"""Command line: ``python -m gae_core`` trains and samples models, fetches data, makes recorded runs and shows them."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from gae_core import data, parallel, plots, records, train
from gae_core.seeds import stream
from gae_core.studies import registry
from gae_core.studies.study import SIZES

DATA = {
    "digits": "1,797 images of 8×8, inside scikit-learn",
    "mnist": "70,000 digits of 28×28",
    "fashion_mnist": "70,000 garments of 28×28",
}


def _one_of(kind: str, names: Iterable[str]) -> Callable[[str], str]:
    """The type of an argument that must be one of some names; an unknown one is answered with the nearest."""
    names = list(names)

    def check(text: str) -> str:
        if text not in names:
            near = "".join(f"; do you mean {name}?" for name in difflib.get_close_matches(text, names, 1, 0.5))
            raise argparse.ArgumentTypeError(f"unknown {kind} {text!r}{near} There are: {', '.join(names)}")
        return text

    return check


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"must be different whole numbers like 0,1,2, got {text!r}")
    return seeds


def _device(text: str) -> str:
    try:
        train.pick_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gae_core", description=__doc__.split(": ", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True)
    model, images = _one_of("model", registry.MODELS), _one_of("data set", DATA)

    command = commands.add_parser("list", help="models, studies, data sets and sizes; or how one study is made")
    command.add_argument("name", nargs="?", type=_one_of("study", registry.STUDIES))
    command.add_argument("--data", help="default: the study's own")
    command.add_argument("--size", type=_one_of("size", SIZES), default="medium")
    command.add_argument("--stale", action="store_true", help="list the book's records that today's code did not make")

    command = commands.add_parser("train", help="train one model and keep a checkpoint, on several GPUs by torchrun")
    command.add_argument("name", type=model)
    command.add_argument("--checkpoint", type=Path, help="default NAME.pt")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--data", type=images, default="mnist")

    run = commands.add_parser(
        "run",
        help="train, measure, and write book/results/NAME/DATA-SIZE.json",
        description="Train and measure a model or study for each seed, and record it. What is recorded stays: seeds "
        "that the record has are not run again, others join it. A record made by other code, with other settings or on "
        "another device is made again if --seeds names all of its seeds, and else left as it is, with an error.",
    )
    run.add_argument("name", type=_one_of("study", [*registry.STUDIES, "all"]))
    names = dict.fromkeys([*DATA, *(name for study in registry.STUDIES.values() for name in study.data)])
    run.add_argument("--data", type=_one_of("data set", names), help="default: the study's own")
    run.add_argument("--seeds", type=_seeds, default="0,1,2", help="one training each, default 0,1,2")
    run.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the records, default book/results")
    run.add_argument("--replace", action="store_true", help="lose the seeds of a record that was made otherwise")
    for c in (command, run):
        c.add_argument("--size", type=_one_of("size", SIZES), default="full")
        c.add_argument("--device", type=_device, default="auto")

    command = commands.add_parser("data", help="fetch a data set into $GAE_DATA (default data/) and check it")
    command.add_argument("name", type=images)

    command = commands.add_parser("sample", help="draw samples of a checkpoint into a PNG")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("-n", type=int, default=64)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path, help="default: the checkpoint's name with .png")

    command = commands.add_parser("report", help="the tables of all records, in Markdown")
    command.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the records")
    return parser


def _list(options: argparse.Namespace) -> None:
    if options.stale:
        stale = registry.stale(records.RESULTS)
        print(*(f"{path.parent.name}/{path.stem}: another {', '.join(keys)}" for path, keys in stale.items()), sep="\n")
        return
    if options.name:
        study = registry.STUDIES[options.name]
        data_name = options.data or study.data[0]
        if data_name not in study.data:
            raise ValueError(f"--data of {options.name} must be one of {', '.join(study.data)}, got {data_name!r}")
        print(f"{options.name}: {study.about}\n  made in {registry.file_of(study)}, topic {study.topic}")
        print(
            *(f"  {key}: {value}" for key, value in study.recipe(data_name, options.size).settings().items()), sep="\n"
        )
        return
    models = {name: study.about for name, study in registry.MODELS.items()}
    studies = {name: study.about for name, study in registry.STUDIES.items() if name not in models}
    for title, lines in {"Models": models, "Studies": studies, "Data sets": DATA, "Sizes": SIZES}.items():
        width = max([14, *(len(name) + 2 for name in lines)])
        print(title, *(f"  {name:<{width}}{about}" for name, about in lines.items()), sep="\n")


def _train(options: argparse.Namespace) -> None:
    images = data.load(options.data)
    path = options.checkpoint or Path(f"{options.name}.pt")
    about = {"name": options.name, "data": images.name, "shape": list(images.shape), "size": options.size}
    about["seed"] = options.seed
    if path.exists() and not options.resume:
        raise FileExistsError(f"{path} exists: --resume goes on from it, --checkpoint names another")
    if path.exists() and (found := registry.load_checkpoint(path)[1]) != about:
        raise ValueError(f"{path} is of another training: it has {found}, this one is {about}")
    records.writable(path.parent)
    run = {"data": images.name, "size": options.size, "seed": options.seed}
    model = registry.build(options.name, images.shape, **run)
    registry.label(model, **about)
    how = {"device": options.device, "checkpoint": path, "resume": options.resume, "progress": True}
    training = registry.fit(options.name, model, images.x_train, **run, **how)
    rank, _ = parallel.rank_and_size()
    parallel.leave()
    if rank > 0:  # the first process speaks for all
        return
    last = {name: values[-100:].mean().item() for name, values in training.history.items()}
    print(f"{path}: mean of the last steps: {', '.join(f'{name} {value:.3f}' for name, value in last.items())}")


def _run(options: argparse.Namespace) -> None:
    how = {"seeds": options.seeds, "size": options.size, "device": options.device, "out": options.out}
    how |= {"replace": options.replace, "say": lambda line: print(line, file=sys.stderr, flush=True)}
    every = [name for name, study in registry.STUDIES.items() if options.data in (None, *study.data)]
    for name in every if options.name == "all" else [options.name]:
        print(registry.record(name, data=options.data, **how), flush=True)


def _data(options: argparse.Namespace) -> None:
    images = data.load(options.name, download=True)
    classes = len(images.y_train.unique())
    if (len(images.x_train), len(images.x_test)) != (len(images.y_train), len(images.y_test)) or classes != 10:
        raise ValueError(f"{images.name} is not whole: remove it from {data.data_root()} and fetch it again")
    where = "scikit-learn" if options.name == "digits" else data.data_root().resolve()
    size = "×".join(map(str, images.shape[1:]))
    print(
        f"{images.name}: {len(images.x_train):,} training and {len(images.x_test):,} test images of {size} "
        f"in {classes} classes, in {where}"
    )


def _sample(options: argparse.Namespace) -> None:
    model, about = registry.load_checkpoint(options.checkpoint)
    if options.n < 1:
        raise ValueError(f"-n must be at least 1, got {options.n}")
    out = options.out or options.checkpoint.with_suffix(".png")
    records.writable(out.parent)
    samples = model.sample(options.n, generator=stream(options.seed, "samples"))
    columns = max(c for c in range(1, 17) if options.n % c == 0)
    figure = plots.image_panels({f"{about['name']}, {about['data']}": samples}, columns=columns, size=5)
    figure.savefig(out, dpi=150)
    print(out)


def _report(options: argparse.Namespace) -> None:
    groups = records.groups(options.out, list(registry.STUDIES))
    if not groups:
        raise FileNotFoundError(f"there is no record in {options.out}: `python -m gae_core run all` makes them")
    print("\n\n".join(f"## {title}\n\n{records.table(g)}\n\n{records.origin(g)}" for title, g in groups.items()))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 for what failed. Wrong usage exits with 2."""
    options = _parser().parse_args(arguments)
    commands = {"list": _list, "train": _train, "run": _run, "data": _data, "sample": _sample, "report": _report}
    try:
        if options.command != "train" and parallel.started() > 1:
            raise ValueError(f"torchrun starts `train` alone, which shares its batches: call {options.command} without")
        commands[options.command](options)
    except (ValueError, OSError, ArithmeticError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
