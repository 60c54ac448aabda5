"""Numbers as a page tells them."""

import math
from collections.abc import Sequence

__all__ = [
    "NONE",
    "TIMES",
    "bits_text",
    "bytes_text",
    "db_text",
    "ratio_text",
    "shape_text",
    "share_text",
    "size_text",
    "times_text",
]

TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EN DASH}"
"""Stands where there is no number."""


def bytes_text(size: float) -> str:
    """Bytes in the largest decimal unit that leaves a number above one."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.{2 if size < 10 * factor else 1}f} {unit}"
    return f"{size:.0f} B"


def db_text(value: float | None) -> str:
    """Decibels; `exact` for an infinite ratio, nothing for none."""
    if value is None:
        return ""
    if math.isinf(value) and value > 0:
        return "exact"
    return f"{value:.1f}"


def ratio_text(value: float | None) -> str:
    """Decibels with their unit; `exact` for an infinite ratio."""
    if value is None:
        return "not known"
    return db_text(value) if value == math.inf else f"{db_text(value)} dB"


def bits_text(bits: float) -> str:
    """Average bits."""
    return f"{bits:.2f}".rstrip("0").rstrip(".")


def share_text(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def times_text(ratio: float) -> str:
    """How many times."""
    return f"{ratio:.1f}{TIMES}" if ratio < 10 else f"{ratio:.0f}{TIMES}"


def size_text(size: float, whole: float) -> str:
    """A size against that of the float model: how many times smaller, or larger, it is."""
    if size > whole:
        return f"{times_text(size / whole)} larger than float32" if whole else ""
    return f"{times_text(whole / size)} smaller than float32" if size else ""


def shape_text(shape: Sequence[int]) -> str:
    """A shape."""
    return TIMES.join(map(str, shape))
