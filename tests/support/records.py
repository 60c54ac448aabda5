"""Files that were damaged, and files that were changed by one who knows their format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import create_model

from mpqdm_fx.io.schema import Strict, plain, validated
from mpqdm_fx.io.sealed import seal
from mpqdm_fx.io.tensors import read_record, write_record

__all__ = ["change_tensor", "edit_json", "edit_record", "flip", "read_back"]


def flip(path: Path, byte: int | None = None, *, bit: int = 0) -> None:
    """Flip one bit of a file.

    Args:
        path: The file.
        byte: Which byte; from the end if negative; default: the one in the middle.
        bit: Which of its bits.
    """
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if byte is None else byte] ^= 1 << bit
    path.write_bytes(content)


def edit_json(
    path: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool = False
) -> None:
    """Change a JSON file in place; `sealed` gives it the digest of its new content."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(seal(data) if sealed else data))


def edit_record(
    path: Path, kind: str, version: int, change: Callable[[dict[str, Any], dict[str, Any]], object]
) -> None:
    """Change a record's head and tensors; its hash fits again."""
    record = read_record(path, kind, version, fix="")
    head, tensors = json.loads(json.dumps(record.head)), dict(record.tensors)
    change(head, tensors)
    write_record(path, kind, version, head, tensors)


def change_tensor(name: str, change: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    """A change for `edit_record` that puts another tensor in the place of one."""
    return lambda _, tensors: tensors.update({name: change(tensors[name])})


def read_back(kind: Any, data: Any) -> Any:
    """Plain JSON types as what they are of, as where a record has such a field."""
    record = create_model("Record", __base__=Strict, value=(kind, ...))
    return validated(record, {"value": plain(data)}, "the record").value
