"""Networks that judge pictures, from files on the disk: Inception's features, LPIPS, and CLIP.

The first two are the TorchScript files that came with StyleGAN2-ADA, `inception-2015-12-05.pt` and
`vgg16.pt`: each runs by itself, without torchvision; CLIP is of transformers (`clip.ClipScore`).
Nothing is downloaded.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.errors import ArtifactError, ConfigError, first_line

__all__ = ["Networks", "open_networks"]

_BATCH = 32


class Networks:
    """What is measured of pictures beyond the offline metrics.

    Args:
        inception: Called with uint8 pictures [N, 3, H, W] and `return_features=True`, it returns
            features [N, D]; None for no such network.
        perceptual: Called with pictures of 0..255 [N, 3, H, W], `resize_images=False` and
            `return_lpips=True`, it returns [N, D], whose squared distance is LPIPS.
        clip: Called with uint8 pictures [N, 3, H, W] and N texts, it returns their CLIP score.
    """

    def __init__(
        self,
        inception: Callable[..., Tensor] | None = None,
        perceptual: Callable[..., Tensor] | None = None,
        clip: Callable[[Tensor, Sequence[str]], float] | None = None,
    ) -> None:
        self._inception = inception
        self._perceptual = perceptual
        self._clip = clip

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured, as in `gates.METRICS`."""
        networks = {
            "inception_distance": self._inception,
            "inception_kernel_distance": self._inception,
            "lpips": self._perceptual,
            "clip_score": self._clip,
        }
        return tuple(name for name, network in networks.items() if network is not None)

    @torch.no_grad()
    def inception_features(self, images: Tensor) -> Tensor:
        """Features [N, D] of pictures [N, 1 or 3, H, W] in [-1, 1]; NaN of a picture that has NaN.

        Raises:
            ConfigError: The network is not there, or does not take the pictures.
        """
        features = _in_batches(
            self._inception,
            _coloured(images).round().to(torch.uint8),
            "--inception",
            return_features=True,
        )
        # a pixel of 8 bits cannot be NaN: it would look like any other
        unsound = images.isnan().flatten(1).any(dim=1)
        return features.masked_fill(unsound[:, None].to(features.device), math.nan)

    @torch.no_grad()
    def perceptual_distance(self, reference_images: Tensor, images: Tensor) -> float:
        """Mean LPIPS (Zhang et al. 2018) of pictures [N, 1 or 3, H, W] in [-1, 1], pair by pair.

        Raises:
            ConfigError: The network is not there, or does not take the pictures.
        """
        expected, actual = (
            _in_batches(
                self._perceptual,
                _coloured(pictures),
                "--lpips",
                resize_images=False,
                return_lpips=True,
            )
            for pictures in (reference_images, images)
        )
        return float((expected.double() - actual.double()).square().sum(dim=1).mean())

    @torch.no_grad()
    def clip_score(self, images: Tensor, prompts: Sequence[str]) -> float:
        """CLIP score (Hessel et al. 2021) of pictures [N, 1 or 3, H, W] in [-1, 1], 0..100.

        NaN where a picture has NaN.

        Args:
            images: The pictures.
            prompts: What each is to show.

        Raises:
            ConfigError: The network is not there, or there is not one prompt a picture.
        """
        if self._clip is None:
            raise ConfigError("--clip PATH is missing: the network's folder")
        if len(prompts) != len(images):
            raise ConfigError(
                f"clip_score: {len(images)} pictures and {len(prompts)} prompts; CLIP compares "
                f"each picture with its own"
            )
        if bool(images.isnan().any()):  # which pixels of 8 bits cannot hold
            return math.nan
        return self._clip(_coloured(images).round().to(torch.uint8), prompts)


def open_networks(
    inception: Path | None = None,
    lpips: Path | None = None,
    clip: Callable[[Tensor, Sequence[str]], float] | None = None,
) -> Networks:
    """Load the networks that are named.

    A TorchScript file is a program: open only files of people whom you trust.

    Args:
        inception: File of Inception's features.
        lpips: File of LPIPS.
        clip: What `pipelines.clip.open_clip` opened.

    Raises:
        ArtifactError: A file is missing, or no TorchScript.
    """
    return Networks(_opened(inception, "--inception"), _opened(lpips, "--lpips"), clip)


def _opened(path: Path | None, option: str) -> Any:
    if path is None:
        return None
    if not path.is_file():
        raise ArtifactError(
            f"{option} {path}: there is no such file, and nothing is downloaded; give the "
            f"TorchScript file"
        )
    try:
        return torch.jit.load(path, map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ArtifactError(
            f"{option} {path}: no TorchScript file, or a damaged one: {first_line(error)}"
        ) from None


def _coloured(images: Tensor) -> Tensor:
    """Pictures as float 0..255 [N, 3, H, W]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ConfigError(
            f"these networks look at pictures of 1 or 3 channels, not {tuple(images.shape)}"
        )
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).expand(-1, 3, -1, -1)


def _in_batches(network: Any, pixels: Tensor, option: str, **options: bool) -> Tensor:
    if network is None:
        raise ConfigError(f"{option} PATH is missing: the network's file")
    try:
        parts = torch.split(pixels, _BATCH)
        features = torch.cat([network(part, **options) for part in parts])
    except (RuntimeError, ValueError, TypeError) as error:  # of TorchScript: RuntimeErrors
        raise ConfigError(
            f"{option}: the network does not take pictures {tuple(pixels.shape)} with "
            f"{', '.join(options)}: {first_line(error)}"
        ) from None
    if features.ndim != 2 or len(features) != len(pixels):
        raise ConfigError(
            f"{option}: the network gave {tuple(features.shape)} for {len(pixels)} pictures, "
            f"wanted are features [{len(pixels)}, D]"
        )
    return features
