"""Files that are checked before they are used: strict JSON, and folders that list their content.

A sealed folder has a manifest that names each of its files with size and SHA-256, and that carries
the SHA-256 of its own content. Sizes are compared before anything is hashed, a file is hashed
before it is used, and what is used is the very file that was hashed: it stays open in between and
is reached by its descriptor, so that another file under the same name is never seen. This tells
damage and mixed-up files; it is no signature, since whoever rewrites all of a folder can seal it.

This file is copied into exported folders, and imports nothing but the standard library and errors.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mpqdm_fx.errors import ArtifactError

__all__ = [
    "Entry",
    "SealedFolder",
    "digest_of",
    "hash_bytes",
    "hashed_file",
    "parse_json",
    "read_json",
    "seal",
    "verified",
]

_LARGEST_JSON = 1 << 26  # bytes; the manifest of a UNet of 860 M parameters takes 1 MB
_DEEPEST = 32
_DIGITS = 19  # of an integer: those of 64 bits
_DIGEST = "digest"
_HEXADECIMAL = re.compile("[0-9a-f]{64}")
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def parse_json(data: bytes, where: object, *, fix: str = "", finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object, more strictly than `json` does.

    Numbers are finite and integers have at most 19 digits, no object has a key twice, and nesting
    has at most 32 levels.

    Args:
        data: UTF-8.
        where: What it was read from, for messages.
        fix: What to do if it is damaged; ends the message.
        finite: Whether it is a file of ours, whose numbers are finite. Configurations of diffusers
            may have infinities, as Python writes them.

    Raises:
        ArtifactError: It is not JSON by these rules, or no object.
    """
    end = f"; {fix}" if fix else ""
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant if finite else float,
            parse_float=_finite,
            parse_int=_short,
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ArtifactError(
            f"{where} is damaged: no JSON, corrupted or truncated: {reason}{end}"
        ) from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} holds no JSON object{end}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:40]!r} is there twice")
    return entries


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _short(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS:
        raise ValueError(f"an integer has {len(text.lstrip('-'))} digits")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            child
            for entry in level
            if isinstance(entry, (dict, list))
            for child in (entry.values() if isinstance(entry, dict) else entry)
        ]
        if not level:
            return
    raise RecursionError


def read_json(path: str | Path, *, fix: str = "", finite: bool = True) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most 64 MiB; see `parse_json`.

    Raises:
        ArtifactError: The file is missing, no regular file, too large, or no such JSON.
    """
    with _opened(Path(path)) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > _LARGEST_JSON:
            raise ArtifactError(f"{path} has {size} bytes, more than any JSON file of ours")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(_LARGEST_JSON + 1)
    return parse_json(data, path, fix=fix, finite=finite)


@contextlib.contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    """Descriptor of a regular file; devices and pipes are not waited for."""
    try:
        descriptor = os.open(path, _OPEN | flags)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path} cannot be read: {reason}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArtifactError(f"{path} is no regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def hash_bytes(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hash_bytes(text.encode())


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the digest of all its other content."""
    content = {key: value for key, value in manifest.items() if key != _DIGEST}
    return {**content, _DIGEST: digest_of(content)}


def verified(manifest: Mapping[str, Any], where: object, *, fix: str = "") -> dict[str, Any]:
    """Inverse of `seal`; `where` and `fix` as of `parse_json`.

    Raises:
        ArtifactError: The manifest is not what was sealed.
    """
    content = {key: value for key, value in manifest.items() if key != _DIGEST}
    if manifest.get(_DIGEST) != digest_of(content):
        raise ArtifactError(
            f"{where} is corrupted: its content does not have the digest that it was written with"
            f"{f'; {fix}' if fix else ''}"
        )
    return content


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a manifest says of one file.

    Attributes:
        bytes: Size.
        sha256: SHA-256 of its content, hexadecimal.
    """

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        size, digest = self.bytes, self.sha256
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise ArtifactError("size and hash of a file are no number and no text")
        if not _HEXADECIMAL.fullmatch(digest):
            raise ArtifactError(f"{digest[:80]!r} is no SHA-256")

    @classmethod
    def of(cls, path: Path) -> "Entry":
        """Measure a file."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(bytes=file.tell(), sha256=digest)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"bytes": self.bytes, "sha256": self.sha256}


