"""The programs of `benchmarks/` can be imported, as they import each other."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="package", autouse=True)
def programs():
    """Put their folder on the path."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
