"""Signals that stop a command: the first one unwinds the run, another one ends it at once."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpqdm_fx.cli.streams import errors

__all__ = ["Stopped", "stoppable"]

#: Ctrl-C, `kill` and the end of a batch job, and a closed terminal (which Windows does not have).
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
#: The same stop arrives twice where a parent passes on what the terminal told us too (torchrun).
_ECHO_SECONDS = 1.0
_PATIENCE_SECONDS = 3.0
_AGAIN_SECONDS = 0.05


class Stopped(BaseException):
    """A signal asked for the end.

    No `Exception`, so that no handler of errors takes it; and no `KeyboardInterrupt`, which typer
    turns into an exit without a word.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status that shells give to a process that this signal ended."""
        return 128 + self.number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the block on SIGINT, SIGTERM or SIGHUP; restore all handlers behind it.

    `finally` blocks run then: temporary folders go. Python delivers a signal between two
    instructions, so a long operation of torch ends first; a second signal, a second later or more,
    ends the process at once, since a thread reads it. A signal that is ignored (`nohup`, jobs in
    the background) stays ignored. In other threads than the main one nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    stop = _Stop()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=_watch, args=(reading, set(handled)), daemon=True)
    watcher.start()
    hook = sys.unraisablehook
    old_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    old_handlers = {number: signal.signal(number, stop.handle) for number in handled}
    sys.unraisablehook = lambda lost: stop.repeat() if _is_stop(lost) else hook(lost)
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if stop.number is None:
            raise
        raise Stopped(stop.number) from error  # what broke on the way out is not the cause
    finally:
        stop.over = True
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        signal.set_wakeup_fd(old_descriptor)
        os.close(writing)
        watcher.join()
        os.close(reading)


class _Stop:
    """Whether the end was asked for; raises once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.over = False

    def handle(self, number: int, _: Any) -> None:
        if self.number is None and not self.over:
            self.number = number
            raise Stopped(number)

    def repeat(self) -> None:
        """Raise again in a moment: a finalizer or a callback swallowed the exception."""
        number, self.number = self.number, None
        main = threading.main_thread().ident
        if number is not None and main is not None:
            threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main, number)).start()


def _is_stop(lost: Any) -> bool:
    return isinstance(lost.exc_value, Stopped)


def _watch(descriptor: int, handled: set[int]) -> None:
    """Read signals as they arrive; Python's handlers wait for the main thread."""
    first: float | None = None
    warned = False
    while True:
        waiting = first is not None and not warned
        if not select.select([descriptor], [], [], _PATIENCE_SECONDS if waiting else None)[0]:
            warned = True
            errors().write("stopping after the step that runs now; Ctrl-C again ends it at once\n")
            continue
        number = os.read(descriptor, 1)
        if not number:
            return
        if number[0] not in handled:
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > _ECHO_SECONDS:
            os._exit(128 + number[0])