@contextlib.contextmanager
def hashed_file(path: Path, entry: Entry) -> Iterator[Path]:
    """A path to the very file whose hash was found right, whatever takes its name meanwhile.

    Args:
        path: The file.
        entry: What it must be.

    Raises:
        ArtifactError: It is missing, a link, no regular file, or not what was written.
    """
    with _sized(path, entry) as descriptor:
        with open(descriptor, "rb", closefd=False) as file:
            _compare(path, entry, hashlib.file_digest(file, "sha256").hexdigest())
        os.lseek(descriptor, 0, os.SEEK_SET)
        reached = Path(f"/dev/fd/{descriptor}")
        yield reached if reached.exists() else path


@contextlib.contextmanager
def _sized(path: Path, entry: Entry) -> Iterator[int]:
    if path.is_symlink():
        raise ArtifactError(f"{path} is a link; files of a folder lie in it")
    with _opened(path, getattr(os, "O_NOFOLLOW", 0)) as descriptor:
        size = os.fstat(descriptor).st_size
        if size != entry.bytes:
            raise ArtifactError(
                f"{path} is truncated or damaged: it has {size} bytes, {entry.bytes} were written"
            )
        yield descriptor


def _compare(path: Path, entry: Entry, digest: str) -> None:
    if digest != entry.sha256:
        raise ArtifactError(f"{path} is corrupted: its checksum differs from the manifest's")


class SealedFolder:
    """A folder and the list of its files.

    Args:
        root: The folder.
        files: `{name: {"bytes": ..., "sha256": ...}}` of a manifest. Names are relative paths with
            `/` between their components.
        manifest: File that the list was read from, for messages.

    Raises:
        ArtifactError: The list is malformed, a name leaves the folder, or a file is missing, no
            regular file, reached through a link, or of another size.
    """

    def __init__(self, root: Path, files: Any, manifest: object) -> None:
        self.root = root
        self.manifest = manifest
        if not isinstance(files, Mapping):
            raise ArtifactError(f"{manifest} is damaged: it lists no files")
        self.entries = {name: self._entry(name, value) for name, value in files.items()}
        for name, entry in self.entries.items():
            with _sized(self._located(name), entry):
                pass

    def _entry(self, name: str, value: Any) -> Entry:
        parts = PurePosixPath(name).parts
        plain = "/".join(parts) == name and not name.startswith("/") and ".." not in parts
        if not plain or not parts or "\\" in name or ":" in name or not name.isprintable():
            raise ArtifactError(f"{self.manifest} is damaged: {name[:80]!r} is no file's name")
        try:
            return Entry(**value)
        except (TypeError, ArtifactError):
            raise ArtifactError(
                f"{self.manifest} is damaged: size and hash of {name!r} are malformed"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def require(self, *names: str) -> None:
        """Refuse a manifest that does not list these files.

        Raises:
            ArtifactError: One is not listed.
        """
        for name in names:
            if name not in self.entries:
                raise ArtifactError(
                    f"{self.manifest} lists no {name}, which belongs to such a folder"
                )

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """A path to a listed file; see `hashed_file`.

        Raises:
            ArtifactError: The file is not listed, or is not what was written.
        """
        with hashed_file(self._located(name), self.entries[name]) as path:
            yield path

    def read(self, name: str) -> bytes:
        """Content of a listed file, checked; for files that fit in memory.

        Raises:
            ArtifactError: The file is not listed, or is not what was written.
        """
        path = self._located(name)
        entry = self.entries[name]
        with _sized(path, entry) as descriptor, open(descriptor, "rb", closefd=False) as file:
            data = file.read(entry.bytes + 1)
        _compare(path, entry, hash_bytes(data))
        return data

    def read_json(self, name: str, *, finite: bool = True) -> dict[str, Any]:
        """A listed JSON file; see `parse_json`."""
        return parse_json(self.read(name), self.root / name, finite=finite)

    def check(self) -> None:
        """Hash all files.

        Raises:
            ArtifactError: One is not what was written.
        """
        for name in self.entries:
            with self.opened(name):
                pass

    def _located(self, name: str) -> Path:
        """Path of a listed file whose folders are no links."""
        self.require(name)
        path = self.root
        for part in PurePosixPath(name).parts[:-1]:
            path /= part
            if path.is_symlink():
                raise ArtifactError(f"{path} is a link; files of a folder lie in it")
        return self.root / name
