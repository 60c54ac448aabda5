"""How diffusers' models are called along a schedule: what their pipelines know and they do not say.

A pipeline names the noisy argument as the model does, scales the time to what the model was trained
with, turns the sign of the answer, cuts samples into tokens, and may shift the schedule by their
number (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.3.2). A class that is
not in the table is called as UNets are: `sample` and `timestep`, as the scheduler has them.

The file needs torch alone, so that it goes with an exported pipeline.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mpqdm_fx.errors import CalibrationError

__all__ = ["CONVENTIONS", "CallingConvention", "convention_of", "resolution_shift", "token_count"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallingConvention:
    """How a model is called along a schedule; all values are plain, and survive JSON.

    The model is told `(time_end - t) * time_scale / time_divisor` of a scheduler's timestep t,
    without a `time_end` `t * time_scale / time_divisor`.

    Attributes:
        sample: Name of the argument for noisy samples.
        timestep: Name of the argument for times.
        time_scale: Factor of times.
        time_divisor: Divisor of times.
        time_end: What times are subtracted from; None leaves them as they are.
        negated: Whether the model predicts what the scheduler takes with the other sign.
        even_sigmas: Whether noise levels go evenly from 1 to 1/steps, and not as the scheduler has
            them by itself.
        patch: Side of the square that is one token; None if it is not known.
        packed: Whether samples are sequences [tokens, channels], and no pictures [C, H, W].
        shifted: Whether a scheduler that shifts by the number of tokens (`use_dynamic_shifting`)
            is told it. Some pipelines tell none.
        eta: Share of noise that is told to schedulers that take it (DDIM, TCD); None tells nothing,
            and theirs holds.
        max_shift: Largest shift by the number of tokens where the scheduler does not say it.
        steps_shift: Whether the shift is Flux.2's, by the numbers of tokens and steps, whatever the
            scheduler says.
    """

    sample: str = "sample"
    timestep: str = "timestep"
    time_scale: float = 1.0
    time_divisor: float = 1.0
    time_end: float | None = None
    negated: bool = False
    even_sigmas: bool = False
    patch: int | None = None
    packed: bool = False
    shifted: bool = True
    eta: float | None = 0.0
    max_shift: float = 1.15
    steps_shift: bool = False

    def model_times(self, timesteps: Tensor) -> Tensor:
        """Times as the model is told them.

        Args:
            timesteps: Of the scheduler, int64 or float32 [...].

        Returns:
            The same shape; int64 stays int64 where times are told as they are.
        """
        if self.time_scale == self.time_divisor == 1.0 and self.time_end is None:
            return timesteps
        times = timesteps.float()
        times = times if self.time_end is None else self.time_end - times
        return times * self.time_scale / self.time_divisor

    def prediction(self, output: Tensor) -> Tensor:
        """What the scheduler takes for a model's output; same shape."""
        return -output if self.negated else output


#: Slope in tokens and value at none of Flux.2's shift, for 10 and for 200 steps.
_FEW_STEPS, _MANY_STEPS = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666)
_LARGE = 4300  # tokens

_PICTURES = CallingConvention(sample="hidden_states", shifted=False)
_UNET = CallingConvention(shifted=False)
_PACKED = CallingConvention(
    sample="hidden_states", time_divisor=1000.0, even_sigmas=True, packed=True
)
_Z_IMAGE = CallingConvention(
    sample="x", timestep="t", time_end=1000.0, time_divisor=1000.0, negated=True,
    even_sigmas=True, patch=2,
)  # fmt: skip

