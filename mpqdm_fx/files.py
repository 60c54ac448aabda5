"""Read and write the small files beside the weights, and tell whether a file is still the same."""

import contextlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError

__all__ = ["check_version", "differences", "replacing", "write_text"]


def check_version(path: str | Path, found: Any, newest: int) -> None:
    """Refuse a file of a newer format.

    Args:
        path: The file.
        found: What it has for its format's version.
        newest: The last version that this package reads.

    Raises:
        ArtifactError: It is newer, or no version.
    """
    if type(found) is not int or not 1 <= found <= newest:
        raise ArtifactError(
            f"{path} has format version {found!r}, this package reads up to {newest}; "
            f"update mpqdm-fx"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path` that takes its place when the block is through, else goes.

    Args:
        path: Where the file is to be; its folder is made.

    Yields:
        The file under its temporary name, to be filled.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    part.touch(exist_ok=False)
    mode = part.stat().st_mode
    try:
        yield part
        part.chmod(mode)  # safetensors writes for the owner alone
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; an older one stays until then.

    Args:
        path: Where the file is to be; its folder is made.
        text: Its content, to be UTF-8.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def differences(found: Any, wanted: Any) -> list[tuple[str, Any, Any]]:
    """Where a JSON value is not what it should be.

    Args:
        found: What was read.
        wanted: What it should be; a tuple counts as the list that JSON makes of it.

    Returns:
        Of each difference the path (keys of nested objects, joined by dots), the value found and
        the value wanted; a key that one side lacks is None there.
    """
    return list(_differences(found, json.loads(json.dumps(wanted)), ""))


def _differences(found: Any, wanted: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            path = f"{where}.{key}" if where else key
            yield from _differences(found.get(key), wanted.get(key), path)
    elif found != wanted:
        yield where, found, wanted
