"""Tiny pipelines around diffusion transformers with random weights, no downloads."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderOobleck,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_pipelines import clip_config, kl_vae, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
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


def pixart_sigma(_: Path, *, alpha: bool = False) -> Any:
    """A transformer that predicts a variance too; `alpha` is the older class, of fewer tokens."""
    torch.manual_seed(10)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=T5_WIDTH, cross_attention_dim=16, in_channels=4, out_channels=8,
        use_additional_conditions=False,
    ).eval()  # fmt: skip
    return (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
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


def _dc_vae() -> AutoencoderDC:
    blocks = ("ResBlock", "ResBlock")
    return AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=8, scaling_factor=0.4,
        encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate", downsample_block_type="Conv",
    ).eval()  # fmt: skip


def sana(_: Path, *, sprint: bool = False) -> Any:
    """A language model of one layer; with `sprint` guidance that is told, and SCM's schedule."""
    torch.manual_seed(12)
    transformer = SanaTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1,
        num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=T5_WIDTH,
        guidance_embeds=sprint, qk_norm="rms_norm_across_heads" if sprint else None,
    ).eval()  # fmt: skip
    config = Gemma2Config(
        vocab_size=32, hidden_size=T5_WIDTH, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12, max_position_embeddings=4096,
    )  # fmt: skip
    return (SanaSprintPipeline if sprint else SanaPipeline)(
        tokenizer=t5_tokenizer(300),
        text_encoder=Gemma2Model(config).eval(),
        vae=_dc_vae(),
        transformer=transformer,
        scheduler=SCMScheduler() if sprint else FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(folder: Path, *, told: bool = True) -> FluxPipeline:
    """Latents cut into tokens; with `told` guidance is."""
    torch.manual_seed(13)
    tokens = tokenizer(folder / "tokens")
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=T5_WIDTH, pooled_projection_dim=16,
        guidance_embeds=told, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    vae = AutoencoderKL(**{**kl_vae().config, "shift_factor": 0.1, "scaling_factor": 1.5}).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(clip_config(tokens)).eval(),
        tokenizer=tokens,
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(512),
        transformer=transformer,
    )


#: As Qwen3's: an answer begins, which is empty thoughts where there are to be none.
_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }} {{ message.content }}</s>{% endfor %}"
    "<s>me {% if not enable_thinking %}<think></think>{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Characters without an end, and a template; padding stands behind."""
    tokens = t5_tokenizer(1024)
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tokens.chat_template = _TEMPLATE
    return tokens


def qwen3(model_class: Any, *, layers: int) -> Any:
    """A language model with grouped heads."""
    config = Qwen3Config(
        vocab_size=32, hidden_size=T5_WIDTH, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12, max_position_embeddings=1024,
    )  # fmt: skip
    return model_class(config).eval()


def z_image(_: Path, **scheduler: Any) -> ZImagePipeline:
    """No layer starts at zero, nor do the tokens that fill sequences up."""
    torch.manual_seed(14)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=T5_WIDTH, axes_dims=[4, 4, 8], axes_lens=[514, 16, 16],
    ).eval()  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    vae = AutoencoderKL(**{**kl_vae().config, "shift_factor": 0.1, "scaling_factor": 1.5}).eval()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae,
        text_encoder=qwen3(Qwen3Model, layers=2),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


def _squares_vae() -> AutoencoderKLFlux2:
    """Statistics of squares of latents that are not standard."""
    vae = AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(vae.bn.running_mean, std=0.5)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


def flux_2_klein(
    _: Path, *, distilled: bool = False, layers: int = 28, kind: Any = Flux2KleinPipeline
) -> Any:
    """A language model of one layer more than are read."""
    torch.manual_seed(15)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * T5_WIDTH, timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_squares_vae(),
        text_encoder=qwen3(Qwen3ForCausalLM, layers=layers),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
        is_distilled=distilled,
    )


def shallow_flux_2_klein(folder: Path) -> Any:
    """The states behind the first three layers are read: a program in a quarter of the time."""

    def call(
        self: Any, prompt: str, *, guidance_scale: float = 4.0,
        text_encoder_out_layers: tuple[int, ...] = (1, 2, 3), **options: Any,
    ) -> Any:  # fmt: skip
        own = {
            "guidance_scale": guidance_scale,
            "text_encoder_out_layers": text_encoder_out_layers,
        }
        return Flux2KleinPipeline.__call__(self, prompt=prompt, **own, **options)

    kind = type("Flux2KleinPipeline", (Flux2KleinPipeline,), {"__call__": call})
    return flux_2_klein(folder, layers=4, kind=kind)


def stable_audio(_: Path, *, scheduler: Any = None, width: int = 16) -> StableAudioPipeline:
    """Sounds of 64 samples in two channels, 32 a second; the prompt's states are projected."""
    torch.manual_seed(16)
    vae = AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[4], channel_multiples=[2],
        decoder_channels=8, decoder_input_channels=4, audio_channels=2, sampling_rate=32,
    ).eval()  # fmt: skip
    for name, parameter in vae.named_parameters():
        if name.endswith(("alpha", "beta")):  # of Snake, which all start at the same
            torch.nn.init.normal_(parameter, std=0.5)
    transformer = StableAudioDiTModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, num_key_value_attention_heads=1, cross_attention_dim=16,
        cross_attention_input_dim=width, global_states_input_dim=2 * width, time_proj_dim=16,
    ).eval()  # fmt: skip
    return StableAudioPipeline(
        vae=vae,
        text_encoder=t5(),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=T5_WIDTH, conditioning_dim=width, min_value=0, max_value=4
        ).eval(),
        tokenizer=t5_tokenizer(16),
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler() if scheduler is None else scheduler,
    )
