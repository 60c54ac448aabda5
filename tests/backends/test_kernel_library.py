"""A program of own operators is refused before it is loaded where their kernels are missing."""

import struct
import sys
import types

import pytest

from mpqdm_fx.backends.kernel_library import calls_own_operators, has_kernels, require_kernels
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.errors import ArtifactError, LoweringError

NAME = "mpqdm::linear_mixed"


def program(path, description, data=b""):
    """A file with the header of a program, as far as it is read before loading."""
    size = 40 + len(description)
    header = b"\0\0\0\0ET12eh00" + struct.pack("<IQQ", 24, size, size)
    path.write_bytes(header.ljust(40, b"\0") + description + data)
    return path


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpqdm_kernels", None)


@pytest.fixture
def installed(monkeypatch):
    """A library with one operator."""
    library = types.SimpleNamespace(loads=0, operators=lambda: (NAME,), __version__="0.3.7")

    def load():
        library.loads += 1

    library.load = load
    monkeypatch.setitem(sys.modules, "mpqdm_kernels", library)
    return library


def test_the_operators_that_a_file_names(tmp_path):
    own = program(tmp_path / "own.pte", b"..aten::add\0..mpqdm::linear_mixed\0out\0")
    assert calls_own_operators(own) == NAME
    others = program(tmp_path / "others.pte", b"..aten::add\0", data=b"mpqdm::in the weights")
    assert calls_own_operators(others) is None
    (tmp_path / "empty.pte").touch()
    assert calls_own_operators(tmp_path / "empty.pte") is None


@pytest.mark.xnnpack
def test_a_program_is_refused_with_the_operator_and_the_remedy(tmp_path, missing):
    path = program(tmp_path / "own.pte", b"mpqdm::linear_mixed\0")
    with pytest.raises(LoweringError, match=f'calls {NAME}, .*pip install "mpqdm-fx\\[kernels\\]"'):
        XnnpackRunner(path)


@pytest.mark.xnnpack
def test_the_library_is_loaded_before_the_program(tmp_path, installed):
    path = program(tmp_path / "own.pte", b"mpqdm::linear_mixed\0")
    with pytest.raises(ArtifactError, match="cannot be loaded by ExecuTorch"):
        XnnpackRunner(path)  # it has a header and no program
    assert installed.loads == 1


def test_an_operator_that_the_library_lacks_is_named(installed):
    require_kernels(NAME)
    with pytest.raises(LoweringError, match="too old: it has no kernel of mpqdm::conv9d"):
        require_kernels("mpqdm::conv9d")


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.30.0", "1.0"])
def test_a_library_with_other_operators_is_refused(installed, version):
    installed.__version__ = version
    with pytest.raises(LoweringError, match=rf"mpqdm_kernels 0\.3, and {version} is installed"):
        require_kernels(NAME)


def test_a_library_that_does_not_load_is_none(monkeypatch, installed):
    def load():
        raise OSError("libexecutorch.so: wrong version")

    installed.load = load
    with pytest.raises(LoweringError, match=r"cannot be loaded \(libexecutorch.so: wrong version"):
        require_kernels(NAME)
    assert not has_kernels()
