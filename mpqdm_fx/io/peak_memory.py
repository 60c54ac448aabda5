"""Peaks of memory, each measured in a process of its own that has imported everything already."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mpqdm_fx.errors import MPQError

__all__ = ["measured_apart", "peak_rise", "tells_peaks"]

_STATUS = Path("/proc/self/status")


def tells_peaks() -> bool:
    """Whether this system tells the peak of a process."""
    return _STATUS.exists()


def measured_apart(module: str, arguments: Sequence[str], what: str) -> int | None:
    """Run a module whose last word on its standard output is a number of bytes.

    Args:
        module: Dotted name, as of `python -m`.
        arguments: What it is given.
        what: What is measured, for messages.

    Returns:
        The bytes; None where the system does not tell (no /proc).

    Raises:
        MPQError: It failed.
    """
    if not tells_peaks():
        return None
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip()[-300:]
        raise MPQError(f"measuring the memory of {what} failed: {reason}")
    return int(result.stdout.split()[-1])


def peak_rise(work: Callable[[], object]) -> int:
    """Bytes by which some work raises the peak of this process above what it takes now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := current
    before = _process_bytes("VmRSS")
    work()
    return max(0, _process_bytes("VmHWM") - before)


def _process_bytes(field: str) -> int:
    """Bytes of this process, by /proc's name of them: now, or at the peak."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0
