"""What all tests share: repeatable property tests, figures that are closed, marks, and a progress by file."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "agg")

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Mark what `make check` leaves out: the functions that stand in slow.txt, which `make slow` writes."""
    slow = set(Path(__file__).with_name("slow.txt").read_text(encoding="utf-8").split())
    for item in items:
        if item.nodeid.partition("[")[0].removeprefix("tests/") in slow:
            item.add_marker("slow")


begun = set()


def pytest_runtest_logstart(nodeid, location):
    """Say which file is begun."""
    file = nodeid.partition("::")[0]
    if file not in begun and not os.environ.get("PYTEST_XDIST_WORKER"):
        begun.add(file)
        print(f" {file}", end="", flush=True)


@pytest.fixture(autouse=True)
def figures_are_closed():
    """Close what a test has drawn: more than twenty open figures are a warning, and that is an error here."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
