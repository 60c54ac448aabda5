"""Pictures for models that see one: masked images, images to edit, low-resolution ones, depths.

Such UNets take more channels than they predict noise for. No data set comes with a model, so the
pictures are what the model itself draws when it is shown nothing: of those the masked image, the
low-resolution image and so on are made, with seeded masks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.calibration.sampling import EXTRA_CHANNELS, Denoiser, denoise_in_batches
from mpqdm_fx.errors import ConfigError

__all__ = ["ExtraChannels", "extra_channels_of", "random_masks"]

_STEPS = 10
_SHRINK = 4
_DRAW_STREAM = 0x2545F491  # what the seeds of these runs' noise and of the later ones differ by
_USUAL_SCALING = 0.18215  # of Stable Diffusion's latents
_LATENTS = 4

Kind = Literal["masked", "masked_then_mask", "image", "low_resolution", "thumbnail", "depth"]


@dataclass(frozen=True, kw_only=True)
class ExtraChannels:
    """What a model takes behind the noisy channels.

    Attributes:
        noise: Noisy channels.
        count: Channels behind them.
        kind: What they hold. `"masked"`: mask (1 is to be drawn) and masked image, as Stable
            Diffusion's inpainting; `"masked_then_mask"`: masked image and mask (1 is kept), as
            Kandinsky's; `"image"`: an image to edit, latents without their scaling;
            `"low_resolution"`: an image of few pixels, enlarged; `"thumbnail"`: an image of as many
            pixels as the latents have; `"depth"`: one channel from -1 to 1.
        scaling: What the pipeline multiplies latents with.
    """

    noise: int
    count: int
    kind: Kind
    scaling: float = 1.0

    def nothing(self, samples: Tensor) -> Tensor:
        """The channels that show nothing: all masked, or zeros.

        Args:
            samples: [N, noise, H, W].
        """
        empty = samples.new_zeros(len(samples), self.count, *samples.shape[2:])
        if self.kind == "masked":
            empty[:, 0] = 1.0
        return empty

    def of_samples(self, samples: Tensor, generator: torch.Generator) -> Tensor:
        """The channels that show samples, float [N, count, H, W].

        Args:
            samples: [N, noise, H, W], finished.
            generator: Of the masks.
        """
        if self.kind in ("masked", "masked_then_mask"):
            mask = random_masks(len(samples), samples.shape[2:], generator).to(samples)
            if self.kind == "masked":
                return torch.cat([mask, samples * (1 - mask)], dim=1)
            return torch.cat([samples * (1 - mask), 1 - mask], dim=1)
        if self.kind == "image":
            return samples / self.scaling
        if self.kind == "low_resolution":
            return _coarse(samples).clamp(-1, 1)
        if self.kind == "thumbnail":
            return _to_unit(samples[:, : self.count])
        return _to_unit(_coarse(samples.mean(dim=1, keepdim=True)))

    def draw(
        self,
        model: Denoiser,
        scheduler: Any,
        sides: Sequence[int],
        conditions: Mapping[str, Any],
        *,
        count: int,
        seed: int,
    ) -> Tensor:
        """The channels that show what the model draws when it is shown nothing.

        Args:
            model: Predicts the noise.
            scheduler: A diffusers scheduler; it is copied.
            sides: Height and width of a sample.
            conditions: Of so many samples, without these channels.
            count: Samples.
            seed: Of noise and masks.

        Returns:
            Float [count, self.count, H, W].
        """
        generator = torch.Generator().manual_seed((seed + _DRAW_STREAM) % 2**63)
        noise = torch.randn(count, self.noise, *sides, generator=generator)
        samples = denoise_in_batches(
            model,
            scheduler,
            noise,
            num_inference_steps=_STEPS,
            seed=seed,
            conditions={**conditions, EXTRA_CHANNELS: self.nothing(noise)},
            progress="drawing what is shown",
        )
        return self.of_samples(samples, generator)


def extra_channels_of(
    config: Mapping[str, Any], *, learned_variance: bool, scaling: float | None = None
) -> ExtraChannels | None:
    """What channels a model takes that are no noise, by its config.

    Args:
        config: Of a UNet that is called with a noisy image.
        learned_variance: Whether the scheduler reads a variance in the second half of what the
            model predicts.
        scaling: What the folder's autoencoder multiplies latents with, if it is known.

    Returns:
        None if all channels are noise.

    Raises:
        ConfigError: There are such channels, of a kind that is not known.
    """
    taken, predicted = config["in_channels"], config.get("out_channels") or config["in_channels"]
    added = str(config.get("addition_embed_type"))
    taken -= 4 if added == "image_hint" else 0  # the hint becomes channels inside the model
    noise = predicted // 2 if learned_variance and predicted % 2 == 0 else predicted
    if taken == noise or predicted == 2 * taken:
        return None
    count = taken - noise
    kandinsky = added in ("image", "text_image")
    kinds: dict[int, Kind] = {
        noise + 1: "masked_then_mask" if kandinsky else "masked",
        noise: "low_resolution" if noise == 3 else "image",
    }
    if noise == _LATENTS:
        kinds |= {3: "thumbnail", 1: "depth"}
    if count not in kinds:
        raise ConfigError(
            f"the model takes {taken} channels and predicts {predicted}: it is not known what the "
            f"other {count} hold; use the Python interface with calls of your own: "
            f"mpqdm_fx.quantize(model, config, calls)"
        )
    latents = noise == _LATENTS and kinds[count] == "image"
    usual = _USUAL_SCALING if latents else 1.0
    return ExtraChannels(
        noise=noise, count=count, kind=kinds[count], scaling=(scaling or usual) if latents else 1.0
    )


def random_masks(count: int, sides: Sequence[int], generator: torch.Generator) -> Tensor:
    """Masks with a random rectangle of ones each, float [count, 1, H, W]."""
    masks = torch.zeros(count, 1, *sides)
    for mask in masks:
        ends = torch.rand(2, 2, generator=generator).sort(dim=1).values
        (top, bottom), (left, right) = (
            (int(low * side), int(high * side) + 1)
            for (low, high), side in zip(ends.tolist(), sides, strict=True)
        )
        mask[:, top:bottom, left:right] = 1.0
    return masks


def _coarse(samples: Tensor) -> Tensor:
    """Samples of a quarter of the sides, enlarged again."""
    small = [max(1, side // _SHRINK) for side in samples.shape[2:]]
    shrunk = functional.interpolate(samples, size=small, mode="area")
    return functional.interpolate(shrunk, size=samples.shape[2:], mode="bilinear")


def _to_unit(samples: Tensor) -> Tensor:
    """Each sample stretched to the range from -1 to 1."""
    low = samples.amin(dim=(1, 2, 3), keepdim=True)
    high = samples.amax(dim=(1, 2, 3), keepdim=True)
    return 2 * (samples - low) / (high - low).clamp_min(1e-6) - 1
