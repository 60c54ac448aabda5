"""Tiny diffusers pipelines with random weights: real classes, real tokenizers, no downloads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

LENGTH = 12


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters only: real CLIP pre-processing with a vocabulary of 54."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH
    )


def clip_config(tokens: CLIPTokenizer, *, layers: int = 1, width: int = 16) -> CLIPTextConfig:
    """Of an encoder of a few numbers."""
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def _unet(channels: int = 4, **options: Any) -> UNet2DConditionModel:
    """The fewest nodes with cross-attention: one block down, no middle, one block up."""
    settings: dict[str, Any] = {
        "cross_attention_dim": 16,
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
        **options,
    }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        **settings,
    ).eval()


def _scheduler(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
        **options,
    )


def tiny_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


#: Of a VAE with the full VAE's blocks.
_BLOCKS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def kl_vae(**options: Any) -> AutoencoderKL:
    """The full VAE's blocks, two of them."""
    return AutoencoderKL(latent_channels=4, sample_size=16, **_BLOCKS, **options).eval()


def stable_diffusion(folder: Path, *, kl: bool = False, **unet: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1 or 2; with `kl` the full VAE instead of the tiny one."""
    torch.manual_seed(0)
    tokens = tokenizer(folder / "tokens")
    prediction = {"prediction_type": unet.pop("prediction_type", "epsilon")}
    return StableDiffusionPipeline(
        vae=kl_vae() if kl else tiny_vae(),
        text_encoder=CLIPTextModel(clip_config(tokens)).eval(),
        tokenizer=tokens,
        unet=_unet(**unet),
        scheduler=_scheduler(**prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    """Two encoders of different widths, added conditions, normalised latents."""
    torch.manual_seed(1)
    tokens = tokenizer(folder / "tokens")
    first, second = clip_config(tokens, layers=2), clip_config(tokens, layers=2, width=24)
    return StableDiffusionXLPipeline(
        vae=kl_vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.0, 1.2]),
        text_encoder=CLIPTextModel(first).eval(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=_unet(
            cross_attention_dim=40,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        ),
        scheduler=_scheduler(),
        add_watermarker=False,
    )


def inpainting(
    folder: Path, *, channels: int = 9, vae: Any = None
) -> StableDiffusionInpaintPipeline:
    """Nine channels into the UNet: latents, mask, masked image."""
    torch.manual_seed(2)
    tokens = tokenizer(folder / "tokens")
    return StableDiffusionInpaintPipeline(
        vae=vae or kl_vae(),
        text_encoder=CLIPTextModel(clip_config(tokens)).eval(),
        tokenizer=tokens,
        unet=_unet(channels),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def latent_consistency(folder: Path) -> LatentConsistencyModelPipeline:
    """Guidance that is told, and a scheduler of few steps."""
    pipeline = stable_diffusion(folder, time_cond_proj_dim=32)
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    parts = {**pipeline.components, "scheduler": LCMScheduler(**options)}
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def image_to_image(folder: Path, *, kl: bool = True) -> StableDiffusionImg2ImgPipeline:
    """Stable Diffusion that starts from a picture."""
    parts = stable_diffusion(folder, kl=kl).components
    return StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)


def image_to_image_xl(folder: Path) -> StableDiffusionXLImg2ImgPipeline:
    """The same of XL, whose latents are normalised on the way in too."""
    parts = stable_diffusion_xl(folder).components
    return StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)


def instruct_pix2pix(folder: Path) -> StableDiffusionInstructPix2PixPipeline:
    """Eight channels into the UNet: latents and the picture's."""
    torch.manual_seed(6)
    parts = {**stable_diffusion(folder, kl=True).components, "unet": _unet(8)}
    return StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)


def controlnet(folder: Path) -> StableDiffusionControlNetPipeline:
    """A control network beside the UNet, none of whose residuals is zero."""
    parts = stable_diffusion(folder, kl=True, mid_block_type="UNetMidBlock2DCrossAttn").components
    torch.manual_seed(7)
    network = ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(8, 8), load_weights_from_unet=True
    ).eval()
    for parameter in network.parameters():
        if not parameter.any():  # zero convolutions of a network that was never trained
            torch.nn.init.normal_(parameter, std=0.3)
    return StableDiffusionControlNetPipeline(
        **{**parts, "controlnet": network}, requires_safety_checker=False
    )


def _plain_unet(channels: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ).eval()


def ddpm(_: Path) -> DDPMPipeline:
    """Grey images in pixel space."""
    torch.manual_seed(3)
    return DDPMPipeline(_plain_unet(1), DDPMScheduler())


def ddim(_: Path) -> DDIMPipeline:
    """Colour images in pixel space."""
    torch.manual_seed(4)
    return DDIMPipeline(_plain_unet(3), DDIMScheduler())


def latent_diffusion(_: Path) -> LDMPipeline:
    """Unconditional, with a VQ-VAE."""
    torch.manual_seed(5)
    vae = VQModel(latent_channels=3, num_vq_embeddings=16, **_BLOCKS).eval()
    return LDMPipeline(vae, _plain_unet(3), _scheduler())


def cheap_settings(**options: Any) -> Any:
    """W8A8 without any search."""
    from mpqdm_fx import MPQConfig

    return MPQConfig(
        weight_bits=8,
        allocation="uniform",
        levels="uniform",
        rounding="nearest",
        refinements=0,
        propagation=0.0,
        **options,
    )
