"""Pictures without any condition: DDPM, DDIM, latent diffusion."""

import torch

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request

__all__ = ["Unconditional"]


class Unconditional(Loop):
    """The scheduler's loop alone."""

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """One call of the denoiser, which gets nothing more."""
        return [{}]
