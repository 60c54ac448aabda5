"""Sizes and times as people read them."""

__all__ = ["amount", "duration"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def amount(size: float) -> str:
    """Bytes with three digits and a unit: `886 KiB`, `6.65 MiB`.

    Args:
        size: Bytes.
    """
    for unit in _UNITS:
        if size < 999.5 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:,.0f} {unit}"


def duration(seconds: float) -> str:
    """A time with one unit: `45 s`, `12 min` or `3.5 h`.

    Args:
        seconds: The time.
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
