"""Limits of the system, for what it refuses really."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["small_files"]


@contextmanager
def small_files(size: int = 1000) -> Iterator[None]:
    """Files can have so many bytes, also those of programs that are started: as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, before)
