"""What surrounds a command while it runs: its progress line, and a log for what libraries print."""

import functools
import inspect
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from mpqdm_fx.cli import streams
from mpqdm_fx.cli.course import Course
from mpqdm_fx.errors import MPQError
from mpqdm_fx.io.progress import Stage, reporting

__all__ = ["LOG", "QuietOption", "VerboseOption", "remember", "takes_loudness"]

LOG = "log.txt"
"""File of a result with what libraries printed while it was made."""

VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Log every stage, and show what libraries print."),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors, and what --json asks for.")
]

logger = logging.getLogger(__name__)

_SECOND = 1.0
_KEY = "mpqdm_fx.loudness"


@dataclass(frozen=True, kw_only=True)
class _Loudness:
    verbose: bool = False
    quiet: bool = False


def remember(context: typer.Context, *, verbose: bool, quiet: bool) -> None:
    """Keep what was typed before the command's name.

    Args:
        context: Of the group of commands.
        verbose: As of `VerboseOption`.
        quiet: As of `QuietOption`.
    """
    context.meta[_KEY] = _Loudness(verbose=verbose, quiet=quiet)


def takes_loudness(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options `-v` and `--quiet`, and the surroundings that they ask for.

    Args:
        command: A command; its name is that of the function.
    """

    @functools.wraps(command)
    def run(context: typer.Context, verbose: bool, quiet: bool, **given: Any) -> None:
        before = context.meta.get(_KEY, _Loudness())
        loudness = _Loudness(verbose=verbose or before.verbose, quiet=quiet or before.quiet)
        with _surroundings(loudness, results=not loudness.quiet or given.get("as_json", False)):
            command(**given, **({"context": context} if wants_context else {}))

    parameters = dict(inspect.signature(command).parameters)
    wants_context = parameters.pop("context", None) is not None
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("verbose", keyword, default=False, annotation=VerboseOption),
        inspect.Parameter("quiet", keyword, default=False, annotation=QuietOption),
        inspect.Parameter("context", keyword, annotation=typer.Context),
    ]
    options = [entry.replace(kind=keyword) for entry in parameters.values()]
    run.__signature__ = inspect.Signature([*options, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {entry.name: entry.annotation for entry in [*options, *added]}
    return run


@contextmanager
def _surroundings(loudness: _Loudness, *, results: bool) -> Iterator[None]:
    """Progress, log and loggers while a command runs."""
    others = int(os.environ.get("RANK", "0")) > 0  # processes that torchrun started
    with ExitStack() as stack:
        log = None
        if not loudness.verbose:
            _hush_libraries()
            log = stack.enter_context(streams.diverted())
        stack.enter_context(streams.printing(results))
        line = None if loudness.quiet or others else _Line(log, live=not loudness.verbose)
        stack.enter_context(_logged(loudness, line))
        stack.enter_context(reporting(line or _Unseen(log)))
        stack.enter_context(streams.showing(line))
        if line is not None:
            stack.enter_context(line)
        try:
            yield
        except MPQError:
            raise
        except Exception as error:
            if log is not None and (text := log.tail()):
                error.add_note(f"libraries printed:\n{text}")
            raise


def _hush_libraries() -> None:
    # Deprecations and missing GPU extensions of the libraries underneath: nothing to act on.
    warnings.simplefilter("ignore")
    # they read these when they are imported
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_LOGS", "-all")
    for library in ("torch", "torchao", "diffusers", "executorch"):
        logging.getLogger(library).setLevel(logging.ERROR)


@contextmanager
def _logged(loudness: _Loudness, line: "_Line | None") -> Iterator[None]:
    """Show this package's log on the terminal, and lead that of others where libraries print."""
    root, package = logging.getLogger(), logging.getLogger("mpqdm_fx")
    level = package.level
    handler = _Handler(line)
    root.addHandler(handler)
    levels = {True: logging.INFO, False: logging.WARNING}
    package.setLevel(logging.ERROR if loudness.quiet else levels[loudness.verbose])
    try:
        yield
    finally:
        root.removeHandler(handler)
        package.setLevel(level)


class _Handler(logging.Handler):
    def __init__(self, line: "_Line | None") -> None:
        super().__init__(logging.INFO)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.name.partition(".")[0] != "mpqdm_fx":
            streams.libraries().write(f"{text}\n")
        elif self._line is not None:
            self._line.say(text)
        else:
            streams.say(Console(file=streams.errors()), text)


class _Unseen:
    """A reporter that shows nothing; what libraries print is kept all the same.

    Args:
        log: What libraries print, if that is kept.
    """

    def __init__(self, log: "streams.Log | None") -> None:
        self._log = log

    def opened(self, stage: Stage) -> None:
        """A stage begins."""

    def moved(self, stage: Stage, amount: float) -> None:
        """A stage goes on."""

    def closed(self, stage: Stage, finished: bool) -> None:
        """A stage is over."""

    def expected(self, seconds: Callable[[], Mapping[str, float]]) -> None:
        """Nobody wants to know."""

    def leave_log(self, folder: Path) -> None:
        """Write what libraries printed so far, if they did."""
        if self._log is not None and (text := self._log.text()):
            (folder / LOG).write_text(text, encoding="utf-8")


class _Line(_Unseen):
    """The reporter of the command line: a line that is drawn anew each second.

    Where standard error is no terminal, each stage is a line when it begins.

    Args:
        log: What libraries print, if that is kept.
        live: Whether a line may be drawn anew; what libraries print would break it.
    """

    def __init__(self, log: "streams.Log | None", *, live: bool) -> None:
        super().__init__(log)
        self._course = Course()
        self._console = Console(file=streams.errors(), highlight=False)
        self._live = live and self._console.is_terminal and not self._console.is_dumb_terminal
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._drawn = False
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> None:
        if self._live:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self.finish()
        if self._live:
            self._thread.join()

    def finish(self) -> None:
        """Take the line away; results or an error follow."""
        self._over.set()
        self.erase()

    def erase(self) -> None:
        """Take the line off the terminal until the next second."""
        with self._lock:
            self._erase()

    def say(self, text: object) -> None:
        """Print a line of text above the line."""
        with self._lock:
            self._erase()
            streams.say(self._console, text)
            if self._live and not self._over.is_set():
                self._draw()

    def opened(self, stage: Stage) -> None:
        """A stage begins."""
        with self._lock:
            is_new = self._course.begin(stage)
            if is_new and not self._live and not self._over.is_set():
                streams.say(self._console, self._course.begun)

    def closed(self, stage: Stage, finished: bool) -> None:
        """A stage is over."""
        with self._lock:
            self._course.end(stage)

    def expected(self, seconds: Callable[[], Mapping[str, float]]) -> None:
        """Take over what is expected."""
        try:
            forecast = seconds()
        except Exception as error:  # a guess at the time is no reason to end an hour's work
            logger.info("what is to come cannot be foretold: %r", error)
            return
        with self._lock:
            self._course.expect(forecast)

    def _tick(self) -> None:
        while not self._over.wait(_SECOND):
            with self._lock:
                if not self._over.is_set():
                    self._draw()

    def _draw(self) -> None:
        with self._console:  # one write
            self._erase()
            plain = self._console.options.ascii_only
            self._console.print(
                str(self._course).replace("·", "-" if plain else "·"),
                end="", markup=False, no_wrap=True, overflow="crop" if plain else "ellipsis",
                width=self._console.width - 1,  # terminals go on to a new line behind the last
            )  # fmt: skip
            self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            back, erase = ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)
            self._console.control(Control(back, erase))
            self._drawn = False
