"""Which layers run in own kernels, and why the others stay with XNNPACK."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.backends.lowbit.costs import Cpu, check_cpu, relative_time
from mpqdm_fx.backends.lowbit.encodings import form_blocks, values_present
from mpqdm_fx.backends.lowbit.layout import WeightShape
from mpqdm_fx.backends.names import Kernels
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.layers import WeightLayer, padding_sides, weight_layers
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.records.activations import Activation, StaticActivation, TimestepActivation

__all__ = [
    "Kernels",
    "LayerChoice",
    "call_refusal",
    "check_kernels",
    "choose_layers",
    "module_refusal",
]

_FEW_ROWS = 8  # for so few positions unpacking the weights takes most of the time
_FASTER = 0.95  # handing values over between own kernels and XNNPACK takes up a smaller gain


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """Layers by what runs them.

    Attributes:
        own: Names of the layers that own kernels run, in graph order.
        left: Reason by name for every other weight layer.
    """

    own: tuple[str, ...]
    left: Mapping[str, str]


def check_kernels(kernels: str) -> None:
    """Refuse a setting that is none.

    Raises:
        ConfigError: It is none of the words of `Kernels`.
    """
    if kernels not in get_args(Kernels):
        words = ", ".join(map(repr, get_args(Kernels)))
        raise ConfigError(f"kernels={kernels!r}: choose one of {words}")


def choose_layers(
    rounded: fx.GraphModule,
    activations: Mapping[str, Activation],
    *,
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
) -> LayerChoice:
    """Sort the weight layers into own layers and layers that stay with XNNPACK.

    Args:
        rounded: Module-level graph after `RoundWeights`, with static values in `meta["val"]`.
        activations: By layer name; layers without one read floats.
        kernels: What is wanted of own kernels.
        cpu: Class of CPUs that the program is for.

    Raises:
        ConfigError: `kernels` or `cpu` is unknown.
    """
    check_kernels(kernels)
    check_cpu(cpu)
    own, left = [], {}
    for name, layer in weight_layers(rounded).items():
        reason = _misfit(layer, activations.get(name))
        if reason is None and kernels == "xnnpack":
            reason = 'kernels="xnnpack" leaves all layers there'
        if reason is None and kernels == "auto":
            reason = _slower(layer, cpu)
        if reason is None:
            own.append(name)
        else:
            left[name] = reason
    return LayerChoice(own=tuple(own), left=left)


def module_refusal(module: nn.Module) -> str | None:
    """Why own kernels have no layer like this, whatever it reads; None if they have one."""
    if isinstance(module, nn.Conv2d):
        return _convolution_refusal(module)
    if isinstance(module, nn.Linear):
        return WeightShape(module.out_features, module.in_features, 1).fault()
    return f"own kernels have Conv2d and Linear, not {type(module).__name__}"


def call_refusal(module: nn.Module, call: fx.Node) -> str | None:
    """Why own kernels have no form of a layer's call; None if they have one.

    Args:
        module: The layer, with or without codes.
        call: A call of it.
    """
    if (reason := module_refusal(module)) is not None:
        return reason
    ranks = (4, 4) if isinstance(module, nn.Conv2d) else (1, 4)
    source = call.args[0] if len(call.args) == 1 and not call.kwargs else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or not isinstance(value, Tensor):
        return "the value that it reads is not known"
    if value.dtype != torch.float32:
        kind = str(value.dtype).removeprefix("torch.")
        return f"own kernels read float32, and its input is {kind}"
    shape = sizes(source)
    if not ranks[0] <= len(shape) <= ranks[1]:
        return f"own kernels do not read inputs of {len(shape)} axes"
    if min(shape) < 1:
        return f"its input {shape} is empty or has an axis of unknown size"
    return None


def _convolution_refusal(conv: nn.Conv2d) -> str | None:
    if conv.kernel_size not in ((1, 1), (3, 3)):
        size = "x".join(map(str, conv.kernel_size))
        return f"own kernels have 1x1 and 3x3 convolutions, not {size}"
    if conv.groups != 1 or conv.dilation != (1, 1):
        return "own kernels have no convolutions with groups or dilation"
    if conv.stride not in ((1, 1), (2, 2)):
        return f"own kernels have the strides 1 and 2, not {conv.stride}"
    if conv.padding_mode != "zeros":
        return f"own kernels pad with zeros, not {conv.padding_mode}"
    kernel, sides = conv.kernel_size[0], padding_sides(conv)
    if sides not in ([0] * 4, [kernel // 2] * 4):
        return f"own kernels pad all sides by 0 or {kernel // 2}, not by {sides}"
    return WeightShape(conv.out_channels, conv.in_channels, kernel).fault()


def _misfit(layer: WeightLayer, activation: Activation | None) -> str | None:
    module = layer.module
    if isinstance(activation, TimestepActivation):
        return (
            "own kernels have one fixed range or choose ranges at run time, not by noise level; "
            'quantize with activation_mode="static" or "dynamic"'
        )
    if not isinstance(getattr(module, "weight_codes", None), Tensor):
        return "its weights are not rounded"
    if activation is None:
        return "its input stays in float, and own kernels read inputs of 8 bits"
    read = activation.input if isinstance(activation, StaticActivation) else activation
    if read.bits != 8:
        return f"own kernels read activations of 8 bits, not {read.bits}"
    reasons = (call_refusal(module, call) for call in layer.nodes)
    return next((reason for reason in reasons if reason is not None), None)


def _slower(layer: WeightLayer, cpu: Cpu) -> str | None:
    """Why a layer that fits is faster in XNNPACK's kernels; None if it is not."""
    module = layer.module
    codes = module.weight_codes
    assert isinstance(codes, Tensor)
    rows = min(_rows(call, module) for call in layer.nodes)
    if rows <= _FEW_ROWS:
        return f"XNNPACK is faster on {rows} rows or pixels"
    widths = form_blocks(values_present(codes.flatten(1).numpy())).bits.tolist()
    kernel = module.kernel_size[0] if isinstance(module, nn.Conv2d) else 1
    time = relative_time(cpu, kernel=kernel, channels=codes.shape[1], rows=rows, widths=widths)
    if time <= _FASTER:
        return None
    if time < 1:
        return f"own kernels would take {time:.2f} of the time on {cpu}: too small a gain"
    return f"own kernels would take {time:.2f} times as long on {cpu}"


def _rows(call: fx.Node, module: nn.Module) -> int:
    """Positions that the weights meet in a call."""
    channels = 1 if isinstance(module, nn.Conv2d) else -1
    shape = sizes(call)
    del shape[channels]
    return torch.Size(shape).numel()
