"""How far a job is: the library tells stages and amounts, whoever runs the job shows them.

    with stage("rounding", total=len(layers), unit="layer") as advance:
        for layer in layers:
            ...
            advance()

A reporter is installed for a block of code (`reporting`): the command line's draws one line for the
whole run. Where none is, each stage is a bar of tqdm on a terminal or in a notebook.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

__all__ = [
    "SILENT",
    "Bars",
    "Reporter",
    "Stage",
    "each",
    "expect",
    "leave_log",
    "reporting",
    "stage",
    "tracked",
]


class Reporter(Protocol):
    """Who is told of stages; stages may lie inside one another."""

    def opened(self, stage: "Stage") -> None:
        """A stage begins."""

    def moved(self, stage: "Stage", amount: float) -> None:
        """A stage has done `amount` more, or has another note."""

    def closed(self, stage: "Stage", finished: bool) -> None:
        """A stage is over; `finished` unless an error ended it."""

    def expected(self, seconds: Callable[[], Mapping[str, float]]) -> None:
        """Stages to come and what they will take, worked out only for those who want to know."""

    def leave_log(self, folder: Path) -> None:
        """A result is about to be sealed: what libraries said may be written into its folder."""


class Stage:
    """A part of a job; a context manager, called with each amount that is done.

    Args:
        name: What is done, in two or three words.
        total: The whole amount; None if it is not known.
        unit: What amounts are counted in.
        reporter: Who is told; None for nobody.

    Attributes:
        name: See above.
        total: See above.
        unit: See above.
        done: The amount that is done.
        note: What is going on inside, or "".
    """

    def __init__(
        self, name: str, total: float | None, unit: str, reporter: Reporter | None
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done: float = 0
        self.note = ""
        self._reporter = reporter
        if reporter is not None:
            reporter.opened(self)

    @property
    def is_told(self) -> bool:
        """Whether somebody is told; who is not need not count."""
        return self._reporter is not None

    def __call__(self, amount: float = 1, note: str | None = None) -> None:
        """Tell that `amount` more is done.

        Args:
            amount: In units of the total.
            note: What is going on inside from now on; None for the same as before.
        """
        self.done += amount
        if note is not None:
            self.note = note
        if self._reporter is not None:
            self._reporter.moved(self, amount)

    def close(self, finished: bool = True) -> None:
        """End the stage; a second time, nothing happens."""
        reporter, self._reporter = self._reporter, None
        if reporter is not None:
            reporter.closed(self, finished)

    def __enter__(self) -> Self:
        """Return the stage, which began when it was made."""
        return self

    def __exit__(self, *error: object) -> None:
        self.close(finished=error[0] is None)


class Bars:
    """A bar of tqdm for each stage; none where standard error is no terminal."""

    def __init__(self) -> None:
        self._bars: dict[Stage, Any] = {}

    def opened(self, stage: Stage) -> None:
        """Draw a bar."""
        from tqdm.auto import tqdm

        # No smoothing: the costs of neighbouring steps are too different for a recent rate.
        self._bars[stage] = tqdm(
            total=stage.total, desc=stage.name, unit=stage.unit, smoothing=0, disable=None,
            unit_scale=stage.total is not None and stage.total >= 1e5,
        )  # fmt: skip

    def moved(self, stage: Stage, amount: float) -> None:
        """Move the stage's bar."""
        bar = self._bars[stage]
        if stage.note:
            bar.set_postfix_str(stage.note, refresh=False)
        bar.update(amount)

    def closed(self, stage: Stage, finished: bool) -> None:
        """Leave the bar as it stands."""
        self._bars.pop(stage).close()

    def expected(self, seconds: Callable[[], Mapping[str, float]]) -> None:
        """Bars know nothing of one another."""

    def leave_log(self, folder: Path) -> None:
        """What libraries say is on the screen."""


#: Shows nothing, for `reporting`.
SILENT = None

_BARS = Bars()
_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=_BARS)
_Item = TypeVar("_Item")


@contextmanager
def reporting(reporter: Reporter | None) -> Iterator[None]:
    """Tell a reporter of the stages in the block, in place of the one outside.

    Args:
        reporter: Who is told; `SILENT` for nobody.
    """
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def stage(name: str | None, total: float | None = None, unit: str = "step") -> Stage:
    """Begin a stage.

    Args:
        name: What is done, in two or three words; None tells nobody.
        total: The whole amount; None if it is not known.
        unit: What amounts are counted in.
    """
    return Stage(name or "", total, unit, _reporter.get() if name else None)


def tracked(
    items: Iterable[_Item], name: str | None, total: float | None = None
) -> Iterator[_Item]:
    """Go over items in a stage; each one counts as done when the next one is asked for.

    Args:
        items: What to go over.
        name: As of `stage`.
        total: Number of items; None for their length, if they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with stage(name, total) as advance:
        for item in items:
            yield item
            advance()


def each(items: Iterable[_Item], name: Callable[[_Item], str]) -> Iterator[_Item]:
    """Go over items, each in a stage of its own.

    Args:
        items: What to go over.
        name: Gives the name of an item's stage.
    """
    for item in items:
        with stage(name(item)):
            yield item


def expect(seconds: Callable[[], Mapping[str, float]]) -> None:
    """Tell which stages are to come, in running order, and about how long each will take.

    Args:
        seconds: Gives seconds by stage; called only if somebody wants to know. What was expected
            before of stages that it does not name stays.
    """
    reporter = _reporter.get()
    if reporter is not None:
        reporter.expected(seconds)


def leave_log(folder: Path) -> None:
    """Tell that a result's folder is about to be sealed.

    Args:
        folder: Where it is made.
    """
    reporter = _reporter.get()
    if reporter is not None:
        reporter.leave_log(folder)
