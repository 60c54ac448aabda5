"""Folders for what a process holds on disk while it runs: private, and gone when it ends."""

import contextlib
import tempfile
import weakref
from pathlib import Path

from mpqdm_fx.io.files import hidden_folder, sweep_abandoned

__all__ = ["Scratch"]

_KIND = "scratch"


class Scratch:
    """A new folder that only its user may read; it goes with this object, or with the process.

    What processes that were killed left of theirs is removed, and named in the log.

    Args:
        name: What it is for.
        parent: Folder to make it in, made if it is not there; default the system's for such.

    Attributes:
        folder: The folder.
    """

    def __init__(self, name: str, parent: Path | None = None) -> None:
        home = Path(tempfile.gettempdir()) if parent is None else parent
        home.mkdir(parents=True, exist_ok=True)
        sweep_abandoned(home, name, _KIND)
        stack = contextlib.ExitStack()
        self.folder = stack.enter_context(hidden_folder(home, name, _KIND, mode=0o700))
        self._end = weakref.finalize(self, stack.close)

    def close(self) -> None:
        """Remove the folder now."""
        self._end()
