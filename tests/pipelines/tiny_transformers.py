"""Tiny pipelines around diffusion transformers with random weights, no downloads."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny_pipelines import clip_config, kl_vae, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

T5_WIDTH = 24


def t5_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """Characters, an end, and padding of number zero, as T5's has."""
    words = ["<pad>", "</s>", "<unk>", *(chr(code) for code in range(97, 123))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=length,
    )  # fmt: skip


def t5() -> T5EncoderModel:
    """One layer."""
    config = T5Config(
        vocab_size=32, d_model=T5_WIDTH, d_kv=12, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def pixart_sigma(_: Path) -> PixArtSigmaPipeline:
    """A transformer that predicts a variance too."""
    torch.manual_seed(10)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=T5_WIDTH, cross_attention_dim=16, in_channels=4, out_channels=8,
        use_additional_conditions=False,
    ).eval()  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(300),
        text_encoder=t5(),
        vae=kl_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def stable_diffusion_3(folder: Path, *, long: bool = True, **scheduler: Any) -> Any:
    """Flow matching; with `long` a T5 encoder beside the two of CLIP."""
    torch.manual_seed(11)
    tokens = tokenizer(folder / "tokens")
    widths = (16, 24)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16,
        pooled_projection_dim=sum(widths), out_channels=4, pos_embed_max_size=12,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(**{**kl_vae().config, "shift_factor": 0.1, "scaling_factor": 1.5}).eval()
    first, second = (
        CLIPTextModelWithProjection(clip_config(tokens, layers=2, width=width)).eval()
        for width in widths
    )
    encoder = None
    if long:
        config = T5Config(vocab_size=32, d_model=48, d_kv=12, d_ff=32, num_layers=1, num_heads=2)
        encoder = T5EncoderModel(config).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **scheduler),
        vae=vae,
        text_encoder=first,
        tokenizer=tokens,
        text_encoder_2=second,
        tokenizer_2=tokens,
        text_encoder_3=encoder,
        tokenizer_3=t5_tokenizer(256) if long else None,
    )
