"""Pictures of prompts whose shapes a control picture gives (Zhang et al. 2023)."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from mpqdm_fx.pipelines.loops.loop import Inputs, Number, Request
from mpqdm_fx.pipelines.loops.text_to_image import TextToImage
from mpqdm_fx.pipelines.program_files import RunnerError

__all__ = ["ControlNet"]

_RESIDUALS = ("down_block_additional_residuals.", "mid_block_additional_residual")


class ControlNet(TextToImage):
    """In every step the control network runs first; the denoiser adds what it gives."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "image")
    stepped: ClassVar[tuple[str, ...]] = ("controlnet", "denoiser")
    numbers: ClassVar[Mapping[str, Number]] = {
        "conditioning_scale": Number(
            default=1.0,
            least=0.0,
            most=10.0,
            text="weight of the control picture",
            argument="controlnet_conditioning_scale",
        )
    }

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """As of text, with the control picture."""
        if request.image is None:
            raise RunnerError("the request has no control picture")
        control = {"controlnet_cond": request.image}
        return [{**run, **control} for run in super().conditions(request, generator)]

    def denoiser_inputs(self, inputs: Inputs, request: Request) -> Inputs:
        """The control network's residuals, weighted."""
        scale = request.numbers["conditioning_scale"]
        return {
            name: value * scale if name.startswith(_RESIDUALS) else value
            for name, value in inputs.items()
        }
