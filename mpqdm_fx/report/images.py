"""Pictures of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["check_images", "pixels_of", "save_grid", "save_rows"]

_GREY = 96  # between images
_PAPER, _INK = 255, 32
_MARGIN = 8  # around a block of rows, in picture pixels
_LABEL = 14  # size of the labels, in picture pixels
_SMALLEST = 64  # side of an image in a picture of labelled rows, in picture pixels


def save_grid(images: Tensor, path: str | Path, columns: int = 8, *, zoom: int = 4) -> Path:
    """Write a batch of images as one picture, row by row; the file appears whole or not at all.

    Args:
        images: float [N, 1 or 3, H, W] in [-1, 1]; values outside are clipped.
        path: the file to write, .png, .jpg or .webp; its folder is made if absent.
        columns: images in a row.
        zoom: side of one pixel in the picture, in picture pixels.

    Returns:
        The path.

    Raises:
        ConfigError: no image, a shape that is no image, or columns or zoom below one.
    """
    check_images(images, "save_grid")
    if columns < 1 or zoom < 1:
        raise ConfigError(f"columns ({columns}) and zoom ({zoom}) must be at least 1")
    return _write(_picture(_tiled(images, columns, zoom)), Path(path))


def save_rows(rows: Sequence[tuple[str, Tensor]], path: str | Path, *, columns: int = 16) -> Path:
    """Write batches of images as labelled rows, one below the other, image below image.

    Of many images there are several blocks of such rows. The file appears whole or not at all.

    Args:
        rows: label and float [N, 1 or 3, H, W] in [-1, 1], the same shape in all rows.
        path: the file to write; its folder is made if absent.
        columns: most images in a row.

    Returns:
        The path.

    Raises:
        ConfigError: no row, no image, a shape that is no image, or rows of different shapes.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows or columns < 1:
        raise ConfigError("save_rows takes at least one row, and at least one column")
    shape = rows[0][1].shape
    for label, images in rows:
        check_images(images, f"save_rows, {label}")
        if images.shape != shape:
            raise ConfigError(f"save_rows: {label} has {tuple(images.shape)}, not {tuple(shape)}")
    font = ImageFont.load_default(_LABEL)
    zoom, indent = _zoom(shape), _MARGIN + round(max(font.getlength(name) for name, _ in rows))
    starts = range(0, shape[0], columns)
    blocks = [
        [(label, _picture(_tiled(images[start : start + columns], columns, zoom)))
         for label, images in rows]
        for start in starts
    ]  # fmt: skip
    width = indent + _MARGIN + blocks[0][0][1].width + _MARGIN
    height = _MARGIN + sum(
        sum(picture.height for _, picture in block) + _MARGIN for block in blocks
    )
    mode, paper = ("L", _PAPER) if shape[1] == 1 else ("RGB", (_PAPER,) * 3)
    canvas = Image.new(mode, (width, height), paper)
    draw = ImageDraw.Draw(canvas)
    top = _MARGIN
    for block in blocks:
        for label, picture in block:
            middle = top + picture.height // 2
            ink = _INK if mode == "L" else (_INK,) * 3
            draw.text((indent, middle), label, fill=ink, font=font, anchor="rm")
            canvas.paste(picture, (indent + _MARGIN, top))
            top += picture.height
        top += _MARGIN
    return _write(canvas, Path(path))


def check_images(images: Tensor, caller: str) -> None:
    """Refuse what is no batch of images.

    Args:
        images: what is to be drawn.
        caller: who asks, for the message.

    Raises:
        ConfigError: no image, or a shape that is no image.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ConfigError(
            f"{caller} takes images [N, 1 or 3, H, W]; got the shape {tuple(images.shape)}"
        )


def pixels_of(images: Tensor) -> Tensor:
    """Values in [-1, 1] as pixels, uint8 of the same shape; others are clipped, NaN is -1."""
    values = images.detach().float().cpu().nan_to_num(nan=-1.0).clamp(-1, 1)
    return ((values + 1) * 127.5).round().to(torch.uint8)


def _zoom(shape: Sequence[int]) -> int:
    """Side of a pixel that makes small images large enough to look at, in picture pixels.

    Args:
        shape: [N, C, H, W].
    """
    return max(1, _SMALLEST // max(shape[-2:]))


def _tiled(images: Tensor, columns: int, zoom: int) -> Tensor:
    """Images side by side with a border, uint8 [C, H, W]; cells without image are grey."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows, border = -(-count // columns), 1
    pixels = pixels_of(images)
    canvas = torch.full(
        (channels, rows * (height + border) + border, columns * (width + border) + border),
        _GREY,
        dtype=torch.uint8,
    )
    for index in range(count):
        top = border + (index // columns) * (height + border)
        left = border + (index % columns) * (width + border)
        canvas[:, top : top + height, left : left + width] = pixels[index]
    return canvas.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


def _picture(canvas: Tensor) -> "Image":
    from PIL import Image

    flat = canvas[0] if len(canvas) == 1 else canvas.permute(1, 2, 0).contiguous()
    return Image.fromarray(flat.numpy())


def _write(picture: "Image", path: Path) -> Path:
    with replacing(path) as part:
        picture.save(part, format=_format_of(path), quality=95)
    return path


def _format_of(path: Path) -> str:
    """Pillow's name of a file type; PNG where the ending is none of pictures."""
    return {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
