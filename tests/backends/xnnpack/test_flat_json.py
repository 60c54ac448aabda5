"""Files of ExecuTorch that cannot be made are told with the place of the temporary ones."""

import tempfile

import pytest
from limits import small_files
from rounded_nets import Residual, rounded

from mpqdm_fx.backends.xnnpack.flat_json import PROGRAM
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack
from mpqdm_fx.errors import LoweringError, MPQError

pytestmark = pytest.mark.xnnpack


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where temporary files go, and what no message of another place has."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.mark.parametrize("size", [200, 10_000])  # a schema is refused, and what flatc writes
def test_temporary_files_that_are_refused_are_told_with_their_place(place, size, tmp_path, capfd):
    graph, ranges, inputs = rounded(Residual())
    with small_files(size), pytest.raises(MPQError, match=rf"{place}.*(TMPDIR|ulimit -f)"):
        lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte")
    assert list(tmp_path.rglob("*")) == [place]


def test_what_flatc_does_not_take_is_told_with_its_place(place, capfd):
    with pytest.raises(LoweringError, match=rf"{place}, ended with status -?\d+; .*TMPDIR"):
        PROGRAM.to_json(b"no flatbuffer")
    assert list(place.iterdir()) == []
