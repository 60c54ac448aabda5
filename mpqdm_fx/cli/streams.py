"""Standard output and error of the command line: what they cannot take is told, once."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mpqdm_fx.errors import MPQError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["OutputError", "guarded_streams", "say"]


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
        sys.stdout = _Guard(output, _refuse)
        yield
    finally:
        sys.stdout, sys.stderr = output, errors
        if strict:
            output.reconfigure(errors="strict")


class _Guard:
    """A text stream whose failures go to a function; after the first one it takes everything."""

    def __init__(self, stream: Any, failed: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._failed = failed
        self._lost = False

    def write(self, text: str) -> int:
        with self._told():
            return int(self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
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
