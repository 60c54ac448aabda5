"""Programs and weight files as `.xz` on disk, expanded once to what runs.

Codes of few bits take a byte each in a program (four bits where XNNPACK has such a kernel), but
use few of its values; an entropy coder takes them down to about their own bits. XZ is in Python's
standard library and on every platform, and its files hold a SHA-256 of their content.
"""

import logging
import lzma
import re
import shutil
from pathlib import Path

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.files import replacing
from mpqdm_fx.io.sealed import Entry

__all__ = ["SUFFIX", "compress_program", "drop_expansions", "expand_program"]

logger = logging.getLogger(__name__)

SUFFIX = ".xz"
_CHUNK = 1 << 20
_DIGITS = 16  # of the compressed file's SHA-256, in the name of its expansion
# Codes of neighbouring weights tell nothing of each other: no context for literals, positions do
# not count, and there is little to find by a long search (preset 6 alone takes 2 to 4 times as long
# for 1 to 3 % fewer bytes). Expanding takes the dictionary's 8 MiB of memory.
_FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 6,
        "lc": 0,
        "lp": 0,
        "pb": 0,
        "mf": lzma.MF_HC4,
        "depth": 4,
    }
]


def compress_program(
    path: str | Path, output: str | Path | None = None, *, keep: bool = True
) -> Path:
    """Compress a `.pte` or `.ptd`; `XnnpackRunner` takes the result in its place.

    The file appears only when it is whole.

    Args:
        path: The file.
        output: What to write; default `<path>.xz`.
        keep: Whether the original stays.

    Returns:
        The file that was written.

    Raises:
        ArtifactError: `path` does not exist, or `output` does not end in `.xz`.
    """
    source = Path(path)
    target = source.with_name(source.name + SUFFIX) if output is None else Path(output)
    if target.suffix != SUFFIX:
        raise ArtifactError(f"{target}: a compressed program's name ends in {SUFFIX}")
    if not source.is_file():
        raise ArtifactError(f"{source} does not exist")
    with (
        replacing(target) as part,
        source.open("rb") as plain,
        lzma.open(part, "wb", check=lzma.CHECK_SHA256, filters=_FILTERS) as packed,
    ):
        shutil.copyfileobj(plain, packed, _CHUNK)
    logger.info("%s: %d bytes, %d expanded", target, target.stat().st_size, source.stat().st_size)
    if not keep:
        source.unlink()
    return target


def expand_program(path: str | Path, folder: str | Path | None = None) -> Path:
    """The plain file of a compressed one, expanded at the first call and found at later ones.

    It is named after the compressed file's content, so a program that was replaced is expanded
    anew, and what an older one left is removed. Content is checked while it expands; the file
    appears only when it is whole.

    Args:
        path: File written by `compress_program`.
        folder: Where to keep the plain file; default beside the compressed one.

    Returns:
        The plain file, `.<name without .xz>.<digest>`.

    Raises:
        ArtifactError: `path` does not exist or is damaged, or the folder cannot be written.
    """
    source = Path(path)
    if not source.is_file():
        raise ArtifactError(f"{source} does not exist")
    home = source.parent if folder is None else Path(folder)
    digest = Entry.of(source).sha256[:_DIGITS]
    target = home / f".{source.name.removesuffix(SUFFIX)}.{digest}"
    if not target.is_file():
        logger.info("%s: expanding to %s", source, target)
        _expand(source, target)
    drop_expansions(source, home, but=target)
    return target


def drop_expansions(path: Path, folder: Path | None = None, *, but: Path | None = None) -> None:
    """Remove what `expand_program` made of a compressed file, now or of older contents.

    Args:
        path: The compressed file.
        folder: Where the plain files were kept; default beside the compressed one.
        but: One to keep.
    """
    stem = f".{path.name.removesuffix(SUFFIX)}."
    made = re.compile(re.escape(stem) + f"[0-9a-f]{{{_DIGITS}}}")
    for other in (folder or path.parent).iterdir():
        if other != but and made.fullmatch(other.name):
            other.unlink(missing_ok=True)


def _expand(source: Path, target: Path) -> None:
    try:
        with (
            replacing(target) as part,
            lzma.open(source, "rb") as packed,
            part.open("wb") as plain,
        ):
            shutil.copyfileobj(packed, plain, _CHUNK)
    except (lzma.LZMAError, EOFError) as error:
        raise ArtifactError(f"{source} is damaged or truncated: {error}; copy it again") from error
    except OSError as error:
        raise ArtifactError(
            f"{source} cannot be expanded into {target.parent}: {error}; give a folder that can be "
            f"written to expand_program, and its result to XnnpackRunner"
        ) from error
