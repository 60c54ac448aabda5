"""Options that several commands share, and how they become settings."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mpqdm_fx.backends.names import Backend, Cpu, FourBit, Kernels
from mpqdm_fx.cli import streams
from mpqdm_fx.cli.checks import is_result
from mpqdm_fx.cli.panels import BITS, CALIBRATION, MODEL, PROGRAM, RUN
from mpqdm_fx.cli.recipes import PresetOption, RecipeOption, preset_values, with_typed
from mpqdm_fx.cli.settings import SETTINGS, SeedOption
from mpqdm_fx.cli.values import activation_mode_of, memory_of, seconds_of, settings_of
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import MPQConfig

__all__ = [
    "BITS",
    "CALIBRATION",
    "DEFAULTS",
    "MODEL",
    "PROGRAM",
    "RUN",
    "BackendOption",
    "CompressOption",
    "CpuOption",
    "DeviceOption",
    "ExternalWeightsOption",
    "FloatModelOption",
    "FolderArgument",
    "FolderOrModelArgument",
    "FourBitOption",
    "HeldOutOption",
    "InputsOption",
    "JsonOption",
    "KernelsOption",
    "MemoryOption",
    "ModelArgument",
    "OutputOption",
    "OverwriteFileOption",
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
    Path,
    typer.Argument(metavar="DIR", help="Folder written by `mpqdm-fx quantize`."),
]
FloatModelOption = Annotated[
    str | None,
    typer.Option(help="The float model, if it is no longer where it was.", rich_help_panel=MODEL),
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
    str,
    typer.Argument(metavar="DIR|MODEL", help="Folder of `quantize`, or a float model."),
]
SubfolderOption = Annotated[
    str | None,
    typer.Option(help="Part of a pipeline folder, for example `unet`.", rich_help_panel=MODEL),
]
VariantOption = Annotated[
    str | None,
    typer.Option(help="Variant of the weight files, for example fp16.", rich_help_panel=MODEL),
]
InputsOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Function that yields calls, dicts of the model's arguments, in place of denoising "
        "runs; path/to/file.py:function for one of a file.",
        rich_help_panel=CALIBRATION,
    ),
]
HeldOutOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Calls of --inputs at the end that judge corrections. Default: 1/4.",
        rich_help_panel=CALIBRATION,
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace the result that is there; other files never are.",
        rich_help_panel=RUN,
    ),
]
TrajectoriesOption = Annotated[
    int,
    typer.Option(min=1, help="Denoising runs to calibrate on.", rich_help_panel=CALIBRATION),
]
StepsOption = Annotated[
    int, typer.Option(min=1, help="Steps of each run.", rich_help_panel=CALIBRATION)
]
OverwriteFileOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the file that is there.", rich_help_panel=RUN),
]
SamplerStepsOption = Annotated[
    int, typer.Option(min=1, help="Steps of the scheduler.", rich_help_panel=RUN)
]
SamplesOption = Annotated[int, typer.Option(min=0, help="Images in the grid.", rich_help_panel=RUN)]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with a run that was killed.", rich_help_panel=RUN)
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="File of prompts to calibrate on, one a line. Default: 64 built-in ones.",
        rich_help_panel=CALIBRATION,
    ),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Guidance scale of the runs; up to 1 is none. Default: the pipeline's or folder's.",
        rich_help_panel=CALIBRATION,
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Most memory for activations, for example 4GiB; the rest goes to disk.",
        rich_help_panel=RUN,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to solve, for example cuda.", rich_help_panel=RUN)
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=RUN)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of text.", rich_help_panel=RUN)
]
SensitivityOption = Annotated[
    Path | None,
    typer.Option(
        help="File that keeps what `measured` measures, for runs with other budgets.",
        rich_help_panel=CALIBRATION,
    ),
]
BackendOption = Annotated[
    Backend,
    typer.Option(
        case_sensitive=False,
        help="What is made: a program for phones (xnnpack; lowbit: with own kernels for weights "
        "below 8 bits), torch.ao's operators, or packed weights alone.",
        rich_help_panel=PROGRAM,
    ),
]
FourBitOption = Annotated[
    FourBit,
    typer.Option(
        case_sensitive=False,
        help="Weights that a program stores at four bits: never; whole (those of layers that "
        "fit); split (also parts of other layers: fewer bytes, more time).",
        rich_help_panel=PROGRAM,
    ),
]
KernelsOption = Annotated[
    Kernels,
    typer.Option(
        case_sensitive=False,
        help="Layers that own kernels run, for lowbit: auto (those that are faster there); memory "
        "(all that fit, for least memory); xnnpack (none).",
        rich_help_panel=PROGRAM,
    ),
]
CpuOption = Annotated[
    Cpu,
    typer.Option(
        case_sensitive=False,
        help="Class of CPUs that --kernels auto chooses for: avx2, vnni (AVX-VNNI or AVX512-VNNI) "
        "or dotprod (ARM's).",
        rich_help_panel=PROGRAM,
    ),
]
ExternalWeightsOption = Annotated[
    bool,
    typer.Option(
        "--external-weights",
        help="Programs' weights in files of their own, .ptd.",
        rich_help_panel=PROGRAM,
    ),
]
CompressOption = Annotated[
    bool,
    typer.Option(
        "--compress",
        help="Programs as .xz, which are expanded when they are first run.",
        rich_help_panel=PROGRAM,
    ),
]

_ENDLESS = 100_000  # columns
#: Options beside the settings that tell how to quantize, or judge what was.
_QUANTIZING = (
    "sensitivity", "device", "max_memory", "trajectories", "minimum_sqnr", "encoder_bits",
)  # fmt: skip


def console() -> Console:
    """Where results are printed; the line of progress goes before the first of them.

    A pipe has no width: nothing is folded there, unless COLUMNS says how wide it is.
    """
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _ENDLESS
    return Console(file=streams.results(), width=wide, quiet=not streams.prints_results())


_Command = Callable[..., None]


def takes_settings(
    *, without: Collection[str] = (), of_models: Collection[str] | None = None, **defaults: Any
) -> Callable[[_Command], _Command]:
    """Give a command the options of the settings, in the place of its argument `config`.

    typer reads options off a function's signature, so the result has one: the command's, with the
    options where `config` stands. Commands without an option `backend` are for XNNPACK.

    Args:
        without: Options that the command does not have.
        of_models: Options, beside the settings, that have no meaning where MODEL is a folder of
            `quantize`; None where it cannot be one.
        **defaults: Defaults of options that differ from the usual ones.

    Raises:
        ConfigError: From the command, when a word or a number that was typed is out of range.
    """
    options = {name: entry for name, entry in SETTINGS.items() if name not in without}

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def run(context: typer.Context, **given: Any) -> None:
            preset, recipe = given.pop("preset"), given.pop("recipe")
            typed = {name for name in given if _is_typed(context, name)}
            recipes = {"preset": preset, "config": recipe}
            settling = [name for name in recipes if recipes[name] is not None]
            settling += [name for name in options if name in typed]
            if of_models is not None and is_result(given["model"]):
                _refuse_beside_result(
                    given["model"], settling + [name for name in of_models if name in typed]
                )
            if given.get("in_float"):
                _refuse_beside_float(settling + [name for name in _QUANTIZING if name in typed])
            if preset is not None:
                if recipe is not None:
                    raise ConfigError("--preset and --config: give one of the two")
                given |= preset_values(preset, given, typed)
            values = {options[name][0]: given.pop(name) for name in options}
            values["activation_mode"] = activation_mode_of(
                values["activation_mode"],
                backend=given.get("backend") or "xnnpack",
                activations=values["activation_bits"],
            )
            settings = settings_of(**values)
            if recipe is not None:
                fields = {options[name][0] for name in typed & options.keys()}
                settings = with_typed(recipe, settings, fields)
            command(**given, config=settings)

        parameters = [
            inspect.Parameter(
                "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
            )
        ]
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name != "config":
                parameters.append(parameter)
                continue
            parameters += [
                inspect.Parameter(name, parameter.kind, default=None, annotation=kind)
                for name, kind in {"preset": PresetOption, "recipe": RecipeOption}.items()
            ]
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


def _refuse_beside_float(names: Sequence[str]) -> None:
    """Refuse settings of what is not to be quantized."""
    if names:
        option = names[0].replace("_", "-")
        raise ConfigError(
            f"--float and --{option}: nothing is quantized with --float; leave one of the two out"
        )


def _refuse_beside_result(folder: str, names: Sequence[str]) -> None:
    """Refuse what chooses a float model, or settings, beside a folder that has its own."""
    if names:
        option = {"in_float": "float"}.get(names[0], names[0]).replace("_", "-")
        raise ConfigError(
            f"--{option}: {folder} was written by mpqdm-fx quantize, and its own program is "
            f"judged; leave the option out, or give the float model"
        )


def _is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, and is no default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
