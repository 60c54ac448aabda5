"""Pictures of samples."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError


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
    from PIL import Image

    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ConfigError(
            f"save_grid takes images [N, 1 or 3, H, W]; got the shape {tuple(images.shape)}"
        )
    if columns < 1 or zoom < 1:
        raise ConfigError(f"columns ({columns}) and zoom ({zoom}) must be at least 1")
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    border = 1
    canvas = torch.full(
        (channels, rows * (height + border) + border, columns * (width + border) + border),
        96,
        dtype=torch.uint8,
    )
    for index in range(count):
        top = border + (index // columns) * (height + border)
        left = border + (index % columns) * (width + border)
        canvas[:, top : top + height, left : left + width] = pixels[index]
    canvas = canvas.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    array = canvas[0].numpy() if channels == 1 else canvas.permute(1, 2, 0).contiguous().numpy()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(array).save(temporary, format=_format_of(path), quality=95)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _format_of(path: Path) -> str:
    """Pillow's name of a file type; PNG where the ending is none of pictures."""
    return {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