#: By class name; `convention_of` adds what the config says.
CONVENTIONS: Mapping[str, CallingConvention] = {
    "AuraFlowTransformer2DModel": dataclasses.replace(_PICTURES, time_divisor=1000.0),
    "ChromaTransformer2DModel": _PACKED,
    "DiTTransformer2DModel": _PICTURES,
    "Flux2Transformer2DModel": dataclasses.replace(_PACKED, steps_shift=True),
    "FluxTransformer2DModel": _PACKED,
    "PixArtTransformer2DModel": _PICTURES,
    "QwenImageTransformer2DModel": _PACKED,
    "SD3Transformer2DModel": dataclasses.replace(_PICTURES, shifted=True, max_shift=1.16),
    "SanaTransformer2DModel": _PICTURES,
    "StableAudioDenoiser": _PICTURES,  # what `export_pipeline` makes of it
    "StableAudioDiTModel": _PICTURES,  # sounds have an axis less
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": _UNET,
    "ZImageDenoiser": _Z_IMAGE,  # what `export_pipeline` makes of it
    # takes lists, so a module around it stacks them
    "ZImageTransformer2DModel": _Z_IMAGE,
}


def convention_of(class_name: str, config: Mapping[str, Any]) -> CallingConvention:
    """How the models of a class are called.

    Args:
        class_name: Name of the model's class.
        config: Its settings; `patch_size` and `timestep_scale` are read.
    """
    known = CONVENTIONS.get(class_name, CallingConvention())
    if known.packed:  # what a token is was decided before
        return known
    patch, scale = config.get("patch_size"), config.get("timestep_scale")
    if known.patch is None and isinstance(patch, int) and patch > 0:
        known = dataclasses.replace(known, patch=patch)
    if class_name in CONVENTIONS and isinstance(scale, int | float):
        known = dataclasses.replace(known, time_scale=float(scale))
    return known


def token_count(convention: CallingConvention, sample_shape: Sequence[int]) -> int:
    """How many tokens a sample has.

    Args:
        convention: Of the model.
        sample_shape: Shape of one sample without the batch axis.

    Raises:
        CalibrationError: It is not known what one token is.
    """
    if convention.packed:
        if len(sample_shape) != 2:
            raise CalibrationError(
                f"samples of shape {tuple(sample_shape)} are no packed sequences; give noise "
                f"[N, tokens, channels]"
            )
        return sample_shape[0]
    if convention.patch is None or len(sample_shape) < 2:
        raise CalibrationError(
            f"the schedule is shifted by the number of tokens (use_dynamic_shifting), and the side "
            f"of a token is not known for samples of shape {tuple(sample_shape)}; give "
            f"convention=CallingConvention(patch=...), or a scheduler with "
            f"use_dynamic_shifting=False and its shift"
        )
    return math.prod(side // convention.patch for side in sample_shape[-2:])


def resolution_shift(
    config: Mapping[str, Any],
    convention: CallingConvention,
    sample_shape: Sequence[int],
    steps: int,
) -> float:
    """The logarithm `mu` of a shift that grows with the number of tokens.

    Args:
        config: Settings of the scheduler: `base_shift` at `base_image_seq_len` tokens, `max_shift`
            at `max_image_seq_len`. Those that it lacks are the pipeline's.
        convention: Of the model.
        sample_shape: Shape of one sample without the batch axis.
        steps: Steps of the run.

    Raises:
        CalibrationError: The number of tokens is not known, or both of the scheduler's numbers are
            the same.
    """
    if convention.steps_shift:
        return _steps_shift(token_count(convention, sample_shape), steps)
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, largest = config.get("base_shift", 0.5), config.get("max_shift", convention.max_shift)
    if low == high:
        raise CalibrationError(
            f"base_image_seq_len and max_image_seq_len are both {low}; a shift that depends on the "
            f"number of tokens needs two of them"
        )
    # in this order, for the very bits of diffusers
    slope = (largest - base) / (high - low)
    return float(token_count(convention, sample_shape) * slope + (base - slope * low))


def _steps_shift(tokens: int, steps: int) -> float:
    """Flux.2's shift: a line in tokens for 10 steps, one for 200, and between them linear in steps.

    The numbers are those that its makers fitted. Large pictures have that of 200 steps.
    """
    many = _MANY_STEPS[0] * tokens + _MANY_STEPS[1]
    if tokens > _LARGE:
        return many
    few = _FEW_STEPS[0] * tokens + _FEW_STEPS[1]
    # in this order, for the very bits of diffusers
    slope = (many - few) / 190.0
    return slope * steps + (many - 200.0 * slope)
