"""Pictures of a page, each a part of the file itself."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.report.images import check_images, pixels_of
from mpqdm_fx.report.page.text import TIMES

__all__ = ["DIFFERENCE", "Gallery", "Row", "gallery_of"]

DIFFERENCE = 8  # what differences are multiplied by to be seen
_MOST = 16  # pictures in a row
_LONGEST = 10  # characters of a label
_SIDE = 192  # larger pictures are made smaller
_LOSSLESS = 64 * 64  # pixels of a picture that is stored exactly


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures of one model, or the difference of two.

    Attributes:
        title: What they are.
        pictures: Each as a `data:` address.
    """

    title: str
    pictures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Rows of pictures from the same noise.

    Attributes:
        rows: Column by column from the same noise.
        labels: Short names of the columns; empty if nothing is said.
        prompts: What each column was to show, where that is too long for a label.
        note: What the pictures are, where they are not the model's own output.
        side: Width and height of a picture in pixels, as it is stored.
        left_out: Pictures that were drawn and are not here.
    """

    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    prompts: tuple[str, ...]
    note: str
    side: tuple[int, int]
    left_out: int


def gallery_of(images: Mapping[str, Tensor], *, labels: Sequence[str], note: str) -> Gallery:
    """What a page shows of pictures; behind each but the first, its difference from the first.

    Args:
        images: float [N, 1 or 3, H, W] in -1..1 by row, the reference first.
        labels: What each picture was to show.
        note: As of `Gallery`.

    Raises:
        ConfigError: There is no picture.
    """
    rows = []
    first = next(iter(images.values()))
    for name, row in images.items():
        check_images(row, f"a gallery, {name}")
        rows.append(_row(name, row))
        if row is not first:
            apart = (row.clamp(-1, 1) - first.clamp(-1, 1)).abs() / 2 * DIFFERENCE
            apart = apart.nan_to_num(nan=1.0)  # black would say that there is no difference
            title = f"difference {TIMES}{DIFFERENCE}"
            if len(images) > 2:
                title = f"{name}, {title}"
            rows.append(_row(title, apart * 2 - 1))
    shown = tuple(labels[:_MOST])
    long = any(len(label) > _LONGEST for label in shown)
    height, width = first.shape[-2:]
    scale = min(1.0, _SIDE / max(height, width))
    return Gallery(
        rows=tuple(rows),
        labels=tuple(str(i + 1) for i in range(len(shown))) if long else shown,
        prompts=shown if long else (),
        note=note,
        side=(round(width * scale), round(height * scale)),
        left_out=max(0, len(first) - _MOST),
    )


def _row(title: str, images: Tensor) -> Row:
    shown = images[:_MOST].detach().float().cpu()
    longest = max(shown.shape[-2:])
    if longest > _SIDE:
        size = [round(side * _SIDE / longest) for side in shown.shape[-2:]]
        shown = functional.interpolate(shown, size=size, mode="area")
    return Row(title=title, pictures=tuple(_address(image) for image in pixels_of(shown)))


def _address(pixels: Tensor) -> str:
    """uint8 [1 or 3, H, W] as a `data:` address."""
    from PIL import Image

    flat = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous()
    picture = Image.fromarray(flat.numpy())
    file = io.BytesIO()
    exact = torch.tensor(pixels.shape[1:]).prod().item() <= _LOSSLESS
    if exact:
        picture.save(file, format="PNG", optimize=True)
    else:
        picture.save(file, format="JPEG", quality=85)
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
