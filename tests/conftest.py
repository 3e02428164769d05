"""What all tests share: repeatable property tests, and figures that are closed."""

import os
import sys

import pytest
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "agg")

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
