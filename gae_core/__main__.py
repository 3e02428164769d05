"""Command line: ``python -m gae_core data mnist`` fetches a data set, ``run`` trains, measures and records."""

import argparse
import sys
from pathlib import Path

from gae_core import data, experiments


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gae_core", description="Data and recorded runs of the book.")
    commands = parser.add_subparsers(dest="command", required=True)
    names = ["digits", "mnist", "fashion_mnist"]

    fetch = commands.add_parser("data", help="fetch a data set into $GAE_DATA (default data/) and check it")
    fetch.add_argument("name", choices=names)

    run = commands.add_parser("run", help="train a model, measure it, and write book/results/NAME/DATA-SIZE.json")
    run.add_argument("name", choices=list(experiments.MODELS))
    run.add_argument("--data", choices=names, default="mnist")
    run.add_argument("--size", choices=list(experiments.SIZES), default="full")
    run.add_argument("--seeds", default="0,1,2", help="comma-separated whole numbers")
    run.add_argument("--device", default="auto")
    run.add_argument("--out", type=Path, default=experiments.RESULTS)

    options = parser.parse_args(arguments)
    try:
        if options.command == "data":
            images = data.load(options.name, download=True)
            print(f"{images.name}: {len(images.x_train):,} training and {len(images.x_test):,} test images")
        else:
            path = experiments.run(
                options.name,
                images=data.load(options.data),
                seeds=[int(seed) for seed in options.seeds.split(",")],
                size=options.size,
                device=options.device,
                out=options.out,
            )
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
