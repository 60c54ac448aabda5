"""Write a `.pte` so that it appears only when it was found to be right."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["written"]


@contextlib.contextmanager
def written(program: Any, path: Path) -> Iterator[Path]:
    """Write a program beside `path`; rename it when the block is through, else remove it.

    Args:
        program: ExecuTorch's program manager.
        path: Where the file is to be; its folder is made.

    Yields:
        The file under its temporary name, to be tried.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            program.write_to_file(file)
        yield part
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
