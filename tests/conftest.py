"""What all tests share: the path to the book's tools, and repeatable property tests."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book" / "_ext"))

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_configure(config):
    """Register the marker of the tests that look at the built pages."""
    config.addinivalue_line("markers", "pages: this test opens the built book in a browser")


@pytest.fixture(autouse=True)
def figures_are_closed():
    """Close what a test has drawn: more than twenty open figures are a warning, and that is an error here."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
