"""The settings of a run as options: one table from what is typed to `MPQConfig`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from mpqdm_fx.cli.panels import BITS, CALIBRATION, RUN
from mpqdm_fx.cli.values import whole_bits
from mpqdm_fx.records.config import (
    ActivationAllocation,
    ActivationLevels,
    ActivationMode,
    Allocation,
    Levels,
    MPQConfig,
    Rounding,
    WeightStorage,
)

__all__ = ["SETTINGS", "SeedOption"]

_DEFAULTS = MPQConfig()

SeedOption = Annotated[
    int, typer.Option(min=0, help="Seed of everything that is drawn.", rich_help_panel=RUN)
]
_Option = tuple[str, Any, Any]

#: `auto` stands for one of the modes; see `activation_mode_of`.
TypedMode = Literal["auto", ActivationMode]


#: By name of the option: the setting that it becomes, type and help, default.
SETTINGS: Mapping[str, _Option] = {
    "weights": (
        "weight_bits",
        Annotated[
            int,
            typer.Option(
                parser=whole_bits,
                metavar="BITS",
                help="Average bits of a weight, 1 to 8; or --effective-bits.",
                rich_help_panel=BITS,
            ),
        ],
        4,
    ),
    "activations": (
        "activation_bits",
        Annotated[
            int,
            typer.Option(metavar="BITS", help="Bits of activations, 1 to 8.", rich_help_panel=BITS),
        ],
        _DEFAULTS.activation_bits,
    ),
    "activation_mode": (
        "activation_mode",
        Annotated[
            TypedMode,
            typer.Option(
                case_sensitive=False,
                help="auto (dynamic in programs, else static), measured (dynamic or static for "
                "each input), static, timestep (ranges by noise level), dynamic or float.",
                rich_help_panel=BITS,
            ),
        ],
        "auto",
    ),
    "activation_allocation": (
        "activation_allocation",
        Annotated[
            ActivationAllocation,
            typer.Option(
                case_sensitive=False,
                help="Below 8 bits: a width for each input by measured cost, all alike, or auto: "
                "measured up to 4 bits.",
                rich_help_panel=BITS,
            ),
        ],
        _DEFAULTS.activation_allocation,
    ),
    "activation_levels": (
        "activation_levels",
        Annotated[
            ActivationLevels,
            typer.Option(
                case_sensitive=False,
                help="Levels of inputs of at most 4 bits with fixed ranges: fitted, or evenly "
                "spaced.",
                rich_help_panel=BITS,
            ),
        ],
        _DEFAULTS.activation_levels,
    ),
    "weight_storage": (
        "weight_storage",
        Annotated[
            WeightStorage,
            typer.Option(
                case_sensitive=False,
                help="Weights of fixed widths, or whole numbers that an entropy coder stores: far "
                "better for their bytes on disk, wider in memory.",
                rich_help_panel=BITS,
            ),
        ],
        _DEFAULTS.weight_storage,
    ),
    "slowdown": (
        "slowdown",
        Annotated[
            float,
            typer.Option(
                help="How much longer a program may take for inputs that stay in float: 1.1 for a "
                "tenth, 1 for none.",
                rich_help_panel=BITS,
            ),
        ],
        _DEFAULTS.slowdown,
    ),
    "allocation": (
        "allocation",
        Annotated[
            Allocation,
            typer.Option(
                case_sensitive=False,
                help="How layers share the bits: by measured cost, all alike, or by outliers "
                "(MPQ-DM).",
                rich_help_panel=BITS,
            ),
        ],
        _DEFAULTS.allocation,
    ),
    "effective_bits": (
        "effective_bits",
        Annotated[
            float | None,
            typer.Option(
                help="Budget in stored bits over all weights, for `measured`.",
                rich_help_panel=BITS,
            ),
        ],
        None,
    ),
    "weight_bytes": (
        "weight_bytes",
        Annotated[int | None, typer.Option(help="The same budget in bytes.", rich_help_panel=BITS)],
        None,
    ),
    "levels": (
        "levels",
        Annotated[
            Levels,
            typer.Option(
                case_sensitive=False,
                help="Levels of a channel: evenly spaced, fitted, or XNNPACK's of four bits.",
                rich_help_panel=BITS,
            ),
        ],
        _DEFAULTS.levels,
    ),
    "rounding": (
        "rounding",
        Annotated[
            Rounding,
            typer.Option(
                case_sensitive=False,
                help="With error feedback, or to the nearest level.",
                rich_help_panel=BITS,
            ),
        ],
        _DEFAULTS.rounding,
    ),
    "refinements": (
        "refinements",
        Annotated[
            int,
            typer.Option(
                help="Rounds of coordinate descent after GPTQ.", rich_help_panel=CALIBRATION
            ),
        ],
        _DEFAULTS.refinements,
    ),
    "propagation": (
        "propagation",
        Annotated[
            str,
            typer.Option(
                metavar="auto|0..1",
                help="Strength of error propagation: auto, or 0 to 1 (the paper's: 0.5).",
                rich_help_panel=CALIBRATION,
            ),
        ],
        str(_DEFAULTS.propagation),
    ),
    "noise_argument": (
        "noise_argument",
        Annotated[
            str | None,
            typer.Option(
                help="The model's argument that tells noise levels. Default: found.",
                rich_help_panel=CALIBRATION,
            ),
        ],
        None,
    ),
    "override": (
        "overrides",
        Annotated[
            list[str] | None,
            typer.Option(
                metavar="PATTERN=BITS",
                help="PATTERN=BITS, PATTERN=W4A8, PATTERN=A8 or PATTERN=float for single layers; "
                "later ones win.",
                rich_help_panel=BITS,
            ),
        ],
        None,
    ),
    "seed": ("seed", SeedOption, 0),
}
