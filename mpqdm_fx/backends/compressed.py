"""Programs and weight files as `.xz` on disk, expanded to what runs.

Codes of few bits take a byte each in an XNNPACK program (four bits where it has such a kernel), but
use few of its values; an entropy coder takes them down to about their own bits. XZ is in Python's
standard library and on every platform, and its files hold a SHA-256 of their content. In bit planes
of own kernels XZ finds little: there the entropy coder of stored weights does the work
(`lowbit.coded_program`).
"""

import logging
import lzma
import re
from pathlib import Path

import numpy as np

from mpqdm_fx.backends.kernel_library import place_codes
from mpqdm_fx.backends.lowbit.coded_program import take_codes
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.expansion import expand, expansion_path
from mpqdm_fx.io.files import replacing
from mpqdm_fx.io.sealed import Entry

__all__ = ["SUFFIX", "compress_program", "drop_expansions", "expand_program"]

logger = logging.getLogger(__name__)

SUFFIX = ".xz"
_CHUNK = 1 << 20
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
        lzma.open(part, "wb", check=lzma.CHECK_SHA256, filters=_FILTERS) as packed,
    ):
        if source.stat().st_size:
            plain = np.memmap(source, mode="c")  # its changes stay in memory
            codes = take_codes(plain)
            for start in range(0, len(plain), _CHUNK):
                packed.write(plain[start : start + _CHUNK].tobytes())
            packed.write(codes)
    logger.info("%s: %d bytes, %d expanded", target, target.stat().st_size, source.stat().st_size)
    if not keep:
        source.unlink()
    return target


def expand_program(
    path: str | Path,
    folder: str | Path | None = None,
    *,
    content: Entry | None = None,
    source: Path | None = None,
    sha256: str | None = None,
) -> Path:
    """The plain file of a compressed one.

    It is named after the compressed file's content, so a program that was replaced is expanded
    anew, and what an older one left is removed. One that is there is taken only where its content
    is known to be right. The file appears only when it is whole.

    Args:
        path: File written by `compress_program`.
        folder: Where to keep the plain file; default beside the compressed one.
        content: Size and hash of the plain file, where a manifest names them. Without them it is
            expanded at every call, to at most 256 times the compressed size.
        source: What to read in place of `path`, if it was opened already.
        sha256: Hash of what is read, hexadecimal, if it was hashed already.

    Returns:
        The plain file, `.<name without .xz>.<digest>`.

    Raises:
        ArtifactError: `path` does not exist, is damaged, or holds something else, or the folder
            cannot be written.
        LoweringError: Its weights are read by the library of own kernels, which is not there.
    """
    named = Path(path)
    read = source or named
    if not read.is_file():
        raise ArtifactError(f"{named} does not exist")
    home = named.parent if folder is None else Path(folder)
    target = expansion_path(named, sha256 or Entry.of(read).sha256, home)
    logger.info("%s: expanding to %s", named, target)
    expand(read, target, content=content, name=named, complete=place_codes)
    drop_expansions(named, home, but=target)
    return target


def drop_expansions(path: Path, folder: Path | None = None, *, but: Path | None = None) -> None:
    """Remove what `expand_program` made of a compressed file, now or of older contents.

    Args:
        path: The compressed file.
        folder: Where the plain files were kept; default beside the compressed one.
        but: One to keep.
    """
    stem = f".{path.name.removesuffix(SUFFIX)}."
    pattern = re.compile(re.escape(stem) + "[0-9a-f]{16}")
    for file in (folder or path.parent).iterdir():
        if file != but and pattern.fullmatch(file.name):
            file.unlink(missing_ok=True)
