"""What a model's name on the command line can stand for; without torch."""

import re
from pathlib import Path

from mpqdm_fx.errors import ConfigError

__all__ = ["BUNDLED", "check_name", "is_folder", "is_function", "unknown_model"]

BUNDLED = "digits"
"""Name of the model that comes with this package."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_function(name: str) -> bool:
    """Whether a name on the command line is a function's and no folder's."""
    return ":" in name and not Path(name).exists()


def check_name(name: str) -> None:
    """Refuse a name that no model can have, before anything is loaded.

    Raises:
        ConfigError: It is neither the bundled model's, nor a folder's, nor a function's.
    """
    if name != BUNDLED and not is_function(name) and not is_folder(name):
        raise unknown_model(name)


def is_folder(name: str) -> bool:
    """Whether a name is a folder's; an empty one, of a variable that is not set, is none."""
    return bool(name) and Path(name).is_dir()


def unknown_model(name: str) -> ConfigError:
    """The error of a name that no model has; one of the Hugging Face Hub says how to get it."""
    if Path(name).is_file():
        return ConfigError(
            f"{name!r} is a file; give the folder that it lies in, or the function of a .py file "
            f"that returns the model: {name}:function"
        )
    remedy = (
        "give a diffusers model folder, a pipeline folder with --subfolder unet, or a function, "
        "module:function"
    )
    if _HUB_NAME.fullmatch(name) and not Path(name).parent.is_dir():
        place = name.rpartition("/")[2]
        remedy = (
            f"if it is one of the Hugging Face Hub, download it: hf download {name} --local-dir "
            f"{place}; then give {place}, for a pipeline with --subfolder unet"
        )
    return ConfigError(f"{name!r} is neither a bundled model ({BUNDLED}) nor a folder; {remedy}")
