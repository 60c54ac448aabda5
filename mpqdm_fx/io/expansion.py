"""Expand `.xz` files to what they are known to hold, and to no more.

This file is copied into exported folders, and imports nothing but the standard library,
`sealed` and errors.
"""

import contextlib
import lzma
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.sealed import Entry, hashed_file

__all__ = ["expand", "expansion_path"]

_CHUNK = 1 << 20
_MOST_EXPANSION = 256  # times; codes of one bit in bytes, with equal neighbours, reach about 100
_DIGITS = 16


def expansion_path(packed: Path, sha256: str, folder: Path | None = None) -> Path:
    """Where the content of a compressed file is kept: a hidden file named after its hash.

    Args:
        packed: The compressed file, `<name>.xz`.
        sha256: Its hash, hexadecimal.
        folder: Where to keep it; default beside `packed`.
    """
    return (folder or packed.parent) / f".{packed.stem}.{sha256[:_DIGITS]}"


def expand(
    packed: Path,
    target: Path,
    *,
    content: Entry | None,
    name: object,
    complete: Callable[[Path, object], None],
) -> None:
    """Expand a file, unless `target` holds its known content already.

    The file appears only when it is whole, and right where its content is known. Without known
    content it is expanded at every call, to at most 256 times the compressed size.

    Args:
        packed: The compressed file.
        target: The plain one.
        content: Size and hash of the plain one, if a manifest names them.
        name: What messages call the compressed one.
        complete: Makes of the expanded file, before it has its name, what it is to be; takes it
            and `name`.

    Raises:
        ArtifactError: The compressed file is damaged or holds something else, or `target` cannot
            be written.
    """
    if content is not None and _holds(target, content):
        return
    size = packed.stat().st_size
    # what follows a program is coded already, and takes as many bytes in the compressed file
    most = size * _MOST_EXPANSION if content is None else content.bytes + 2 * size
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        with packed.open("rb") as source, part.open("xb") as plain:
            for chunk in _plain_chunks(source):
                if plain.tell() + len(chunk) > most:
                    raise ArtifactError(
                        f"{name} expands to more than the {most} bytes that it may; it is damaged, "
                        f"or none of ours"
                    )
                plain.write(chunk)
        complete(part, name)
        if content is not None and Entry.of(part) != content:
            raise ArtifactError(f"{name} holds another file than its manifest says")
        part.replace(target)
    except (lzma.LZMAError, EOFError) as error:
        raise ArtifactError(f"{name} is damaged or truncated: {error}; copy it again") from error
    except OSError as error:
        raise ArtifactError(
            f"{name} cannot be expanded into {target.parent}: {error}; the folder must be "
            f"writable, and its disk have room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _plain_chunks(source: BinaryIO) -> Iterator[bytes]:
    """The content of one stream, piece by piece; `lzma.open` joins streams and skips what follows.

    Raises:
        EOFError: The stream does not end.
        LZMAError: It is none, or something follows it.
    """
    # .xz alone: an older format, which lzma would take too, has no checksum
    stream = lzma.LZMADecompressor(format=lzma.FORMAT_XZ)
    while not stream.eof:
        data = source.read(_CHUNK) if stream.needs_input else b""
        if stream.needs_input and not data:
            raise EOFError("it ends before its content does")
        yield stream.decompress(data, _CHUNK)
    if stream.unused_data or source.read(1):
        raise lzma.LZMAError("something follows its content")


def _holds(path: Path, content: Entry) -> bool:
    try:
        with hashed_file(path, content):
            return True
    except ArtifactError:
        return False
