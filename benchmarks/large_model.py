"""A UNet of Stable Diffusion 1.5's size, its inputs, and the memory that a process took.

860 M parameters, 64x64 latents, 77 tokens, seeded random weights (no hub is needed): they say
nothing about quality. Nothing of this package is imported, so that any checkout of it can be
measured.
"""

import resource
from typing import Any

import torch
from diffusers import UNet2DConditionModel

__all__ = ["calls", "model", "peak_gib"]

CALLS = 8


def model(scale: int) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet, or one `scale` times narrower."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=tuple(width // scale for width in (320, 640, 1280, 1280)),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=32 if scale == 1 else 8,
    ).eval()


def calls() -> list[dict[str, Any]]:
    """Seeded inputs at timesteps spread over the schedule."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "sample": torch.randn(1, 4, 64, 64, generator=generator),
            "timestep": torch.tensor([1 + 999 * index // (CALLS - 1)]),
            "encoder_hidden_states": torch.randn(1, 77, 768, generator=generator),
        }
        for index in range(CALLS)
    ]


def peak_gib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
