"""The bundled model: a class-conditional denoiser of digits, trained by `tools/train_digits.py`.

Everything lies in the package's folder `digits/` in the form diffusers saves: `unet/`,
`scheduler/`, and beside them `classifier.safetensors` and `training_log.json`. Weights are stored
in half precision and loaded as float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpqdm_fx.digits.classifier import DigitsClassifier, load_classifier
from mpqdm_fx.digits.dataset import load_digits_split
from mpqdm_fx.errors import ArtifactError

if TYPE_CHECKING:  # diffusers imports torchao, and importing this package must not
    from diffusers import DDIMScheduler, UNet2DModel

__all__ = [
    "digits_folder",
    "held_out_digits",
    "load_digits_classifier",
    "load_digits_scheduler",
    "load_digits_unet",
]


def digits_folder() -> Path:
    """Return the folder of the bundled model's files.

    Raises:
        ArtifactError: the package was installed without them.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "unet" / "config.json").exists():
        raise ArtifactError(
            f"{folder} lacks the bundled digits model; reinstall the package, or train it with: "
            "python tools/train_digits.py --output DIR"
        )
    return folder


def load_digits_unet() -> UNet2DModel:
    """Load the bundled denoiser.

    Returns:
        A `UNet2DModel` (1.74 million parameters), float32, in eval mode, called as
        `model(sample=[B, 1, 16, 16], timestep=int64 [B], class_labels=int64 [B])`, predicting
        noise.

    Raises:
        ArtifactError: the files are missing.
    """
    from diffusers import UNet2DModel

    model = UNet2DModel.from_pretrained(
        digits_folder() / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    loaded: UNet2DModel = model.eval()
    return loaded


def load_digits_scheduler() -> DDIMScheduler:
    """Load the scheduler of the bundled model: squared-cosine betas, 1000 training timesteps.

    Raises:
        ArtifactError: the files are missing.
    """
    from diffusers import DDIMScheduler

    scheduler: DDIMScheduler = DDIMScheduler.from_pretrained(digits_folder() / "scheduler")
    return scheduler


def load_digits_classifier() -> DigitsClassifier:
    """Load the classifier that judges samples: 10 classes, 64 features, float32, in eval mode.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    return load_classifier(digits_folder() / "classifier.safetensors")


def held_out_digits() -> tuple[Tensor, Tensor]:
    """Return the real digits that neither the denoiser nor the classifier was trained on.

    Returns:
        Images float32 [360, 1, 16, 16] in [-1, 1], and labels int64 [360], 36 of each class.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    split = load_digits_split()
    return split.held_out_images, split.held_out_labels
