"""Small models and data for tests: real diffusers classes, a fraction of a second per call."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn


def tiny_unet(seed: int = 0) -> UNet2DModel:
    """A class-conditional UNet2DModel with attention and skips, 8x8, about 60 K parameters."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=10,
    ).eval()


def tiny_condition_unet(seed: int = 0) -> UNet2DConditionModel:
    """A UNet2DConditionModel with cross-attention and GEGLU, 8x8, about 100 K parameters."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()


def tiny_sdxl_unet(seed: int = 0, *, size_embedding: int = 8) -> UNet2DConditionModel:
    """An SDXL-style UNet: sizes and pooled text are added to the time embedding.

    Each of the six sizes is embedded in `size_embedding` numbers.
    """
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_embedding,
        projection_class_embeddings_input_dim=6 * size_embedding + 10,
    ).eval()


def plain_unet(seed: int = 0) -> UNet2DModel:
    """The fewest nodes that diffusers lets a UNet have: for tests that lower, 8x8."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    ).eval()


def unet_calls(calls: int = 4, batch: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Keyword arguments of `tiny_unet`, timesteps spread over the schedule."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "sample": torch.randn(batch, 1, 8, 8, generator=generator),
            "timestep": torch.randint(1000, (batch,), generator=generator),
            "class_labels": torch.randint(10, (batch,), generator=generator),
        }
        for _ in range(calls)
    ]


def condition_calls(calls: int = 3, batch: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Keyword arguments of `tiny_condition_unet`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "sample": torch.randn(batch, 4, 8, 8, generator=generator),
            "timestep": torch.randint(1000, (batch,), generator=generator),
            "encoder_hidden_states": torch.randn(batch, 7, 12, generator=generator),
        }
        for _ in range(calls)
    ]


def sdxl_calls(calls: int = 2, batch: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Keyword arguments of `tiny_sdxl_unet`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            **call,
            "added_cond_kwargs": {
                "text_embeds": torch.randn(batch, 10, generator=generator),
                "time_ids": torch.randint(64, (batch, 6), generator=generator).float(),
            },
        }
        for call in condition_calls(calls, batch, seed)
    ]


class TinyNet(nn.Module):
    """conv - norm - silu - conv - linear over channels - conv; H, W and C all differ."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.conv_in = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.GroupNorm(4, 12)
        self.act = nn.SiLU()
        self.body = nn.Conv2d(12, 16, 3, padding=1)
        self.mix = nn.Linear(16, 12)
        self.conv_out = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        h = self.body(self.act(self.norm(h)))
        h = self.mix(h.movedim(1, -1)).movedim(-1, 1)
        return self.conv_out(h)


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(torch.sin(self.layer(x))),)


def net_calls(calls: int = 3, batch: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    """Keyword arguments of `TinyNet`."""
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(batch, 3, 6, 10, generator=generator)} for _ in range(calls)]


class TinyDenoiser(nn.Module):
    """A noise predictor with the arguments of a UNet: a convolution on each side of the time."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.conv_in = nn.Conv2d(2, 8, 3, padding=1)
        self.time = nn.Linear(4, 8)
        self.act = nn.SiLU()
        self.conv_out = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        frequencies = torch.tensor([0.001, 0.01, 0.1, 1.0])
        time = torch.sin(timestep[:, None].float() * frequencies).to(sample.dtype)
        h = self.conv_in(sample) + self.time(time)[:, :, None, None]
        return self.conv_out(self.act(h))


def denoiser_calls(calls: int = 3, batch: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    """Keyword arguments of `TinyDenoiser`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "sample": torch.randn(batch, 2, 6, 10, generator=generator),
            "timestep": torch.randint(1000, (batch,), generator=generator),
        }
        for _ in range(calls)
    ]


class TinyEDM(nn.Module):
    """A preconditioned denoiser that is told sigma (Karras et al. 2022, equation 7, table 1)."""

    data = 0.5  # standard deviation of what it was "trained" on

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.conv_in = nn.Conv2d(2, 8, 3, padding=1)
        self.noise = nn.Linear(4, 8)
        self.label = nn.Linear(1, 8)
        self.act = nn.SiLU()
        self.conv_out = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, noisy: Tensor, sigma: Tensor, difficulty: Tensor) -> Tensor:
        total = (sigma**2 + self.data**2)[:, None, None, None]
        skip, scale = self.data**2 / total, total.rsqrt()
        out = (sigma * self.data)[:, None, None, None] * scale
        waves = torch.tensor([0.25, 0.5, 1.0, 2.0])
        embedding = self.noise(torch.sin(sigma.log()[:, None] * waves))
        embedding = embedding + self.label(difficulty[:, None])
        h = self.conv_in(scale * noisy) + embedding[:, :, None, None]
        return skip * noisy + out * self.conv_out(self.act(h))


SIGMAS = (80.0, 20.0, 5.0, 1.0, 0.3)
"""Noise levels of `edm_calls`."""


def edm_calls(calls: int = 5, batch: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    """Keyword arguments of `TinyEDM`, one sigma of `SIGMAS` in each call, in turn."""
    generator = torch.Generator().manual_seed(seed)
    levels = [SIGMAS[index % len(SIGMAS)] for index in range(calls)]
    return [
        {
            "noisy": torch.randn(batch, 2, 6, 10, generator=generator) * (level**2 + 0.25) ** 0.5,
            "sigma": torch.full((batch,), level),
            "difficulty": torch.rand(batch, generator=generator),
        }
        for level in levels
    ]
