"""A file is read in one sitting: none has over 400 lines, of the package or beside it."""

import pytest
from source_tree import ROOT

LIMIT = 400

_FOLDERS = (ROOT.name, "tests", "tools", "benchmarks", "examples", "native")
_FILES = {
    str(path.relative_to(ROOT.parent)): path
    for folder in _FOLDERS
    for path in sorted((ROOT.parent / folder).rglob("*.py"))
}


@pytest.mark.parametrize("name", _FILES)
def test_no_file_is_longer_than_the_limit(name):
    lines = len(_FILES[name].read_text().splitlines())
    assert lines <= LIMIT, f"{name} has {lines} lines; split it"
