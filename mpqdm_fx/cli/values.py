"""What is typed for an option, as a value: sizes, times, widths, overrides."""

import math
import re
from typing import Any

import typer

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import MPQConfig

__all__ = ["activation_mode_of", "memory_of", "seconds_of", "settings_of", "whole_bits"]


def whole_bits(text: str) -> int:
    """Whole bits, as typed.

    Raises:
        BadParameter: They are no integer; a number between two is a budget, which it names.
    """
    typed = str(text)
    try:
        return int(typed)
    except ValueError:
        pass
    try:
        average = float(typed)
    except ValueError:
        average = math.nan
    remedy = (
        f"for that average give --effective-bits {typed}" if 1 <= average <= 32 else "give 1 to 8"
    )
    raise typer.BadParameter(f"{typed}: a weight has whole bits; {remedy}")


_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}


def memory_of(text: str | None) -> int | None:
    """Bytes of a text like `4GiB`, `500 MB` or `1000000`.

    Raises:
        ConfigError: It is no such text.
    """
    if text is None:
        return None
    number, unit = text.strip().upper(), 1
    for suffix, size in _UNITS.items():
        if number.endswith(suffix):
            number, unit = number[: -len(suffix)].strip(), size
            break
    try:
        value = int(float(number) * unit)
    except (ValueError, OverflowError):  # no number, or an infinite one
        value = 0
    if not 0 < value < 2**63:
        raise ConfigError(f"--max-memory {text!r}: write a size such as 4GiB, 500MB or 1000000")
    return value


def seconds_of(text: str | None) -> float | None:
    """Seconds of a text like `90s`, `5m`, `1.5h` or `300`.

    Raises:
        ConfigError: It is no such text.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smh]?)\s*", text.lower())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--budget {text!r}: write a time such as 90s, 5m or 1.5h")
    return seconds


def activation_mode_of(text: str, *, backend: str, activations: int) -> str:
    """The mode that `auto` stands for, or `text` as it is.

    Ranges computed at run time cost nothing in calibration and measured 5 dB better on the bundled
    model at 8 bits. XNNPACK and lowbit have kernels for them, and torch.ao's convolutions none.
    """
    if text != "auto":
        return text
    dynamic = backend == "lowbit" or (backend == "xnnpack" and activations == 8)
    return "dynamic" if dynamic else "static"


def settings_of(*, overrides: list[str] | None = None, **settings: Any) -> MPQConfig:
    """Settings from what was typed.

    Raises:
        ConfigError: A word or number is out of range.
    """
    if "propagation" in settings:
        settings["propagation"] = _strength_of(settings["propagation"])  # MPQConfig checks it
    return MPQConfig(overrides=[_override_of(text) for text in overrides or ()], **settings)


def _strength_of(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_WIDTHS = re.compile(r"(?:W?([1-8]))?(?:A([1-8]))?")


def _override_of(text: str) -> dict[str, Any]:
    pattern, _, value = text.rpartition("=")
    if pattern and value.lower() == "float":
        return {"pattern": pattern, "skip": True}
    match = _WIDTHS.fullmatch(value.upper())
    if pattern and value and match:
        widths = zip(("weight_bits", "activation_bits"), match.groups(), strict=True)
        return {"pattern": pattern, **{name: int(bits) for name, bits in widths if bits}}
    raise ConfigError(
        f"--override {text!r}: write PATTERN=BITS (1 to 8), PATTERN=A8 or PATTERN=W4A8 for "
        f"activations, or PATTERN=float"
    )
