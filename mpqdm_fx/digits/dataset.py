"""The data of the bundled model: scikit-learn's handwritten digits at 16 x 16, split once.

1797 images of 8 x 8 pixels become 16 x 16 by bilinear interpolation, values in [-1, 1]. The split
is stratified and fixed: of each class, 36 images are held out (360 in all) and are seen neither by
the diffusion model nor by the classifier that judges its samples.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.errors import ConfigError

IMAGE_SIZE = 16
NUM_CLASSES = 10
HELD_OUT_PER_CLASS = 36
SPLIT_SEED = 0
HELD_OUT_RULE = (
    "for each class 0..9 in turn, torch.randperm of its image indices (in load_digits' order) with "
    "one torch.Generator seeded 0; the first 36 of each class are held out, then sorted"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsSplit:
    """The digits, split into what may be trained on and what may not.

    Attributes:
        train_images: float32 [1437, 1, 16, 16] in [-1, 1].
        train_labels: int64 [1437], 0..9.
        held_out_images: float32 [360, 1, 16, 16] in [-1, 1].
        held_out_labels: int64 [360], 36 of each class.
        held_out_indices: int64 [360], sorted positions in scikit-learn's order.
    """

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    held_out_indices: Tensor


def load_digits_split() -> DigitsSplit:
    """Read the digits from scikit-learn and split them by `HELD_OUT_RULE`.

    Returns:
        The split; the same tensors at every call.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            'the digits come with scikit-learn; install it with: pip install "mpqdm-fx[report]"'
        ) from error
    bunch = load_digits()
    pixels = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)  # [1797, 1, 8, 8], 0..16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    images = functional.interpolate(
        pixels / 8 - 1, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False
    )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    held_out = []
    for label in range(NUM_CLASSES):
        indices = torch.nonzero(labels == label).flatten()
        order = torch.randperm(len(indices), generator=generator)
        held_out.append(indices[order[:HELD_OUT_PER_CLASS]])
    held_out_indices = torch.cat(held_out).sort().values
    is_train = torch.ones(len(labels), dtype=torch.bool)
    is_train[held_out_indices] = False
    return DigitsSplit(
        train_images=images[is_train],
        train_labels=labels[is_train],
        held_out_images=images[held_out_indices],
        held_out_labels=labels[held_out_indices],
        held_out_indices=held_out_indices,
    )


def shift_randomly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by -1, 0 or +1 pixel along each axis, filling with background.

    Args:
        images: float [N, 1, H, W] in [-1, 1]; -1 is background.
        generator: source of the shifts; two draws of [N] are taken.

    Returns:
        Images of the same shape.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    down = torch.randint(0, 3, (count,), generator=generator)
    right = torch.randint(0, 3, (count,), generator=generator)
    rows = down[:, None, None] + torch.arange(height)[None, :, None]  # [N, H, 1]
    columns = right[:, None, None] + torch.arange(width)[None, None, :]  # [N, 1, W]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns].unsqueeze(1)
