"""Keep degenerate output channels inside what integer kernels can hold.

An int8 kernel adds the bias as an int32 in steps of `input_scale * weight_scale`, and multiplies
the sum by `input_scale * weight_scale / output_scale`. A channel whose weights are all zero, or
tiny beside its bias, has a weight scale near zero: the bias overflows, or the multiplier
underflows, and the channel comes out wrong (fbgemm, XNNPACK) or the kernel refuses it (qnnpack).
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.editing import copy_graph_module, replace_module
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.round_weights import install_codes
from mpqdm_fx.plan import LayerActivation

__all__ = ["fit_channels"]

logger = logging.getLogger(__name__)

# A bias of at most 2^30 steps leaves the other half of int32 to the products.
_STEPS = 2.0**30


def fit_channels(rounded: fx.GraphModule, ranges: Mapping[str, LayerActivation]) -> fx.GraphModule:
    """Give degenerate channels a coarser scale.

    Their scale s grows by the smallest power of two 2^k with `|bias| <= 2^30 * input_scale * s` and
    `output_scale <= 2^30 * input_scale * s`; their codes become `round(codes / 2^k)`. A weight
    moves by at most s/2, and with it a product by at most 2^-22 of the bias or of the output's
    step: far below what the output can show. All other channels keep their integers.

    Args:
        rounded: Module-level graph after `RoundWeights`; it is not changed.
        ranges: Activation ranges by layer.

    Returns:
        `rounded` itself if no channel is degenerate, else a copy with new layers.
    """
    result = rounded
    for name, layer in weight_layers(rounded).items():
        if name not in ranges:
            continue
        shift = _shifts(layer.module, ranges[name])
        if not bool(shift.any()):
            continue
        if result is rounded:
            result = copy_graph_module(rounded)
        codes, scale = _tensor(layer.module, "weight_codes"), _tensor(layer.module, "weight_scale")
        factor = torch.exp2(shift)
        coarse = (codes.flatten(1).double() / factor[:, None]).round().to(torch.int8)
        scale = (scale.double() * factor).float()
        replace_module(result, name, install_codes(layer.module, coarse.view_as(codes), scale))
        logger.info("%s: %d degenerate channels got a coarser scale", name, int((shift > 0).sum()))
    return result


def _shifts(module: nn.Module, activation: LayerActivation) -> Tensor:
    """K of each output channel, float64 [out_channels]; 0 for all that are in order."""
    scale = _tensor(module, "weight_scale").double()
    bias = getattr(module, "bias", None)
    largest = torch.full_like(scale, activation.output.scale)
    if isinstance(bias, Tensor):
        largest = torch.maximum(largest, bias.detach().double().abs())
    needed = largest / (_STEPS * activation.input.scale)
    return torch.log2(needed / scale).ceil().clamp(min=0)


def _tensor(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value
