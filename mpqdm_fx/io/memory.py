"""How much memory this process may still take."""

from contextlib import suppress
from pathlib import Path

__all__ = ["available_memory"]

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that the machine, or the container, has left; None where the system does not tell."""
    told = (_of_machine(), _of_container())
    return min((left for left in told if left is not None), default=None)


def _of_machine() -> int | None:
    with suppress(OSError):
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1])
    return None


def _of_container() -> int | None:
    """By cgroup v2; pages of files do not count, which the system takes back."""
    with suppress(OSError, ValueError):  # ValueError: the limit is the word "max"
        limit = int((_GROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("file "):
                used -= int(line.split()[1])
        return max(0, limit - used)
    return None
