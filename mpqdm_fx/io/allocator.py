"""How the C library keeps memory that was freed."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

__all__ = ["large_blocks_returned"]

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
_BLOCK = 1 << 20
_LARGEST = 32 << 20  # that glibc's own rule arrives at


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
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.malloc_trim(0)


def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # TypeError: Windows has no such handle
        return None
