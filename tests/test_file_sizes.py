"""A file is read in one sitting: none of the package has over 400 lines."""

import pytest
from source_tree import ROOT

LIMIT = 400

_FILES = {str(path.relative_to(ROOT.parent)): path for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("name", _FILES)
def test_no_file_is_longer_than_the_limit(name):
    lines = len(_FILES[name].read_text().splitlines())
    assert lines <= LIMIT, f"{name} has {lines} lines; split it"
