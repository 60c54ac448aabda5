"""Write files that appear whole or not at all, and tell where what was read is not what should be.

What is being written lies in a hidden folder beside its place. The process that fills the folder
holds a lock on it, which the system drops when that process ends, however it does. So a folder that
can be locked was left by a run that was killed, and the next one removes it.
"""

import contextlib
import errno
import json
import logging
import os
import re
import reprlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.system_errors import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "check_version",
    "checkpoint_of",
    "differences",
    "first_difference",
    "hidden_folder",
    "is_empty_but_for_hidden",
    "replacing",
    "sweep_abandoned",
    "write_text",
    "write_texts",
]

logger = logging.getLogger(__name__)

_LONGEST = 56  # characters of a name that are repeated in a hidden one: up to 4 bytes each of 255


def check_version(path: str | Path, version: Any, newest: int) -> None:
    """Refuse a file of a newer format.

    Args:
        path: The file.
        version: What it has for its format's version.
        newest: The last version that this package reads.

    Raises:
        ArtifactError: It is newer, or no version.
    """
    if type(version) is not int or not 1 <= version <= newest:
        raise ArtifactError(
            f"{path} has format version {version!r}, this package reads up to {newest}; "
            f"update mpqdm-fx"
        )


def checkpoint_of(output: Path) -> Path:
    """Where a run that was stopped leaves what it has: beside its output."""
    return output.with_name(f"{output.name}.checkpoint")


@contextlib.contextmanager
def hidden_folder(parent: Path, name: str, kind: str, *, mode: int = 0o777) -> Iterator[Path]:
    """A new folder `.<name>.<random>.<kind>` that this process holds; removed at the end.

    Args:
        parent: Folder to make it in.
        name: What it is for.
        kind: What it holds; a suffix.
        mode: Who may use it, less the user's mask.

    Yields:
        The folder. The block may move it away.
    """
    while True:
        folder = parent / f".{name}.{secrets.token_hex(4)}.{kind}"
        with contextlib.ExitStack() as stack:
            # before it is made: a signal may raise as soon as it is
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            try:
                folder.mkdir(mode=mode)
            except FileExistsError:
                stack.pop_all()  # it is another's
                continue
            try:
                lock = _lock(folder)
            except (FileNotFoundError, BlockingIOError):  # another process took it for abandoned
                continue
            if lock is not None:
                stack.callback(os.close, lock)
            if not folder.exists():
                continue
            yield folder
            return


def _lock(folder: Path) -> int | None:
    """Descriptor that locks a folder until it is closed; None where there are no such locks.

    Raises:
        OSError: It cannot be opened, or another process has it (`BlockingIOError`).
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # as on some networks
            return None
        raise
    return descriptor


def _held_anew(parent: Path, name: str, kind: str, stack: contextlib.ExitStack) -> list[Path]:
    """The abandoned folders, held until the stack ends: no other process sweeps or takes them."""
    if not parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.{re.escape(kind)}")
    folders = []
    for path in sorted(path for path in parent.iterdir() if pattern.fullmatch(path.name)):
        with contextlib.suppress(OSError):  # in use, another user's, or gone
            lock = _lock(path) if path.is_dir() and not path.is_symlink() else None
            if lock is not None:
                stack.callback(os.close, lock)
                folders.append(path)
    return folders


def sweep_abandoned(parent: Path, name: str, kind: str) -> None:
    """Remove folders of `hidden_folder` that no running process holds, and say so."""
    with contextlib.ExitStack() as stack:
        for folder in _held_anew(parent, name, kind, stack):
            logger.warning("%s was left by a run that was killed; it is removed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def is_empty_but_for_hidden(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a killed run was about to write into it."""
    pattern = re.compile(r"\..*\.[0-9a-f]{8}\.part")
    return all(pattern.fullmatch(path.name) for path in folder.iterdir())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file that takes the place of `path` when the block is through, else goes.

    Args:
        path: Where the file is to be, or a link to it; its folder is made.

    Yields:
        The file, of the same name in a hidden folder beside its place, to be filled.

    Raises:
        ArtifactError: A folder, a device or a pipe is there, which no file takes the place of; or
            the system refuses, as of `system_errors.writing`.
    """
    with writing(path), _hidden_file(path) as (part, place):
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors writes for the owner alone
        part.replace(place)


@contextlib.contextmanager
def _hidden_file(path: Path) -> Iterator[tuple[Path, Path]]:
    """An empty file in a hidden folder beside its place, and that place."""
    path = Path(os.path.realpath(path))  # of a link, the file it leads to is replaced
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path} is there and no regular file; give a file's name")
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name[:_LONGEST]
    sweep_abandoned(path.parent, name, "part")
    with hidden_folder(path.parent, name, "part") as folder:
        part = folder / path.name
        part.touch(exist_ok=False)
        yield part, path


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; an older one stays until then.

    Args:
        path: Where the file is to be; its folder is made.
        text: Its content, to be UTF-8.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write several files that appear all or none; older ones stay until all are whole.

    Args:
        texts: Contents, to be UTF-8, by where they are to be.

    Raises:
        ArtifactError: As of `replacing`.
    """
    with contextlib.ExitStack() as stack:
        places = {}
        for path, text in texts.items():
            with writing(path):
                part, place = stack.enter_context(_hidden_file(path))
                part.write_text(text, encoding="utf-8")
                if place.exists():
                    shutil.copy2(place, _older(part))
            places[part] = place
        touched = []
        try:
            for part, place in places.items():
                touched.append(part)
                with writing(place):
                    part.replace(place)
        except BaseException:
            for part in touched:
                with contextlib.suppress(OSError):
                    _put_back(_older(part), places[part])
            raise


def _older(part: Path) -> Path:
    """Where the file whose place a new one takes is kept until all are there."""
    return part.with_name(f".{part.name[:_LONGEST]}.older")


def _put_back(older: Path, place: Path) -> None:
    if older.exists():
        older.replace(place)
    else:
        place.unlink(missing_ok=True)


def differences(value: Any, reference: Any) -> list[tuple[str, Any, Any]]:
    """Where a JSON value is not what it should be.

    Args:
        value: What was read.
        reference: What it should be; a tuple counts as the list that JSON makes of it.

    Returns:
        Of each difference the path (keys of nested objects, joined by dots), the value found and
        the value wanted; a key that one side lacks is None there.
    """
    return list(_differences(value, json.loads(json.dumps(reference)), ""))


def first_difference(value: Any, reference: Any) -> str | None:
    """The first of `differences` in words of bounded length, `seed was 3, is 4`; None if none is.

    Args:
        value: What was read.
        reference: What it should be.
    """
    for path, old, new in _differences(value, json.loads(json.dumps(reference)), ""):
        was, is_ = (_short.repr(value)[:_LONGEST_TOLD] for value in (old, new))
        return f"{path[:_LONGEST_TOLD]} was {was}, is {is_}"
    return None


_LONGEST_TOLD = 200
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def _differences(value: Any, reference: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(value, dict) and isinstance(reference, dict):
        for key in sorted({*value, *reference}):
            path = f"{where}.{key}" if where else key
            yield from _differences(value.get(key), reference.get(key), path)
    elif value != reference:
        yield where, value, reference
