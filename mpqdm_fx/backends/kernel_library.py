"""The native library: it has the kernels of the operators that a low-bit program calls."""

import importlib
import mmap
from pathlib import Path

from mpqdm_fx.errors import LoweringError

__all__ = ["calls_own_operators", "has_kernels", "require_kernels"]

_MODULE = "mpqdm_kernels"
_SERIES = "0.2"  # whose operators take the arguments that programs of this package have
_MARK = b"mpqdm::"  # how a program's names of own operators begin


def require_kernels(operator: str = "mpqdm::conv2d_mixed") -> None:
    """Register the kernels with ExecuTorch's runtime in this process.

    Args:
        operator: An operator that is about to run, with its namespace; messages name it.

    Raises:
        LoweringError: The library is not installed, has other operators, or has no such one; says
            how to install.
    """
    remedy = 'in a checkout: pip install ./native; elsewhere: pip install "mpqdm-fx[kernels]"'
    try:
        library = importlib.import_module(_MODULE)
        library.load()
    except (ImportError, OSError) as error:
        raise LoweringError(
            f"the program calls {operator}, whose kernels are in the library {_MODULE}, which "
            f"cannot be loaded ({error}); {remedy}"
        ) from error
    if not library.__version__.startswith(f"{_SERIES}."):
        raise LoweringError(
            f"the program calls operators of {_MODULE} {_SERIES}, and {library.__version__} is "
            f"installed; {remedy}"
        )
    if operator not in library.operators():
        raise LoweringError(
            f"the library {_MODULE} is too old: it has no kernel of {operator}, which the program "
            f"calls; {remedy}"
        )


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
