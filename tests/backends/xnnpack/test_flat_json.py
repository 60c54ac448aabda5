"""Files of ExecuTorch that cannot be made are told with the place of the temporary ones."""

import json
import tempfile

import pytest
from limits import small_files
from rounded_nets import Residual, rounded

from mpqdm_fx.backends.xnnpack.flat_json import PROGRAM
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack
from mpqdm_fx.errors import MPQError

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


def test_a_flatbuffer_that_cannot_be_read_apart_is_told_with_the_place(place, tmp_path, capfd):
    graph, ranges, inputs = rounded(Residual())
    lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte")
    flatbuffer = (tmp_path / "net.pte").read_bytes()
    length = len(json.dumps(PROGRAM.to_json(flatbuffer)))
    # longer than a schema and what it is made of, which are written in front of it
    with small_files(3 * length // 4), pytest.raises(MPQError, match=rf"{place}.*TMPDIR"):
        PROGRAM.to_json(flatbuffer)
    assert list(place.iterdir()) == []
