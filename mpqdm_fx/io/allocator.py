"""How the C library keeps memory that was freed."""

import contextlib
import ctypes
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

__all__ = ["freed_memory_kept", "large_blocks_returned"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of mallopt(3)
_BLOCK = 1 << 20
_LARGEST = 32 << 20  # that glibc's own rule arrives at
_KEPT = 256 << 20  # bytes at the end of the heap; that rule arrives at 64 MiB
_returned = ContextVar("returned", default=False)


@contextlib.contextmanager
def large_blocks_returned(wanted: bool = True) -> Iterator[None]:
    """Give blocks of a MiB and more back to the system as soon as they are freed.

    By its own rule glibc keeps blocks of up to 32 MiB for later. Where float layers are made and
    dropped between integers that stay, what is kept has holes that fit nothing: a T5 encoder of 187
    M parameters ended with 1.4 times its float32 bytes for 0.25 that were in use.

    Args:
        wanted: Do nothing otherwise; nothing is done either where the C library is another.
    """
    library = _glibc() if wanted else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _BLOCK)
    before = _returned.set(True)
    try:
        yield
    finally:
        _returned.reset(before)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.malloc_trim(0)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep memory that was freed for what is computed next; give it back at the end.

    Also a decorator: `@freed_memory_kept()`. Layer after layer takes and frees tensors of some MiB,
    and by its own rule glibc gives them to the system in between: every page is zeroed again, for a
    tenth of the seconds. Blocks of more than 32 MiB go back as ever. Nothing is done where the C
    library is another, and in `large_blocks_returned`, which has to save memory.
    """
    library = None if _returned.get() else _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        library.malloc_trim(0)


def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # TypeError: Windows has no such handle
        return None
