"""The errors a user can meet; every one names the place, the cause and the fix."""

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "ConfigError",
    "DialectError",
    "LoweringError",
    "MPQError",
    "TraceError",
    "first_line",
]


class MPQError(Exception):
    """Base of all errors of this package; the command line prints it as one line."""


class ConfigError(MPQError, ValueError):
    """A setting is out of range, matches nothing, or contradicts another one."""


class TraceError(MPQError, RuntimeError):
    """A model cannot be captured: names the module path, the source line and a suggestion."""


class DialectError(MPQError, ValueError):
    """A graph is not what a pass requires, or not what it promised to leave behind."""


class CalibrationError(MPQError, ValueError):
    """Calibration data or weights cannot be used: NaN, infinity, wrong shapes, no data."""


class ArtifactError(MPQError, ValueError):
    """A saved folder is corrupted, truncated, or written by a newer version."""


class LoweringError(MPQError, RuntimeError):
    """A backend cannot run the quantized graph; says which node or setting and what to change."""


def first_line(error: BaseException) -> str:
    """What an error of a library says first, for a message of one line; at most 300 characters."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
