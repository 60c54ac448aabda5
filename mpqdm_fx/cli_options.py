"""Options that several commands share, and how they become settings."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ConfigError

__all__ = [
    "ActivationModeOption",
    "ActivationsOption",
    "AllocationOption",
    "BytesOption",
    "EffectiveOption",
    "LevelsOption",
    "MemoryOption",
    "OverrideOption",
    "PropagationOption",
    "RefinementsOption",
    "RoundingOption",
    "SensitivityOption",
    "StepsOption",
    "TrajectoriesOption",
    "WeightsOption",
    "activation_mode_of",
    "memory_of",
    "settings_of",
]

WeightsOption = Annotated[int, typer.Option(help="Average bits of a weight, 1 to 8.")]
ActivationsOption = Annotated[int, typer.Option(help="Bits of activations, 1 to 8.")]
AllocationOption = Annotated[str, typer.Option(help="measured, uniform or omq.")]
EffectiveOption = Annotated[
    float | None, typer.Option(help="Budget in stored bits over all weights, for `measured`.")
]
BytesOption = Annotated[
    int | None, typer.Option("--weight-bytes", help="The same budget in bytes.")
]
LevelsOption = Annotated[str, typer.Option(help="codebook, uniform or int4.")]
RoundingOption = Annotated[str, typer.Option(help="gptq or nearest.")]
RefinementsOption = Annotated[int, typer.Option(help="Rounds of coordinate descent after GPTQ.")]
PropagationOption = Annotated[
    str, typer.Option(help="Strength of error propagation: auto, or 0 to 1 (the paper's: 0.5).")
]
ActivationModeOption = Annotated[
    str,
    typer.Option(
        help="auto (dynamic on xnnpack, else static), static, timestep (ranges by noise level), "
        "dynamic or float."
    ),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(help="PATTERN=BITS or PATTERN=float for single layers; later ones win."),
]
TrajectoriesOption = Annotated[int, typer.Option(min=1, help="Denoising runs to calibrate on.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps of each run.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="Most memory for activations, for example 4GiB; the rest goes to disk."),
]
OutputOption = Annotated[Path, typer.Option(help="Folder to write.")]

SensitivityOption = Annotated[
    Path | None,
    typer.Option(help="File that keeps what `measured` measures, for runs with other budgets."),
]

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
    except ValueError:
        value = 0
    if value <= 0:
        raise ConfigError(f"--max-memory {text!r}: write a size such as 4GiB, 500MB or 1000000")
    return value


def activation_mode_of(text: str, *, backend: str, activations: int) -> str:
    """The mode that `auto` stands for, or `text` as it is.

    Ranges computed at run time cost nothing in calibration and measured 5 dB better on the bundled
    model at 8 bits; XNNPACK has kernels for them, torch.ao's convolutions have none.
    """
    if text != "auto":
        return text
    return "dynamic" if backend == "xnnpack" and activations == 8 else "static"


def settings_of(*, override: list[str] | None, propagation: str, **settings: Any) -> MPQConfig:
    """Settings from what was typed.

    Raises:
        ConfigError: A word or number is out of range.
    """
    return MPQConfig(
        overrides=[_override_of(text) for text in override or ()],
        propagation=_strength_of(propagation),  # type: ignore[arg-type]  # MPQConfig checks it
        **settings,
    )


def _strength_of(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _override_of(text: str) -> dict[str, Any]:
    pattern, _, value = text.rpartition("=")
    if pattern and value == "float":
        return {"pattern": pattern, "skip": True}
    if pattern and value.isdigit():
        return {"pattern": pattern, "weight_bits": int(value)}
    raise ConfigError(f"--override {text!r}: write PATTERN=BITS (1 to 8) or PATTERN=float")
