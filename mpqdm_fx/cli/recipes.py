"""`--preset` and `--config`: what stands for options that were not typed."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mpqdm_fx.backends.names import PROGRAMS
from mpqdm_fx.cli.panels import BITS
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.jobs.presets import PRESETS, PresetName, read_recipe
from mpqdm_fx.records.config import MPQConfig

__all__ = ["PresetOption", "RecipeOption", "preset_values", "with_typed"]

PresetOption = Annotated[
    PresetName | None,
    typer.Option(
        case_sensitive=False,
        help="A documented recipe; options that are typed win. "
        + " ".join(f"{name}: {preset.purpose}." for name, preset in PRESETS.items()),
        rich_help_panel=BITS,
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="RECIPE.JSON",
        help="Settings of a result: its recipe.json, or its folder; options that are typed win.",
        rich_help_panel=BITS,
    ),
]

_BUDGETS = ("weight_bits", "effective_bits", "weight_bytes")


def preset_values(
    name: PresetName, given: Mapping[str, Any], typed: Collection[str]
) -> dict[str, Any]:
    """Values that a preset gives to a command's options.

    Args:
        name: The preset.
        given: Every option of the command, by its parameter.
        typed: Those that were typed, which stay as they are.
    """
    preset = PRESETS[name]
    program = (given.get("backend") or "xnnpack") in PROGRAMS
    values = {**preset.options, **(preset.program if program else {})}
    return {key: value for key, value in values.items() if key in given and key not in typed}


def with_typed(recipe: Path, settings: MPQConfig, typed: Collection[str]) -> MPQConfig:
    """Settings of a recipe, but for those that were typed.

    A budget that was typed, in whatever unit, takes the place of the recipe's.

    Args:
        recipe: The file.
        settings: What the command's options say.
        typed: Fields whose options were typed.

    Raises:
        ArtifactError: The recipe cannot be read.
        ConfigError: What was typed does not fit it.
    """
    base = read_recipe(recipe)
    changed = {field: getattr(settings, field) for field in typed}
    if any(field in changed for field in _BUDGETS):
        changed = {"effective_bits": None, "weight_bytes": None, **changed}
    try:
        return replace(base, **changed)
    except ConfigError as error:
        raise ConfigError(f"--config {recipe} and what was typed: {error}") from None
