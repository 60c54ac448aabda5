"""What a run that was stopped left beside its result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.files import first_difference, is_empty_but_for_hidden
from mpqdm_fx.io.schema import plain
from mpqdm_fx.io.sealed import read_json

__all__ = ["check_ours", "check_unfinished"]


def check_ours(folder: Path, ours: bool) -> None:
    """Refuse a folder of somebody else's where a run would be kept: it goes when that is through.

    What a killed run left is known by its names: files that were not whole yet.
    """
    if not folder.exists() or ours:
        return
    if not (folder.is_dir() and is_empty_but_for_hidden(folder)):
        raise ConfigError(f"{folder} is in the way and holds no unfinished run; move or delete it")


def check_unfinished(
    folder: Path, header: str, wanted: Mapping[str, Any], *, resume: bool, parts: str
) -> None:
    """Refuse an unfinished run that is another one, or that is not to go on.

    Args:
        folder: Where the run is kept.
        header: Its file that says what it is; a folder without one holds no run.
        wanted: What it must say.
        resume: Go on with it.
        parts: Pattern of what it has solved already.

    Raises:
        ConfigError: The run differs (the first difference is named), or `resume` is False and
            something is solved; or the folder is somebody else's.
        ArtifactError: The header is damaged.
    """
    path = folder / header
    check_ours(folder, path.is_file())
    if not path.is_file():
        return
    found = read_json(path, fix="delete the folder to start anew")
    for key, value in wanted.items():
        if (other := first_difference(found.get(key), plain(value))) is not None:
            raise ConfigError(
                f"{folder} holds an unfinished run: {other}; use what it was started with, or "
                f"delete it"
            )
    if not resume and any(folder.glob(parts)):
        raise ConfigError(f"{folder} holds a run that was not finished; resume it, or delete it")
