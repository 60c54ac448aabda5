"""Write files so that they appear only when they were found to be right."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpqdm_fx.io.files import replacing

__all__ = ["written"]


@contextlib.contextmanager
def written(program: Any, path: Path, weights: Path | None = None) -> Iterator[tuple[Path, ...]]:
    """Write a program beside `path`; rename it when the block is through, else remove it.

    Args:
        program: ExecuTorch's program manager.
        path: Where the file is to be; its folder is made.
        weights: Where its weights are to be, if they are in a file of their own.

    Yields:
        The file under its temporary name, to be tried; then that of the weights, if there are any.
    """
    with contextlib.ExitStack() as stack:
        # Left in reverse order: no program appears before its weights.
        part = stack.enter_context(replacing(path))
        with part.open("wb") as file:
            program.write_to_file(file)
        if weights is None:
            del program  # a copy of all weights, which is in the file now
            yield (part,)
            return
        data = stack.enter_context(replacing(weights))
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=data.parent))
        program.write_tensor_data_to_file(folder)
        del program
        (ptd,) = Path(folder).iterdir()
        ptd.replace(data)
        yield part, data
