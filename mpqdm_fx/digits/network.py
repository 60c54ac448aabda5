"""The bundled model's network and noise schedule, untrained."""

from __future__ import annotations

from diffusers import DDIMScheduler, UNet2DModel

from mpqdm_fx.digits.dataset import IMAGE_SIZE, NUM_CLASSES

TRAIN_TIMESTEPS = 1000


def build_unet(block_channels: tuple[int, int, int] = (32, 64, 96)) -> UNet2DModel:
    """Build the untrained denoiser: 1.74 million parameters with the default widths."""
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=block_channels,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        num_class_embeds=NUM_CLASSES,
    )


def build_scheduler() -> DDIMScheduler:
    """Build the scheduler of the model: squared-cosine betas, 1000 timesteps, noise prediction.

    Timesteps are spaced "trailing" (999, 949, ..., 49 in 20 steps; Lin et al. 2024, "Common
    diffusion noise schedules and sample steps are flawed", section 3.3): the last one of "leading"
    is 0, where there is next to no noise left to predict.
    """
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        clip_sample=True,
        timestep_spacing="trailing",
    )
