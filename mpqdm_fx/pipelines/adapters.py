"""Adapters that sit on the layers of a pipeline: they are told from plain layers and refused.

A LoRA that is loaded but not fused leaves the original weight and adds a second path beside it.
Quantizing would round the original weight and run the path in float; what was meant is the sum.
"""

from collections.abc import Mapping

from torch import nn

from mpqdm_fx.errors import ConfigError

__all__ = ["adapter_layers", "refuse_adapters"]

# peft's base class of every layer that wraps another one. By name: peft need not be installed, and
# where it is not, no model has one.
_WRAPPER = "BaseTunerLayer"


def adapter_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers of a model that carry an adapter.

    Args:
        module: The model.

    Returns:
        Layers that peft has wrapped, by name.
    """
    return {
        name: child
        for name, child in module.named_modules()
        if any(base.__name__ == _WRAPPER for base in type(child).__mro__)
    }


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
        f"leave the LoRA out"
    )
