"""What a run that was stopped left beside its result."""

from pathlib import Path

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.files import is_empty_but_for_hidden

__all__ = ["check_ours"]


def check_ours(folder: Path, ours: bool) -> None:
    """Refuse a folder of somebody else's where a run would be kept: it goes when that is through.

    What a killed run left is known by its names: files that were not whole yet.
    """
    if not folder.exists() or ours:
        return
    if not (folder.is_dir() and is_empty_but_for_hidden(folder)):
        raise ConfigError(f"{folder} is in the way and holds no unfinished run; move or delete it")
