"""What the system refuses a writer, a full disk for instance, told with the path and a remedy."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from mpqdm_fx.errors import ArtifactError

__all__ = ["REMEDIES", "check_name_length", "error_number", "writing"]

_RUST_ERRNO = re.compile(r"(?:os error |code: )(\d+)")

_DISK = "free space there, or give another disk (TMPDIR moves temporary files)"

#: What to do, by the system's number of an error.
REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: _DISK,
    errno.EDQUOT: _DISK,
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.ENAMETOOLONG: "give a shorter name",
}

_LONGEST = 255  # bytes of a name, of all file systems that are in common use
_ADDED = len(b"..checkpoint.01234567.stage")  # to a result's name while it is made


class _WriteError(ArtifactError):
    """Something was not written; whoever writes around it names its own place."""

    def __init__(self, message: str, number: int, told: str | None) -> None:
        super().__init__(message)
        self.number, self.told = number, told


def error_number(error: BaseException) -> int | None:
    """The system's number of an error, which safetensors has in its text; None if it has none.

    Args:
        error: Any exception.
    """
    if isinstance(error, OSError):
        return error.errno
    match = _RUST_ERRNO.search(str(error)) if isinstance(error, SafetensorError) else None
    return int(match[1]) if match else None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell what the system refuses while something is written.

    Args:
        path: What is being written, as the caller knows it. Of blocks in one another, the outer one
            names its own.

    Raises:
        ArtifactError: The disk is full, a limit is reached, or a name is too long; other errors are
            as they were.
    """
    try:
        yield
    except _WriteError as error:
        raise _refusal(path, error.number, error.told) from error.__cause__
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number is None or number not in REMEDIES:
            raise
        named = getattr(error, "filename", None)
        told = None if named is None else os.fsdecode(named)
        raise _refusal(path, number, told) from error


def _refusal(path: Path, number: int, told: str | None) -> _WriteError:
    """The error; a file that lies elsewhere, or in a hidden folder beside, is named too."""
    where = "" if told is None or Path(told).parent == path.parent else f" ({told})"
    message = f"{path} cannot be written: {os.strerror(number)}{where}; {REMEDIES[number]}"
    return _WriteError(message, number, told)


def check_name_length(path: Path, typed: str | None = None) -> None:
    """Refuse a result's name that leaves no room for what its folder is called while it is made.

    Args:
        path: The folder to appear.
        typed: What was typed, for the message; default the path.

    Raises:
        ArtifactError: It is too long.
    """
    length, longest = len(os.fsencode(path.name)), _LONGEST - _ADDED
    if length > longest:
        raise ArtifactError(
            f"{typed or path}: the name has {length} bytes, and the folder is made under a "
            f"longer one beside it; give a name of at most {longest} bytes"
        )
