"""The native library: it has the kernels of the operators that a low-bit program calls."""

import importlib
import mmap
import os
from pathlib import Path
from types import ModuleType

from mpqdm_fx.errors import ArtifactError, LoweringError

__all__ = ["CODED_END", "calls_own_operators", "has_kernels", "place_codes", "require_kernels"]

_MODULE = "mpqdm_kernels"
_SERIES = "0.3"  # whose operators take the arguments that programs of this package have
_REMEDY = 'in a checkout: pip install ./native; elsewhere: pip install "mpqdm-fx[kernels]"'
_MARK = b"mpqdm::"  # how a program's names of own operators begin

CODED_END = b"MPQC"
"""Ends a program that entropy-coded weights follow (native/FORMAT.md)."""


def require_kernels(operator: str = "mpqdm::conv2d_mixed") -> None:
    """Register the kernels with ExecuTorch's runtime in this process.

    Args:
        operator: An operator that is about to run, with its namespace; messages name it.

    Raises:
        LoweringError: The library is not installed, has other operators, or has no such one; says
            how to install.
    """
    library = _library(f"the program calls {operator}, whose kernels are in")
    if operator not in library.operators():
        raise LoweringError(
            f"the library {_MODULE} is too old: it has no kernel of {operator}, which the program "
            f"calls; {_REMEDY}"
        )


def place_codes(path: Path, name: object) -> None:
    """Put the weights that an entropy coder wrote behind a program into it (native/FORMAT.md).

    Args:
        path: An expanded program, which becomes the plain one; any other file stays as it is.
        name: What messages call it.

    Raises:
        ArtifactError: What follows the program is damaged.
        LoweringError: The library is not installed, or another one; says how to install.
    """
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) < len(CODED_END):
            return
        file.seek(-len(CODED_END), os.SEEK_END)
        if file.read() != CODED_END:
            return
        library = _library(f"the weights of {name} are read by")
        with mmap.mmap(file.fileno(), 0) as content:
            try:
                program_bytes = library.place_codes(content)
            except ValueError as error:
                raise ArtifactError(f"{name} is damaged: {error}; copy it again") from error
        file.truncate(program_bytes)


def _library(purpose: str) -> ModuleType:
    """The library, its operators registered; `purpose` begins messages."""
    try:
        library = importlib.import_module(_MODULE)
        library.load()
    except (ImportError, OSError) as error:
        raise LoweringError(
            f"{purpose} the library {_MODULE}, which cannot be loaded ({error}); {_REMEDY}"
        ) from error
    if not library.__version__.startswith(f"{_SERIES}."):
        raise LoweringError(
            f"{purpose} the library {_MODULE} {_SERIES}, and {library.__version__} is installed; "
            f"{_REMEDY}"
        )
    return library


def has_kernels() -> bool:
    """Whether the library is installed and loads."""
    try:
        require_kernels()
    except LoweringError:
        return False
    return True


def calls_own_operators(path: Path) -> str | None:
    """The first own operator that a program file names; None if there is none.

    Args:
        path: A plain `.pte`.
    """
    if not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_MARK, 0, _program_end(content))
        if start < 0:
            return None
        end = content.find(b"\0", start)
        return content[start:end].decode("ascii", "replace")


def _program_end(content: mmap.mmap) -> int:
    """Where the description of the program ends and its data begins.

    An extended header says so (`eh00` behind the flatbuffer's own: length, then size); weights are
    not searched, for any bytes may be among them.
    """
    if content[8:12] != b"eh00":
        return len(content)
    return int.from_bytes(content[16:24], "little")
