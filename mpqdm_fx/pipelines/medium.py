"""What a folder makes, pictures or sounds: how a size is asked for, and how it becomes a file.

This file is copied into exported folders, beside `run.py`.
"""

import contextlib
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpqdm_fx.pipelines.program_files import RunnerError, refusals

__all__ = ["Medium", "check_place", "whole_file"]


class Medium(ABC):
    """What the samples of a kind of pipeline are.

    Args:
        sizes: Those that a folder has programs for; the first is the default.
        settings: As of `Spec`.
    """

    #: What one is called.
    noun: ClassVar[str]
    #: What asks for a size, with the type of its value.
    measures: ClassVar[Mapping[str, type[int] | type[float]]]
    #: What `run.py` writes where nothing is said.
    file: ClassVar[str]

    def __init__(self, sizes: Sequence[tuple[int, ...]], settings: Mapping[str, Any]) -> None:
        self.sizes = sizes
        self.settings = settings

    @abstractmethod
    def size(self, asked: Mapping[str, float]) -> tuple[int, ...]:
        """The size of the programs that make what is asked for.

        Args:
            asked: Values of some of `measures`.

        Raises:
            RunnerError: No programs have such a size; says which sizes there are.
        """

    @abstractmethod
    def values(self, made: Tensor) -> NDArray[np.float32]:
        """What the decoder made, as floating-point numbers with the channels last.

        Args:
            made: Float [1, channels, ...], about -1 to 1.
        """

    @abstractmethod
    def codes(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """The integers of a file; same shape as `values`."""

    @abstractmethod
    def check_output(self, path: Path) -> None:
        """Refuse a file that cannot be written, before anything is made for it.

        Raises:
            RunnerError: Its ending names no format, or nothing can be written there.
        """

    @abstractmethod
    def write(self, codes: NDArray[Any], path: Path) -> None:
        """Write what was made.

        Args:
            codes: As `codes` returns them.
            path: The file.

        Raises:
            RunnerError: It cannot be written.
        """


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name of the same ending, to be written to, that becomes `path` when the block ends well.

    Args:
        path: The file; an older one stays until then.

    Raises:
        RunnerError: It cannot be written, for instance to a full disk; nothing is left of it.
    """
    place = Path(os.path.realpath(path))  # of a link, the file it leads to
    with refusals(f"{path} cannot be written"):
        if place.exists() and not place.is_file():  # a device takes what is written to it
            yield place
            return
        part = place.with_name(f".{secrets.token_hex(8)}{place.suffix}")
        try:
            yield part
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Refuse a place where no file can be written.

    Args:
        path: The file.

    Raises:
        RunnerError: Says why.
    """
    if path.is_dir():
        raise RunnerError(f"{path} is a folder; give the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RunnerError(f"{path} cannot be written: its folder is not there, or not yours to use")
