"""Where a run stands: which stage of how many, and how long the whole will take."""

import time
from collections.abc import Callable, Mapping

from mpqdm_fx.io.progress import Stage

__all__ = ["Course", "clock"]

_PRIOR = 0.03  # share of the whole, as it was expected, that counts beside what was measured
_TRUSTED = 0.25  # share of a stage from which on its own rate alone foretells its end


class Course:
    """The stages of a run, as they come, against what they were expected to take.

    Expected times go wrong together, by the speed of the machine, so what has passed corrects what
    is to come. Stages that were expected and do not come are passed over.

    Args:
        now: Gives the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start = now()
        self._expected: dict[str, float] = {}
        self._place = -1  # of the stage that runs or ran last, among those that are expected
        self._open: list[tuple[Stage, float]] = []
        self._inner: Course | None = None  # of the stage that runs, if it expects stages inside
        self._measured = 0.0  # seconds of finished stages, and what they were expected to take
        self._foretold = 0.0
        self._done: set[str] = set()  # names of stages that were over once; they may go on
        self._sure = False
        self._last = ""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Expect stages, or expect other times of some.

        Args:
            seconds: By stage, in running order; a second time, of stages that are expected already.
                Names that are not expected are those of stages inside the one that runs.
        """
        if self._open and self._expected and self._expected.keys().isdisjoint(seconds):
            self._inner = self._inner or Course(self._now)
            self._inner.expect(seconds)
            return
        if not self._expected:
            self._expected = dict(seconds)
            return
        pace = self._pace()
        self._expected = {
            name: seconds.get(name, pace * expected) for name, expected in self._expected.items()
        }
        self._measured = self._foretold = 0.0
        self._sure = True

    def begin(self, stage: Stage) -> bool:
        """A stage begins; return whether it is a new one of the run's own.

        One inside another is not, nor one that goes on under the name of the last.
        """
        self._open.append((stage, self._now()))
        outermost = len(self._open) == 1
        if self._inner is not None:
            self._inner.begin(stage)
        if outermost and stage.name in self._expected:
            self._place = list(self._expected).index(stage.name)
        return outermost and stage.name != self._last

    def end(self, stage: Stage) -> None:
        """A stage is over."""
        started = next(begun for running, begun in self._open if running is stage)
        self._open = [entry for entry in self._open if entry[0] is not stage]
        self._last = stage.name if not self._open else self._last
        if self._inner is not None and self._open:
            self._inner.end(stage)
        elif not self._open:
            self._inner = None
        if not self._open and stage.name in self._expected:
            self._measured += self._now() - started
            self._foretold += self._expectation(stage)
            self._done.add(stage.name)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return self._now() - self._start

    @property
    def total(self) -> float | None:
        """Seconds that the whole run will take; None as long as nothing is known."""
        passed, _ = self._passed()
        whole = self._whole()
        if not whole or not (self._sure or passed > _PRIOR * whole):
            return None
        pace = self._pace()
        to_come = list(self._expected.values())[self._place + 1 :]
        return self.seconds + self._left(pace) + pace * sum(to_come)

    def _expectation(self, stage: Stage) -> float:
        """What a stage was expected to take; nothing more where it goes on under its name."""
        return 0.0 if stage.name in self._done else self._expected.get(stage.name, 0.0)

    def _whole(self) -> float:
        """What all stages were expected to take that came or may still come."""
        running = [self._expectation(stage) for stage, _ in self._open[:1]]
        to_come = list(self._expected.values())[self._place + 1 :]
        return self._foretold + sum(running) + sum(to_come)

    def _left(self, pace: float) -> float:
        """Seconds to the end of the stage that runs."""
        if not self._open:
            return 0.0
        stage, begun = self._open[0]
        elapsed, expected = self._now() - begun, pace * self._expectation(stage)
        if (left := self._left_inside()) is not None:
            return left
        share = _share(stage)
        if share is None:
            return max(expected - elapsed, 0.1 * elapsed)
        trust = min(1.0, share / _TRUSTED)
        projection = elapsed / share if share else 0.0
        return (1 - share) * (trust * projection + (1 - trust) * expected)

    def _left_inside(self) -> float | None:
        """Seconds to the end of the stages inside the one that runs; None if nobody knows."""
        total = None if self._inner is None else self._inner.total
        return None if self._inner is None or total is None else total - self._inner.seconds

    def _passed(self) -> tuple[float, float]:
        """Seconds that stages, and what is known of the one that runs, were to take, and took."""
        foretold, measured = self._foretold, self._measured
        if self._open:
            stage, begun = self._open[0]
            elapsed, share = self._now() - begun, _share(stage)
            if (left := self._left_inside()) is not None:
                elapsed, share = elapsed + left, 1.0  # what it will take is known better
            if share:
                foretold += share * self._expectation(stage)
                measured += elapsed
        return foretold, measured

    def _pace(self) -> float:
        foretold, measured = self._passed()
        prior = _PRIOR * self._whole()
        return (measured + prior) / (foretold + prior) if foretold + prior else 1.0

    def __str__(self) -> str:
        """The line: `[4/9] rounding 62 % · 3:10 of about 12:40`."""
        number = f"[{self._place + 1}/{len(self._expected)}] " if self._place >= 0 else ""
        return f"{number}{self.label} · {self.times}"

    @property
    def begun(self) -> str:
        """The stage that begins, for a log: `[4/9] rounding, after 0:48 of about 12:40`."""
        number = f"[{self._place + 1}/{len(self._expected)}] " if self._place >= 0 else ""
        return f"{number}{self._open[0][0].name}, after {self.times}"

    @property
    def label(self) -> str:
        """What is done at the moment, from the outside in, and how far that is."""
        if not self._open:
            return self._last or "loading"
        names = list(dict.fromkeys(stage.name for stage, _ in self._open))
        stage = self._open[-1][0]
        share = _share(stage)
        note = f": {stage.note}" if stage.note else ""
        return ": ".join(names) + ("" if share is None else f" {int(100 * share)} %") + note

    @property
    def times(self) -> str:
        """How long it has taken, and about how long it will in all."""
        total = self.total
        return clock(self.seconds) + ("" if total is None else f" of about {clock(total)}")


def _share(stage: Stage) -> float | None:
    """How much of a stage is done."""
    return min(1.0, stage.done / stage.total) if stage.total else None


def clock(seconds: float) -> str:
    """A time as `3:10` or `1:03:10`."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
