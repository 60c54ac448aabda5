"""Recipes: presets by name, and `recipe.json`, the settings that a result folder was made with.

A preset is a short list of options. What is typed wins over it, and it wins over defaults.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.schema import Format, Strict, read_as
from mpqdm_fx.records.config import MPQConfig, StoredSettings

__all__ = [
    "PRESETS",
    "PRESET_NAMES",
    "RECIPE",
    "Preset",
    "PresetName",
    "read_recipe",
    "write_recipe",
]

RECIPE = "recipe.json"
_FORMAT, _VERSION = "mpqdm-fx recipe", 1


class _Recipe(Strict):
    stored_as: ClassVar[Format] = Format(name=_FORMAT, noun="recipe", newest=_VERSION)

    format: str
    version: int
    settings: StoredSettings


PresetName = Literal["quick", "balanced", "small"]
PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A documented recipe.

    Attributes:
        purpose: What it is for, one line.
        options: Values of options, by the names of the command's parameters.
        program: Further ones where a program is written.
    """

    purpose: str
    options: Mapping[str, Any]
    program: Mapping[str, Any]


PRESETS: Mapping[PresetName, Preset] = {
    "quick": Preset(
        purpose="to see whether it works: a fraction of the time, 4 bits in every layer, no search",
        options={
            "weights": 4,
            "allocation": "uniform",
            "refinements": 0,
            "propagation": "0",
            "trajectories": 4,
            "samples": 8,
        },
        program={},
    ),
    "balanced": Preset(
        purpose="the defaults: 4 bits on average, shared by what they do to the output",
        options={"weights": 4},
        program={},
    ),
    "small": Preset(
        purpose="fewest bytes that still draw: 2 bits on average, twice the calibration",
        options={"weights": 2, "trajectories": 32},
        program={"compress": True},
    ),
}
"""By name.

Measured on the bundled model with ranges computed at run time, seed 0, one thread: CPU seconds to
quantize, noise SQNR, SQNR of 64 samples, their Frechet distance, bytes of all parameters.

    quick      20 s   35.8 dB   19.2 dB   1.4   906,712
    balanced   44 s   47.8 dB   26.5 dB   0.2   906,584
    small      54 s   37.8 dB   18.5 dB   2.0   478,295
"""


def write_recipe(stage: Path, settings: MPQConfig) -> None:
    """Write a folder's `recipe.json`.

    Args:
        stage: The folder.
        settings: What its model was quantized with.
    """
    content = {"format": _FORMAT, "version": _VERSION, "settings": settings.to_dict()}
    write_text(stage / RECIPE, json.dumps(content, indent=2) + "\n")


def read_recipe(path: Path) -> MPQConfig:
    """Settings of a `recipe.json`.

    Args:
        path: The file, or a folder that holds one.

    Raises:
        ArtifactError: It is missing, damaged, of a newer version, or no recipe.
    """
    path = path / RECIPE if path.is_dir() else path
    return read_as(_Recipe, path, fix="give the recipe.json of a result folder").settings
