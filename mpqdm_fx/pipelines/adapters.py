"""Adapters that sit on the layers of a pipeline: they are told from plain layers and refused.

A LoRA that is loaded but not fused leaves the original weight and adds a second path beside it.
Quantizing would round the original weight and run the path in float; what was meant is the sum.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from mpqdm_fx.capture.foreign_models import is_adapter
from mpqdm_fx.errors import ConfigError, first_line
from mpqdm_fx.records.validation import Between, check_fields

__all__ = ["Lora", "adapter_layers", "fused", "refuse_adapters"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA that is to be fused into a pipeline's weights.

    Attributes:
        file: A `.safetensors` file, as `save_lora_weights` of diffusers writes it.
        scale: Its weight.
    """

    file: Path
    scale: Annotated[float, Between(-100, 100)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


def fused(pipeline: Any, lora: Lora) -> Any:
    """A copy of a pipeline whose weights hold the LoRA, and nothing else of it.

    Args:
        pipeline: A pipeline of diffusers without adapters; it is not changed.
        lora: What is fused.

    Raises:
        ConfigError: There is no such file, it changes nothing in the pipeline, or it belongs to
            other layers; says what diffusers says.
    """
    refuse_adapters(dict(pipeline.components))
    if not lora.file.is_file():
        raise ConfigError(f"{lora.file}: there is no such file; give a LoRA's .safetensors")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ConfigError(f"a {type(pipeline).__name__} takes no LoRA")
    changed = copy.deepcopy(pipeline)
    try:
        changed.load_lora_weights(str(lora.file.parent), weight_name=lora.file.name)
        names = [name for name, part in changed.components.items() if _adapted(part)]
        if names:
            changed.fuse_lora(components=names, lora_scale=lora.scale, safe_fusing=True)
            changed.unload_lora_weights()
    except Exception as error:  # whatever peft and diffusers say to a file
        raise ConfigError(
            f"{lora.file} cannot be fused into this {type(pipeline).__name__}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not names:
        raise ConfigError(f"{lora.file} has nothing for this {type(pipeline).__name__}'s layers")
    return changed


def _adapted(part: object) -> bool:
    return isinstance(part, nn.Module) and bool(adapter_layers(part))


def adapter_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers of a model that carry an adapter.

    Args:
        module: The model.

    Returns:
        Layers that peft has wrapped, by name.
    """
    return {name: child for name, child in module.named_modules() if is_adapter(child)}


def refuse_adapters(parts: Mapping[str, object]) -> None:
    """Refuse a pipeline with adapters on its layers.

    Args:
        parts: The pipeline's components by name; what is no module is passed over.

    Raises:
        ConfigError: A component carries a LoRA (fused or not) or an IP-Adapter; says what to call.
    """
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            continue
        layers = adapter_layers(part)
        if layers:
            raise ConfigError(_message(name, layers))
        if getattr(getattr(part, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj":
            raise ConfigError(
                f"{name} carries an IP-Adapter, whose image embeddings no program takes; call "
                f"pipeline.unload_ip_adapter() first"
            )


def _message(part: str, layers: Mapping[str, nn.Module]) -> str:
    first, layer = next(iter(layers.items()))
    adapters = sorted({str(key) for key in getattr(layer, "scaling", {})})
    named = f" ({', '.join(adapters)})" if adapters else ""
    where = f"{part}: {len(layers)} layers carry a LoRA{named}, first {first}"
    if all(getattr(entry, "merged", False) for entry in layers.values()):
        return (
            f"{where}. It is fused, but its layers are still there: call "
            f"pipeline.unload_lora_weights(), which keeps the fused weights"
        )
    return (
        f"{where}. It is not fused: call pipeline.fuse_lora() and then "
        f"pipeline.unload_lora_weights() to quantize the sum, or unload_lora_weights() alone to "
        f"leave the LoRA out; or give the file of the LoRA to export (--fuse-lora)"
    )
