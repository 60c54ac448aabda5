"""What a pipeline conditions its denoiser on: prompts, image sizes, and embedded guidance.

For a denoiser that is quantized alone, `PipelineComponents`; `export` runs the family's own loop,
which makes the same of the same prompts.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from mpqdm_fx.pipelines.loops.text_to_image import guidance_embedding, time_ids

__all__ = [
    "Call",
    "Halves",
    "default_guidance",
    "default_number",
    "encode_prompts",
    "encodes_alone",
    "with_numbers",
]

_ENCODING = ("prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance")

Call = dict[str, Any]
Halves = tuple[Call, Call]
"""Conditions of the same rows with the prompts and without them, for guidance."""


def encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Halves:
    """What the pipeline's own `encode_prompt` makes of prompts.

    One prompt at a time, as programs do; rules such as SDXL's zeroed negatives are the pipeline's.

    Args:
        pipeline: A diffusers pipeline with its text encoders, on the CPU.
        prompts: At least one.

    Returns:
        `encoder_hidden_states` [N, L, D], and where the pipeline pools `added_cond_kwargs` with
        `text_embeds` [N, P], float32; both with and without the prompts.
    """
    with torch.no_grad():
        rows = [
            pipeline.encode_prompt(
                prompt=prompt,
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
            for prompt in prompts
        ]
    states, negative_states, *pooled = (
        torch.cat(column).float() for column in zip(*rows, strict=True)
    )
    plain: Call = {"encoder_hidden_states": states}
    negative: Call = {"encoder_hidden_states": negative_states}
    if pooled:
        plain["added_cond_kwargs"] = {"text_embeds": pooled[0]}
        negative["added_cond_kwargs"] = {"text_embeds": pooled[1]}
    return plain, negative


def encodes_alone(pipeline_class: Any) -> bool:
    """Whether `encode_prompts` can call a class: a prompt gives embeddings, and nothing more.

    Stable Diffusion 3 wants a prompt for each encoder; PixArt and SANA return masks too.

    Args:
        pipeline_class: A pipeline class of diffusers, or None.
    """
    encode = getattr(pipeline_class, "encode_prompt", None)
    if not callable(encode):
        return False
    _, *parameters = inspect.signature(encode).parameters.values()  # the first one is `self`
    names = {parameter.name for parameter in parameters}
    wanted = {
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    has_mask = any("attention_mask" in name for name in names)
    return wanted <= set(_ENCODING) <= names and not has_mask


def with_numbers(
    halves: Halves, *, size: tuple[int, int] | None, guidance: float, guidance_width: int | None
) -> Halves:
    """Add what the denoiser is told beside the prompts: image sizes (SDXL), guidance (LCM).

    Args:
        halves: Of `encode_prompts`.
        size: Height and width of the image in pixels; None leaves sizes out.
        guidance: Guidance scale.
        guidance_width: Width of its embedding; None for a denoiser that is called twice instead.
    """
    count = len(halves[0]["encoder_hidden_states"])
    calls = []
    for half in halves:
        more = dict(half)
        if "added_cond_kwargs" in more and size is not None:
            times = time_ids(*size).repeat(count, 1)
            more["added_cond_kwargs"] = {**more["added_cond_kwargs"], "time_ids": times}
        if guidance_width is not None:
            embedding = guidance_embedding(guidance, guidance_width)
            more["timestep_cond"] = embedding.repeat(count, 1)
        calls.append(more)
    return calls[0], calls[1]


def default_guidance(pipeline_class: Any) -> float:
    """The guidance scale that a pipeline's class draws with if it is told none; 1 if it has none.

    Args:
        pipeline_class: A pipeline class of diffusers.
    """
    return default_number(pipeline_class, "guidance_scale", 1.0)


def default_number(pipeline_class: Any, argument: str | None, otherwise: float) -> float:
    """The number that a pipeline's class draws with if it is told none.

    Args:
        pipeline_class: A pipeline class of diffusers.
        argument: What its call has the number as.
        otherwise: The number where the call has no such argument, or no number by default.
    """
    parameter = inspect.signature(pipeline_class.__call__).parameters.get(argument or "")
    default = None if parameter is None else parameter.default
    return float(default) if isinstance(default, int | float) else otherwise
