"""Tensors with a head of plain numbers in one safetensors file that proves what it is.

A record's head holds its kind, its version, whatever identifies it, and the SHA-256 of head and
tensors together. So a flipped bit, a file of another kind or a file under another one's name is
told from the record itself.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.files import check_version, replacing
from mpqdm_fx.io.sealed import digest_of, parse_json

__all__ = ["Record", "hash_tensor", "read_record", "write_record"]

_HEAD = "record"
_LARGEST_HEAD = 8 * 2**20  # characters; a distillation of 100,000 updates has two million


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a file holds.

    Attributes:
        head: Plain JSON types.
        tensors: By name.
    """

    head: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed a tensor's dtype, shape and bits to a hash object of `hashlib`."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)


def write_record(
    path: Path, kind: str, version: int, head: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a record; an older one stays until it is whole.

    Args:
        path: The file; its folder is made.
        kind: What it holds.
        version: Of the kind's format.
        head: Plain JSON types with finite numbers.
        tensors: By name.

    Raises:
        ArtifactError: The head is larger than one that is read.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(head)
    if len(text) > _LARGEST_HEAD:
        raise ArtifactError(f"{path} cannot be written: its head has {len(text)} characters")
    content = {"kind": kind, "version": version, "head": json.loads(text)}
    text = json.dumps({**content, "sha256": _hash(content, plain)}, allow_nan=False)
    with replacing(path) as part:
        save_file(plain, part, metadata={_HEAD: text})


def read_record(path: Path, kind: str, version: int, *, fix: str) -> Record:
    """Read a record.

    Args:
        path: The file.
        kind: What it must hold.
        version: The last version of the kind's format that can be read.
        fix: What to do if it is damaged; ends the message.

    Raises:
        ArtifactError: The file is missing, damaged, of another kind, or of a newer version.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_HEAD)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; {fix}") from None
    if text is None:
        raise ArtifactError(f"{path} is no file of this package, or of an older version; {fix}")
    if len(text) > 2 * _LARGEST_HEAD:  # what is around it is short
        raise ArtifactError(f"{path} is damaged: its head has {len(text)} characters; {fix}")
    content = parse_json(text.encode(), path, fix=fix)
    digest = content.pop("sha256", None)
    if content.get("kind") != kind:
        raise ArtifactError(f"{path} holds {content.get('kind')!r}, not {kind!r}; {fix}")
    check_version(path, content.get("version"), version)
    head = content.get("head")
    if not isinstance(head, dict) or digest != _hash(content, tensors):
        raise ArtifactError(
            f"{path} is corrupted: its content does not have the hash that it was written with; "
            f"{fix}"
        )
    return Record(head=head, tensors=tensors)


def _hash(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(digest_of(content).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0".encode())
        hash_tensor(digest, tensor)
    return digest.hexdigest()
