"""Pictures of the runner: their sizes, what is painted into, and the files.

This file is copied into exported folders, beside `run.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqdm_fx.pipelines.medium import Medium, check_place, whole_file
from mpqdm_fx.pipelines.program_files import RunnerError, refusals

__all__ = ["Pictures", "area_of", "picture_of", "read_picture"]

_SLACK = 1e-3  # of values in 0..1 that were computed


class Pictures(Medium):
    """A size is height and width in pixels; values are 0..1, codes uint8."""

    noun: ClassVar[str] = "image"
    measures: ClassVar[Mapping[str, type[int] | type[float]]] = {"height": int, "width": int}
    file: ClassVar[str] = "image.png"

    def size(self, asked: Mapping[str, float]) -> tuple[int, ...]:
        """The very size that is asked for; a side that is not is the default's."""
        default = dict(zip(self.measures, self.sizes[0], strict=True))
        sides = {**default, **asked}
        size = tuple(int(sides[name]) for name in self.measures)
        if size not in self.sizes:
            known = ", ".join(f"{height}x{width}" for height, width in self.sizes)
            raise RunnerError(
                f"there is no program for {size[0]}x{size[1]} pixels; sizes of this folder: "
                f"{known}; export it with that size"
            )
        return size

    def values(self, made: Tensor) -> NDArray[np.float32]:
        """Of [1, channels, H, W]: [H, W, channels] in 0..1."""
        values: NDArray[np.float32] = (made / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
        return values

    def codes(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """uint8 [H, W, channels]."""
        return (values * 255).round().astype(np.uint8)

    def check_output(self, path: Path) -> None:
        """Refuse what pillow writes no pictures to."""
        with refusals("picture files need pillow"):
            from PIL import Image
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
            raise RunnerError(
                f"{path}: its ending names no format of pictures; give one such as .png"
            )
        check_place(path)

    def write(self, codes: NDArray[Any], path: Path) -> None:
        """Write uint8 [H, W, 3], or [H, W, 1] for grey."""
        with whole_file(path) as part:
            from PIL import Image

            Image.fromarray(codes.squeeze(-1) if codes.shape[-1] == 1 else codes).save(part)


def read_picture(path: Path, mode: str, size: tuple[int, ...]) -> NDArray[np.uint8]:
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
        from PIL import Image, ImageOps

        height, width = size
        # upright and by the filter, as diffusers reads and resizes pictures
        upright = ImageOps.exif_transpose(Image.open(path)).convert(mode)
        return np.asarray(upright.resize((width, height), Image.Resampling.LANCZOS))


def picture_of(image: Any, size: tuple[int, ...]) -> Tensor:
    """What a picture is drawn from, as a loop takes it: float [1, 3, H, W] in 0..1.

    Args:
        image: uint8 [H, W, 3], or float in 0..1.
        size: Height and width of the program.

    Raises:
        RunnerError: It has another shape, or values out of range.
    """
    return _unit(image, (*size, 3), "image").permute(2, 0, 1)[None]


def area_of(mask: Any, size: tuple[int, ...]) -> Tensor:
    """Where to draw, as a loop takes it: float [1, 1, H, W], zeros and ones.

    Args:
        mask: [H, W], uint8, bool, or float in 0..1; drawn is from the middle of the range on.
        size: Height and width of the program.

    Raises:
        RunnerError: It has another shape, or values out of range.
    """
    return (_unit(mask, size, "mask") >= 0.5).float()[None, None]


def _unit(value: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Numbers in 0..1 of an array, of bytes or already in that range."""
    array = np.asarray(value)
    if array.shape != shape:
        raise RunnerError(f"{name} has shape {array.shape}, the program takes {shape}")
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    values = array.astype(np.float32) / np.float32(scale)
    if not ((values > -_SLACK) & (values < 1 + _SLACK)).all():  # NaN lies in no range
        raise RunnerError(
            f"{name} has values from {values.min():g} to {values.max():g}; give bytes (uint8) or "
            f"numbers from 0 to 1"
        )
    return torch.from_numpy(values)
