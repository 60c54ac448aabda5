"""Where the command line ends: every exception becomes one line on stderr and an exit status.

0 done; 1 a check of the command fell short; 2 bad input or surroundings, with the remedy; 70 a
defect of this package, with a log to report; 128 + N stopped by signal N.
"""

import errno
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from safetensors import SafetensorError

from mpqdm_fx.cli.checks import EXTRAS
from mpqdm_fx.cli.signals import Stopped, stoppable
from mpqdm_fx.cli.spelling import as_typed
from mpqdm_fx.cli.streams import OutputError, guarded_streams, say
from mpqdm_fx.cli.usage import USAGE_ERROR, usage_line
from mpqdm_fx.errors import MPQError
from mpqdm_fx.io.system_errors import REMEDIES, error_number
from mpqdm_fx.io.versions import versions

__all__ = ["INTERNAL", "KINDS", "Ending", "Kind", "run", "tell"]

INTERNAL = 70
"""Exit status of what should not happen (`EX_SOFTWARE` of sysexits.h)."""

Places = Mapping[str, Any]
"""What was typed, by the command's parameter: where it read and wrote."""


@dataclass(frozen=True)
class Ending:
    """What a user is told of an exception.

    Attributes:
        status: Exit status.
        line: One line.
    """

    status: int
    line: str


@dataclass(frozen=True)
class Kind:
    """A kind of exception.

    Attributes:
        holds: Whether an exception is of this kind.
        line: What is said of it: what happened, where, what to do.
    """

    holds: Callable[[BaseException], bool]
    line: Callable[[Any, Places], str]


def run(app: typer.Typer) -> NoReturn:
    """Run a command line and exit; nothing it installs outlives it.

    Args:
        app: Commands of class `cli.usage.Command`.
    """
    places: dict[str, Any] = {}
    status = 0
    try:
        with guarded_streams():
            try:
                with stoppable():
                    status = app(obj=places, prog_name="mpqdm-fx", standalone_mode=False) or 0
            except SystemExit:
                raise
            except BaseException as error:
                status = _print(tell(error, places))
    except OutputError as error:  # closed before there was a stream to guard
        status = _print(tell(error, places))
    sys.exit(status)


def _print(ending: Ending) -> int:
    with suppress(OSError):
        say(Console(stderr=True), ending.line, style="red")
    return ending.status


def tell(error: BaseException, places: Places) -> Ending:
    """What an exception means to who typed the command.

    Args:
        error: The exception. One that is no input's fault is written to a log file.
        places: What was typed.
    """
    if isinstance(error, Stopped):
        return Ending(error.status, _stopped(error, places))
    for kind in KINDS:
        if kind.holds(error):
            return Ending(2, f"error: {kind.line(error, places)}")
    cause = f"{type(error).__name__}: {_flat(error)}"[:200]
    return Ending(INTERNAL, f"internal error ({cause}), please report it with {_log(error)}")


_RESUMABLE = ("quantize", "distill", "export", "pareto")


def _stopped(error: Stopped, places: Places) -> str:
    if int(os.environ.get("RANK", "0")) > 0:
        return f"stopped by {error} (process {os.environ['RANK']})"
    if places.get("command") not in _RESUMABLE:
        return f"stopped by {error}"
    return f"stopped by {error}; {places['output']} holds nothing half-written; go on with --resume"


# ---------------------------------------------------------------- what the kinds are known by


def _any_of(*classes: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, classes)


def _numbered(*numbers: int) -> Callable[[BaseException], bool]:
    return lambda error: error_number(error) in numbers


_NO_MEMORY = ("DefaultCPUAllocator", "std::bad_alloc", "out of memory", "Cannot allocate memory")


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or error_number(error) == errno.ENOMEM:
        return True
    # torch's allocators raise RuntimeErrors
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _is_extra(error: BaseException) -> bool:
    return isinstance(error, ImportError) and _package(error) in EXTRAS


def _package(error: ImportError) -> str:
    return (error.name or "").partition(".")[0]


def _is_lost_peer(error: BaseException) -> bool:
    texts = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(t in str(error) for t in texts)


# ---------------------------------------------------------------- what is said of them


def _where(error: BaseException, places: Places) -> str:
    """The path that the system named, or where the command was at work."""
    names = [getattr(error, name, None) for name in ("filename", "filename2")]
    named = [os.fsdecode(n) for n in names if isinstance(n, str | bytes | os.PathLike)]
    if named:
        return " -> ".join(named)
    wrote = [str(places[key]) for key in ("output", "sensitivity") if places.get(key) is not None]
    read = [str(places[key]) for key in ("model", "directory") if places.get(key) is not None]
    parts = []
    if read:
        parts.append(f"reading {' and '.join(read)}")
    if wrote:
        parts.append(f"writing {' and '.join(wrote)}")
    return ", ".join([*parts, f"temporary files in {tempfile.gettempdir()}"])


def _flat(error: BaseException) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())


def _cause(error: BaseException) -> str:
    number = error_number(error)
    return _flat(error) if number is None else os.strerror(number)


def _says(remedy: str) -> Callable[[Any, Places], str]:
    return lambda error, places: f"{_where(error, places)}: {_cause(error)}; {remedy}"


def _says_memory(error: BaseException, places: Places) -> str:
    return (
        f"out of memory ({_where(error, places)}); give --max-memory, fewer samples "
        f"(--trajectories, --num, --batch-size) or a machine with more"
    )


def _says_recursion(error: BaseException, places: Places) -> str:
    return (
        f"{_where(error, places)}: something is nested more than {sys.getrecursionlimit()} deep; "
        f"look for a damaged JSON file, or flatten the model"
    )


def _says_extra(error: ImportError, _: Places) -> str:
    package = _package(error)
    return f'{package} is not installed: pip install "mpqdm-fx[{EXTRAS[package]}]"'


#: In this order: the first kind that holds is told.
KINDS: tuple[Kind, ...] = (
    Kind(_any_of(USAGE_ERROR), lambda error, _: usage_line(error)),
    Kind(_any_of(MPQError), lambda error, places: as_typed(str(error), places.get("options", {}))),
    Kind(_is_memory, _says_memory),
    Kind(
        _numbered(*REMEDIES),
        lambda error, places: _says(REMEDIES[error_number(error) or 0])(error, places),
    ),
    Kind(
        _numbered(errno.EACCES, errno.EPERM, errno.EROFS),
        _says("change its permissions, or give another place"),
    ),
    Kind(_numbered(errno.EMFILE, errno.ENFILE), _says("raise the limit of files (ulimit -n)")),
    Kind(_any_of(OSError), _says("check this path and its disk")),
    Kind(
        _any_of(SafetensorError),
        _says("a safetensors file is damaged or truncated; write or download it again"),
    ),
    Kind(_any_of(RecursionError), _says_recursion),
    Kind(
        _any_of(UnicodeError),
        _says("rename what is not UTF-8, or set PYTHONUTF8=1"),
    ),
    Kind(_is_extra, _says_extra),
    Kind(
        _is_lost_peer,
        lambda error, _: f"another process of this run ended; see its error ({_flat(error)})",
    ),
)


def _log(error: BaseException) -> str:
    """Write a log beside the user's work, or where temporary files go; return its path."""
    text = "\n".join(
        [
            f"command: {shlex.join(sys.argv)}",
            f"python: {sys.version}",
            f"system: {platform.platform()}",
            *(f"{name}: {version}" for name, version in versions().items()),
            "",
            *traceback.format_exception(error),
        ]
    )
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(".log", "mpqdm-fx-error-", folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return name
    return f"this traceback, which no folder takes: {text}"
