"""A picture drawn over another one: the loop starts late, from that picture with noise."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mpqdm_fx.calibration.schedules import Schedule
from mpqdm_fx.pipelines.loops.loop import Number, Request
from mpqdm_fx.pipelines.loops.text_to_image import TextToImage
from mpqdm_fx.pipelines.program_files import RunnerError, refusals

__all__ = ["ImageToImage"]


class ImageToImage(TextToImage):
    """Stable Diffusion's img2img (Meng et al. 2021, SDEdit)."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "image")
    numbers: ClassVar[Mapping[str, Number]] = {
        "strength": Number(
            default=0.8,
            least=0.0,
            most=1.0,
            text="share of the steps that are run; 1 is all",
            argument="strength",
        )
    }

    def first_call(self, request: Request, schedule: Schedule) -> int:
        """The first of the last calls, of which there are as many as the strength says."""
        steps, strength = request.steps, request.numbers["strength"]
        skipped = max(steps - min(int(steps * strength), steps), 0)
        if skipped == steps:
            raise RunnerError(
                f"strength {strength:g} of {steps} steps is no step; give more strength or steps"
            )
        first: int = skipped * getattr(schedule.scheduler, "order", 1)
        if hasattr(schedule.scheduler, "set_begin_index"):
            schedule.scheduler.set_begin_index(first)
        return first

    def begin(
        self, request: Request, schedule: Schedule, first: int, generator: torch.Generator
    ) -> Tensor:
        """The picture's latents with noise of the first call's level."""
        latents = self.encode_picture(request.pixels, request, generator)
        noise = torch.randn(latents.shape, generator=generator)
        scheduler, timestep = schedule.scheduler, schedule.timesteps[first : first + 1]
        with refusals(f"{type(scheduler).__name__} cannot add noise to a picture"):
            started: Tensor = scheduler.add_noise(latents, noise, timestep)
        return started
