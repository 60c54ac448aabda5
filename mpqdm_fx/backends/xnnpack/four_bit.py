"""Which layers XNNPACK stores at four bits a weight, and what prevents it for the others.

It knows one form: linear layers with one scale per channel, zero point 0 and codes within -8..7,
told by exactly that range. Codes are the same integers as at eight bits, and so are the results.
"""

import re
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.backends.names import FourBit
from mpqdm_fx.backends.xnnpack.passes.split_mixed_rows import SplitMixedRows
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.layers import WeightLayer, is_pointwise, weight_layers
from mpqdm_fx.records.activations import DynamicActivation, KernelActivation
from mpqdm_fx.records.config import ActivationMode

__all__ = [
    "FOUR_BIT_LEVELS",
    "FourBit",
    "check_four_bit",
    "fits_four_bits",
    "four_bit_convolutions",
    "four_bit_layers",
    "split_mixed_layers",
]

#: Most levels of a channel that four bits can tell apart.
FOUR_BIT_LEVELS = 16
_LOWEST, _HIGHEST = -8, 7
_ROWS = 256  # whose codes are counted at once


def four_bit_layers(
    graph: fx.GraphModule, activations: Mapping[str, KernelActivation]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Sort the layers of few levels into those that are stored at four bits and all others.

    Args:
        graph: Rounded graph, ready for conversion.
        activations: Of its int8 layers, by name.

    Returns:
        Layers stored at four bits; and layers that are not although no channel has more than 16
        levels, or some have not, with the reason for each.
    """
    layers, refusals = [], {}
    for name, layer in weight_layers(graph).items():
        if name not in activations:
            continue
        codes = _codes(layer)
        reason = _refusal(layer, codes, activations[name])
        if reason is None:
            layers.append(name)
        elif bool((few := _few_levels(codes)).any()):
            wide = int((~few).sum())
            refusals[name] = (
                f"{wide} of {len(few)} channels have more than 16 levels" if (wide) else reason
            )
    return tuple(layers), refusals


def four_bit_convolutions(
    graph: fx.GraphModule, activations: Mapping[str, KernelActivation]
) -> frozenset[str]:
    """1x1 convolutions that would be stored at four bits if they were linear layers.

    Args:
        graph: Rounded graph.
        activations: Of its int8 layers, by name.
    """
    return frozenset(
        name
        for name, layer in weight_layers(graph).items()
        if isinstance(activations.get(name), DynamicActivation)
        and isinstance(layer.module, nn.Conv2d)
        and is_pointwise(layer.module)
        and layer.module.in_channels % 2 == 0
        and fits_four_bits(_codes(layer))
    )


def split_mixed_layers(
    graph: fx.GraphModule, activations: Mapping[str, KernelActivation]
) -> tuple[fx.GraphModule, dict[str, KernelActivation]]:
    """Split linear layers of which only some channels fit four bits, where `SplitMixedRows` can.

    Args:
        graph: Rounded graph; it is not changed.
        activations: Of its int8 layers, by name.

    Returns:
        The graph, and the activations with those of the parts.
    """
    widths = {}
    for name, layer in weight_layers(graph).items():
        dynamic = isinstance(activations.get(name), DynamicActivation)
        if dynamic and isinstance(layer.module, nn.Linear) and layer.module.in_features % 2 == 0:
            codes = _codes(layer)
            fits = (codes.amin(dim=1) >= _LOWEST) & (codes.amax(dim=1) <= _HIGHEST)
            widths[name] = torch.where(fits, 4, 8).tolist()
    result: fx.GraphModule = SplitMixedRows(widths=widths)(graph).graph_module
    chosen = {}
    for name in weight_layers(result):
        whole = name if name in activations else re.sub(r"_rows(_\d+)?$", "", name)
        if whole in activations:
            chosen[name] = activations[whole]
    return result, chosen


def check_four_bit(four_bit: FourBit, activation_mode: ActivationMode | None = None) -> None:
    """Refuse a setting that is none, or that would do nothing.

    Args:
        four_bit: The setting.
        activation_mode: How activations are quantized, where that is known.

    Raises:
        ConfigError: It is not one of the words of `FourBit`; or layers are to be split for the sake
            of kernels that take dynamic activations alone, and there are none.
    """
    if four_bit not in get_args(FourBit):
        words = ", ".join(map(repr, get_args(FourBit)))
        raise ConfigError(f"four_bit={four_bit!r}: choose one of {words}")
    if four_bit == "split" and activation_mode not in (None, "dynamic"):
        raise ConfigError(
            f'four_bit="split": XNNPACK runs weights of four bits with dynamic activations alone, '
            f"and these are {activation_mode}; choose "
            f'activation_mode="dynamic" or four_bit="whole"'
        )


def fits_four_bits(codes: Tensor) -> bool:
    """Whether all codes are within -8..7."""
    return bool(codes.min() >= _LOWEST) and bool(codes.max() <= _HIGHEST)


def _codes(layer: WeightLayer) -> Tensor:
    codes = layer.module.weight_codes
    assert isinstance(codes, Tensor)
    return codes


def _refusal(layer: WeightLayer, codes: Tensor, activation: KernelActivation) -> str | None:
    """Why a layer is not stored at four bits."""
    module = layer.module
    if not isinstance(module, nn.Linear) and not is_pointwise(module):
        sizes = "x".join(map(str, codes.shape[2:]))
        return f"XNNPACK stores only linear layers at four bits, not a {sizes} convolution"
    if not isinstance(activation, DynamicActivation):
        return 'its activations are static; quantize with activation_mode="dynamic"'
    if codes.shape[1] % 2:
        return f"it has an odd number of inputs, {codes.shape[1]}"
    if not fits_four_bits(codes):
        low, high = int(codes.min()), int(codes.max())
        return f'its codes {low}..{high} leave -8..7; quantize with levels="int4"'
    if not isinstance(module, nn.Linear):
        return "it is a 1x1 convolution of several calls that cannot become a linear layer"
    return None


def _few_levels(codes: Tensor) -> Tensor:
    """Which channels use at most 16 codes, bool [out_channels]."""
    few = []
    for start in range(0, len(codes), _ROWS):
        rows = codes[start : start + _ROWS].flatten(1)
        present = torch.zeros(len(rows), 256, dtype=torch.bool)
        present.scatter_(1, rows.long() + 128, True)
        few.append(present.sum(dim=1) <= FOUR_BIT_LEVELS)
    return torch.cat(few)
