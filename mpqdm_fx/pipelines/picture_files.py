"""Picture files of the runner: what is painted into, and what was drawn.

This file is copied into exported folders, beside `run.py`.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpqdm_fx.pipelines.program_files import RunnerError, refusals

__all__ = ["check_output", "read_picture", "write_picture"]


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is drawn for it.

    Args:
        path: The file.

    Raises:
        RunnerError: Its ending names no format, or nothing can be written there.
    """
    with refusals("picture files need pillow"):
        from PIL import Image
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise RunnerError(f"{path}: its ending names no format of pictures; give one such as .png")
    if path.is_dir():
        raise RunnerError(f"{path} is a folder; give the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RunnerError(f"{path} cannot be written: its folder is not there, or not yours to use")


def read_picture(path: Path, mode: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture in the size that a program takes.

    Args:
        path: The file.
        mode: Pillow's name of the channels, `RGB` or `L`.
        size: Height and width in pixels.

    Returns:
        uint8 [height, width] and channels.

    Raises:
        RunnerError: It is no picture.
    """
    with refusals(f"{path} cannot be read as a picture"):
        from PIL import Image

        return np.asarray(Image.open(path).convert(mode).resize(size[::-1]))


def write_picture(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write what was drawn.

    Args:
        pixels: uint8 [H, W, 3], or [H, W, 1] for grey.
        path: The file.

    Raises:
        RunnerError: It cannot be written.
    """
    with refusals(f"{path} cannot be written"):
        from PIL import Image

        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)
