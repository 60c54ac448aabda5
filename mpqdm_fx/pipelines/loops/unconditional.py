"""Pictures without any condition: DDPM, DDIM, latent diffusion."""

import torch

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request

__all__ = ["Unconditional"]


class Unconditional(Loop):
    """The scheduler's loop alone, with noise and inputs scaled as it says.

    diffusers' DDPMPipeline scales neither, whatever scheduler it has: with Euler's it starts from
    far too little noise. Schedulers that scale nothing (DDPM, DDIM, TCD, LCM) draw the same here.
    """

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """One call of the denoiser, which gets nothing more."""
        return [{}]
