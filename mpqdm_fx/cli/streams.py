"""Standard output and error of the command line: what they cannot take is told, once."""

import contextlib
import faulthandler
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from mpqdm_fx.errors import MPQError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Line",
    "Log",
    "OutputError",
    "announce",
    "complain",
    "diverted",
    "errors",
    "finish_line",
    "guarded_streams",
    "libraries",
    "printing",
    "prints_results",
    "results",
    "say",
    "showing",
]


class OutputError(MPQError):
    """Standard output does not take what is printed."""


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Make results that cannot be printed an `OutputError`; drop progress that cannot be shown.

    Names that the terminal's encoding does not have are printed with escapes.

    Raises:
        OutputError: Standard output is closed, or (in the block) does not take what is written.
    """
    _fill_descriptors()
    output: Any = sys.stdout
    errors: Any = sys.stderr
    strict = output is not None and getattr(output, "errors", None) == "strict"
    try:
        if errors is None:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives on
        sys.stderr = _Guard(sys.stderr, lambda error: None)
        if output is None:
            raise OutputError(
                "standard output is closed, and results are printed there; open it, for example "
                "with > /dev/null"
            )
        if strict:
            output.reconfigure(errors="backslashreplace")
        sys.stdout = _Guard(output, _refuse, _step_aside)
        yield
    finally:
        sys.stdout, sys.stderr = output, errors
        if strict:
            output.reconfigure(errors="strict")


class _Guard:
    """A text stream whose failures go to a function; after the first one it takes everything."""

    def __init__(
        self,
        stream: Any,
        failed: Callable[[OSError], None],
        before: Callable[[], None] | None = None,
    ) -> None:
        self._stream = stream
        self._before = before
        self._failed = failed
        self._lost = False

    def write(self, text: str) -> int:
        if self._before is not None:
            self._before()
        with self._failures():
            return int(self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        with self._failures():
            self._stream.flush()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._lost:
                self._lost = True
                self._drop()
                self._failed(error)

    def _drop(self) -> None:
        """Lead the descriptor nowhere, or the interpreter complains of the rest when it ends."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _refuse(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        cause = "its reader closed it before everything was printed (broken pipe)"
    else:
        cause = f"it does not take what is printed: {error.strerror}"
    raise OutputError(
        f"standard output: {cause}; files that were written stay; print to a file, with > FILE"
    ) from None


def _fill_descriptors() -> None:
    """Open what was closed (`2>&-`), or the next file would get what libraries print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def say(console: "Console", text: object, *, style: str | None = None) -> None:
    """Print a text as it is: what stands in brackets is no markup, and no path is broken in two.

    Args:
        console: Where to print it.
        text: What to print.
        style: Colour of all of it.
    """
    console.print(str(text), style=style, markup=False, highlight=False, soft_wrap=True)


# ---------------------------------------------------------------- what libraries print

#: Of the process, like its file descriptors; a signal's thread reads them too.
_errors: TextIO | None = None
_results = True
_line: "Line | None" = None


class Log:
    """A file that takes what libraries print on standard error.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def text(self) -> str:
        """All of it; "" if nothing was printed."""
        text = self.path.read_text(encoding="utf-8", errors="backslashreplace")
        return text if text.strip() else ""

    def tail(self, characters: int = 10_000) -> str:
        """The end of it."""
        return self.text()[-characters:]


@contextmanager
def diverted() -> Iterator[Log]:
    """Lead what is printed on standard error into a file; `errors` still reaches the user.

    It takes the descriptor, so that libraries in C and child processes are heard as well. The file
    lies among temporary files and goes with the block; only a process that is killed leaves it.
    """
    global _errors
    outer, before = _errors, sys.stderr
    with contextlib.ExitStack() as stack:
        try:
            descriptor, name = tempfile.mkstemp(".log", "mpqdm-fx-")
            stack.callback(Path(name).unlink, missing_ok=True)
        except OSError:  # no folder takes temporary files: who needs one says so
            descriptor, name = os.open(os.devnull, os.O_WRONLY), os.devnull
        stack.callback(os.close, descriptor)
        os.set_inheritable(descriptor, False)
        original = os.dup(2)
        stack.callback(os.close, original)
        if _descriptor_of(before) == 2:
            encoding = getattr(before, "encoding", None) or "utf-8"
            terminal = open(original, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115
            stack.callback(terminal.close)
            _errors = _Guard(terminal, lambda error: None)  # type: ignore[assignment]
        else:
            _errors = before  # it was replaced, and is no file of ours
        if not faulthandler.is_enabled():
            faulthandler.enable(original)
            stack.callback(faulthandler.disable)
        os.dup2(descriptor, 2)
        sys.stderr = open(descriptor, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
        try:
            yield Log(Path(name))
        finally:
            sys.stderr.flush()
            sys.stderr = before
            os.dup2(original, 2)
            _errors = outer


def _descriptor_of(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None


def errors() -> TextIO:
    """Where errors and progress are printed, whatever libraries do."""
    return sys.stderr if _errors is None else _errors


def libraries() -> TextIO:
    """Where libraries print."""
    return sys.stderr


def complain(text: object) -> None:
    """Print an error where the user reads it, whatever libraries do.

    Args:
        text: One line.
    """
    from rich.console import Console

    finish_line()
    say(Console(file=errors()), text, style="red")


@contextmanager
def printing(results: bool) -> Iterator[None]:
    """Say whether results are printed in the block.

    Args:
        results: Whether.
    """
    global _results
    before, _results = _results, results
    try:
        yield
    finally:
        _results = before


def prints_results() -> bool:
    """Whether results are printed."""
    return _results


class Line(Protocol):
    """A line of progress at the bottom of the terminal."""

    def erase(self) -> None:
        """Take it off for what is printed now."""

    def finish(self) -> None:
        """Take it off for good."""

    def say(self, text: object) -> None:
        """Print a line of text above it."""


@contextmanager
def showing(line: Line | None) -> Iterator[None]:
    """Have a line of progress in the block, which makes way for what is printed.

    Args:
        line: The line; None for none.
    """
    global _line
    before, _line = _line, line
    try:
        yield
    finally:
        _line = before


def announce(text: object) -> None:
    """Say at once what a command is about to do, where progress is shown.

    Args:
        text: One line.
    """
    if _line is not None:
        _line.say(text)


def finish_line() -> None:
    """Take the line of progress away: what follows is the command's result."""
    if _line is not None:
        _line.finish()


class _Results:
    """Standard output for results: before the first one is written, the line of progress goes."""

    def write(self, text: str) -> int:
        finish_line()
        return sys.stdout.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


def results() -> TextIO:
    """Where results are printed."""
    return _Results()  # type: ignore[return-value]


def _step_aside() -> None:
    if _line is not None:
        _line.erase()
