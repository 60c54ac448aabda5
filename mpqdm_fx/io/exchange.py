"""Folders that appear whole or not at all: stages, exchange in one step, and what kills left.

A folder is filled under a hidden name beside its place. Where there is an older one the two change
places in one step of the file system, so that a reader finds the old or the new one at all times;
where the system has no such step, a failure between two renames is rolled back. A stage is held by
the process that fills it (`files.hidden_folder`), so one that was left by a killed run is known.
"""

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.files import hidden_folder, sweep_abandoned
from mpqdm_fx.io.system_errors import check_name_length, writing

__all__ = ["remove_folder", "replace_folder", "staged_folder", "sweep_leftovers"]

logger = logging.getLogger(__name__)

_STAGE = "stage"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux
_RENAME_SWAP = 2  # macOS


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place if the block ends well, else goes.

    What earlier runs that were killed left of theirs is removed, and named in the log.

    Args:
        target: The folder to appear; its parent is made.

    Yields:
        The folder, to be filled.

    Raises:
        ArtifactError: The system refuses, as of `system_errors.writing`, or the folder cannot be
            replaced.
    """
    check_name_length(target)
    place = Path(os.path.realpath(target))  # of a link, the folder it leads to is replaced
    with writing(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep_leftovers(place)
        with hidden_folder(place.parent, place.name, _STAGE) as stage:
            yield stage
            replace_folder(stage, place)


def sweep_leftovers(target: Path) -> None:
    """Remove stages of `target` that no running process fills, and say so.

    What was moved away and not replaced comes back.
    """
    moved = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.stage\.old")
    for path in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
        if not moved.fullmatch(path.name):
            continue
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            logger.warning("%s: a run was killed while it replaced it; the old one is back", target)
            path.rename(target)
    sweep_abandoned(target.parent, target.name, _STAGE)


def remove_folder(target: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name; nothing if it is not."""
    sweep_leftovers(target)
    with (
        contextlib.suppress(FileNotFoundError),
        hidden_folder(target.parent, target.name, _STAGE) as away,
    ):
        target.rename(away / target.name)


def replace_folder(stage: Path, target: Path) -> None:
    """Put `stage` where `target` is, in one step where the system can; the old one is removed.

    Args:
        stage: A folder beside `target`.
        target: The folder to appear; there may be an older one.

    Raises:
        ArtifactError: The system refuses; both folders are where they were.
    """
    try:
        if not target.exists():
            stage.rename(target)
            return
        if not _exchange(stage, target):
            _replace_in_two_steps(stage, target)
    except OSError as error:
        raise ArtifactError(
            f"{target} cannot be replaced: {error.strerror or error}; it is as it was"
        ) from error
    shutil.rmtree(stage, ignore_errors=True)  # the old one now


def _exchange(stage: Path, target: Path) -> bool:
    """Let two folders change places in one step; False where the system has no such step."""
    call = _exchange_call()
    if call is None:
        return False
    if call(os.fsencode(stage), os.fsencode(target)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # the file system has none
        return False
    raise OSError(code, os.strerror(code))


def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return lambda a, b: library.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return lambda a, b: library.renamex_np(a, b, _RENAME_SWAP)
    return None


def _replace_in_two_steps(stage: Path, target: Path) -> None:
    old = stage.with_name(f"{stage.name}.old")
    target.rename(old)
    try:
        stage.rename(target)
    except BaseException:
        old.rename(target)
        raise
    old.rename(stage)
