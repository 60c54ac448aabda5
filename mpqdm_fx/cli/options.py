"""Options that several commands share, and how they become settings."""

import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ConfigError

__all__ = [
    "DEFAULTS",
    "CompressOption",
    "DeviceOption",
    "ExternalWeightsOption",
    "FloatModelOption",
    "FolderArgument",
    "FolderOrModelArgument",
    "FourBitOption",
    "HeldOutOption",
    "InputsOption",
    "JsonOption",
    "MemoryOption",
    "ModelArgument",
    "OutputOption",
    "OverwriteOption",
    "ResumeOption",
    "SamplerStepsOption",
    "SamplesOption",
    "SeedOption",
    "SensitivityOption",
    "StepsOption",
    "SubfolderOption",
    "TrajectoriesOption",
    "VariantOption",
    "activation_mode_of",
    "console",
    "memory_of",
    "seconds_of",
    "settings_of",
    "takes_settings",
]

#: Stands for the settings in a command's signature; see `takes_settings`.
DEFAULTS = MPQConfig()

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder written by `mpqdm-fx quantize`.")
]
FloatModelOption = Annotated[
    str | None, typer.Option(help="The float model, if it is no longer where it was.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`digits`, a diffusers model folder, a pipeline folder with --subfolder unet, or a "
        "function that returns a module: module:function, path/to/file.py:function.",
    ),
]
FolderOrModelArgument = Annotated[
    str, typer.Argument(metavar="DIR|MODEL", help="Folder of `quantize`, or a float model.")
]
SubfolderOption = Annotated[
    str | None, typer.Option(help="Part of a pipeline folder, for example `unet`.")
]
VariantOption = Annotated[
    str | None, typer.Option(help="Variant of the weight files, for example fp16.")
]
InputsOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Function that yields calls, dicts of the model's arguments, in place of denoising "
        "runs; path/to/file.py:function for one of a file.",
    ),
]
HeldOutOption = Annotated[
    int | None,
    typer.Option(min=0, help="Calls of --inputs at the end that judge corrections. Default: 1/4."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the result that is there; other files never are."),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
PromptsOption = Annotated[
    Path | None,
    typer.Option(help="File of prompts to calibrate on, one a line. Default: 64 built-in ones."),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Guidance scale of the runs; up to 1 is none. Default: the pipeline's or folder's.",
    ),
]
TrajectoriesOption = Annotated[int, typer.Option(min=1, help="Denoising runs to calibrate on.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps of each run.")]
SamplerStepsOption = Annotated[int, typer.Option(min=1, help="Steps of the scheduler.")]
SamplesOption = Annotated[int, typer.Option(min=0, help="Images in the grid.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="Most memory for activations, for example 4GiB; the rest goes to disk."),
]
DeviceOption = Annotated[str | None, typer.Option(help="Where to solve, for example cuda.")]
OutputOption = Annotated[Path, typer.Option(help="Folder to write.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
SensitivityOption = Annotated[
    Path | None,
    typer.Option(help="File that keeps what `measured` measures, for runs with other budgets."),
]
FourBitOption = Annotated[
    str,
    typer.Option(
        help="Weights that a program stores at four bits: never; whole (those of layers that "
        "fit); split (also parts of other layers: fewer bytes, more time)."
    ),
]
ExternalWeightsOption = Annotated[
    bool, typer.Option("--external-weights", help="Programs' weights in files of their own, .ptd.")
]
CompressOption = Annotated[
    bool,
    typer.Option("--compress", help="Programs as .xz, which are expanded when they are first run."),
]

_Option = tuple[str, Any, Any]


def console() -> Console:
    """Where results are printed."""
    # A pipe has no width of its own; 130 columns hold the longest layer names.
    return Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 130)


#: By name of the option: the setting that it becomes, type and help, default.
_SETTINGS: Mapping[str, _Option] = {
    "weights": (
        "weight_bits",
        Annotated[
            int,
            typer.Option(help="Average bits of a weight, 1 to 8; or --effective-bits."),
        ],
        4,
    ),
    "activations": (
        "activation_bits",
        Annotated[int, typer.Option(help="Bits of activations, 1 to 8.")],
        DEFAULTS.activation_bits,
    ),
    "activation_mode": (
        "activation_mode",
        Annotated[
            str,
            typer.Option(
                help="auto (dynamic on xnnpack, else static), measured (dynamic or static for each "
                "input), static, timestep (ranges by noise level), dynamic or float."
            ),
        ],
        "auto",
    ),
    "slowdown": (
        "slowdown",
        Annotated[
            float,
            typer.Option(
                help="How much longer a program may take for inputs that stay in float: 1.1 for a "
                "tenth, 1 for none."
            ),
        ],
        DEFAULTS.slowdown,
    ),
    "allocation": (
        "allocation",
        Annotated[str, typer.Option(help="measured, uniform or omq.")],
        DEFAULTS.allocation,
    ),
    "effective_bits": (
        "effective_bits",
        Annotated[
            float | None,
            typer.Option(help="Budget in stored bits over all weights, for `measured`."),
        ],
        None,
    ),
    "weight_bytes": (
        "weight_bytes",
        Annotated[int | None, typer.Option(help="The same budget in bytes.")],
        None,
    ),
    "levels": (
        "levels",
        Annotated[str, typer.Option(help="uniform, codebook or int4.")],
        DEFAULTS.levels,
    ),
    "rounding": (
        "rounding",
        Annotated[str, typer.Option(help="gptq or nearest.")],
        DEFAULTS.rounding,
    ),
    "refinements": (
        "refinements",
        Annotated[int, typer.Option(help="Rounds of coordinate descent after GPTQ.")],
        DEFAULTS.refinements,
    ),
    "propagation": (
        "propagation",
        Annotated[
            str,
            typer.Option(help="Strength of error propagation: auto, or 0 to 1 (the paper's: 0.5)."),
        ],
        str(DEFAULTS.propagation),
    ),
    "noise_argument": (
        "noise_argument",
        Annotated[
            str | None,
            typer.Option(help="The model's argument that tells noise levels. Default: found."),
        ],
        None,
    ),
    "override": (
        "override",
        Annotated[
            list[str] | None,
            typer.Option(
                help="PATTERN=BITS, PATTERN=W4A8, PATTERN=A8 or PATTERN=float for single layers; "
                "later ones win."
            ),
        ],
        None,
    ),
    "seed": ("seed", SeedOption, 0),
}

_Command = Callable[..., None]


def takes_settings(
    *, without: Collection[str] = (), **defaults: Any
) -> Callable[[_Command], _Command]:
    """Give a command the options of the settings, in the place of its argument `config`.

    typer reads options off a function's signature, so the result has one: the command's, with the
    options where `config` stands. Commands without an option `backend` are for XNNPACK.

    Args:
        without: Options that the command does not have.
        **defaults: Defaults of options that differ from the usual ones.

    Raises:
        ConfigError: From the command, when a word or a number that was typed is out of range.
    """
    options = {name: entry for name, entry in _SETTINGS.items() if name not in without}

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            typed = {options[name][0]: given.pop(name) for name in options}
            typed["activation_mode"] = activation_mode_of(
                typed["activation_mode"],
                backend=given.get("backend", "xnnpack"),
                activations=typed["activation_bits"],
            )
            command(**given, config=settings_of(**typed))

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name != "config":
                parameters.append(parameter)
                continue
            parameters += [
                inspect.Parameter(
                    name, parameter.kind, default=defaults.get(name, default), annotation=kind
                )
                for name, (_, kind, default) in options.items()
            ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
        return run

    return decorate


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
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smh]?)\s*", text.lower())
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--budget {text!r}: write a time such as 90s, 5m or 1.5h")
    return seconds


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


_WIDTHS = re.compile(r"(?:W?(\d))?(?:A(\d))?")


def _override_of(text: str) -> dict[str, Any]:
    pattern, _, value = text.rpartition("=")
    if pattern and value == "float":
        return {"pattern": pattern, "skip": True}
    found = _WIDTHS.fullmatch(value)
    if pattern and value and found:
        widths = zip(("weight_bits", "activation_bits"), found.groups(), strict=True)
        return {"pattern": pattern, **{name: int(bits) for name, bits in widths if bits}}
    raise ConfigError(
        f"--override {text!r}: write PATTERN=BITS (1 to 8), PATTERN=A8 or PATTERN=W4A8 for "
        f"activations, or PATTERN=float"
    )
