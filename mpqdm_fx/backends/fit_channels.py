"""Bring weights and biases to what integer kernels can hold.

An int8 kernel adds the bias as an int32 in steps of `input_scale * weight_scale`, and multiplies
the sum by `input_scale * weight_scale / output_scale`. A channel whose weights are all zero, or
tiny beside its bias, has a weight scale near zero: the bias overflows, or the multiplier
underflows, and the channel comes out wrong (fbgemm, XNNPACK) or the kernel refuses it (qnnpack).
In every other channel the bias is rounded to a whole number of steps.
"""

import logging
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.editing import (
    add_module,
    copy_graph_module,
    free_name,
    insert_call,
    replace_module,
    shallow_clone,
)
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.quantize.quantize_activations import activation_sites
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.activations import ActivationRange, StaticActivation

__all__ = ["fit_channels", "read_ranges", "round_biases", "split_calls", "split_layers"]

logger = logging.getLogger(__name__)

_Key = TypeVar("_Key", bound=Hashable)

# A bias of at most 2^30 steps leaves the other half of int32 to the products.
_STEPS = 2.0**30


def fit_channels(
    rounded: fx.GraphModule,
    ranges: Mapping[str, StaticActivation],
    exact: Collection[str] = (),
) -> fx.GraphModule:
    """Give degenerate channels a coarser scale.

    Their scale s grows by the smallest power of two 2^k with `|bias| <= 2^30 * input_scale * s` and
    `output_scale <= 2^30 * input_scale * s`; their codes become `round(codes / 2^k)`. A weight
    moves by at most s/2, and with it a product by at most 2^-22 of the bias or of the output's
    step: far below what the output can show. All other channels keep their integers.

    Args:
        rounded: Module-level graph after `RoundWeights`; it is not changed.
        ranges: Activation ranges by layer.
        exact: Layers whose kernels add biases in float: they are left alone.

    Returns:
        `rounded` itself if no channel is degenerate, else a copy with new layers.
    """
    result = rounded
    layers = weight_layers(rounded)
    for name, inputs in read_ranges(rounded, ranges, exact).items():
        module = layers[name].module
        smallest = min(chosen.scale for chosen in inputs)
        shift = _shifts(module, smallest, ranges[name].output.scale)
        if not bool(shift.any()):
            continue
        if result is rounded:
            result = copy_graph_module(rounded)
        codes, scale = _tensor(module, "weight_codes"), _tensor(module, "weight_scale")
        factor = torch.exp2(shift)
        coarse = (codes.flatten(1).double() / factor[:, None]).round().to(torch.int8)
        scale = (scale.double() * factor).float()
        replace_module(result, name, install_codes(module, coarse.view_as(codes), scale))
        logger.info("%s: %d degenerate channels got a coarser scale", name, int((shift > 0).sum()))
    return result


def round_biases(
    rounded: fx.GraphModule,
    ranges: Mapping[str, StaticActivation],
    exact: Collection[str] = (),
) -> fx.GraphModule:
    """Round every bias to whole steps of `input_scale * weight_scale`, as integer kernels do.

    A graph with such biases is computed by them exactly, but for ties and the order of sums in its
    float parts; so a program can be checked against it closely.

    Args:
        rounded: Module-level graph after `fit_channels`; it is not changed.
        ranges: Activation ranges by layer. A layer whose calls read several scales keeps its bias,
            which cannot be whole in all of them (`split_calls` leaves no such layer).
        exact: Layers whose kernels add biases in float: they are left alone.

    Returns:
        A copy with new layers.
    """
    result = copy_graph_module(rounded)
    layers = weight_layers(rounded)
    for name, inputs in read_ranges(rounded, ranges, exact).items():
        module = layers[name].module
        bias = module.bias
        if not isinstance(bias, Tensor) or len({chosen.scale for chosen in inputs}) > 1:
            continue
        step = inputs[0].scale * _tensor(module, "weight_scale").double()
        clone = shallow_clone(module)
        whole = (bias.detach().double() / step).round() * step
        clone.bias = nn.Parameter(whole.to(bias.dtype), requires_grad=False)
        replace_module(result, name, clone)
    return result


def split_calls(
    rounded: fx.GraphModule,
    ranges: Mapping[str, StaticActivation],
    exact: Collection[str] = (),
) -> tuple[fx.GraphModule, dict[str, StaticActivation]]:
    """Give a layer of its own to every call that reads another scale.

    The bias in integers depends on the scale of the input. ExecuTorch (1.5.1) stores the bias of a
    layer once, in the integers of its first call, and adds those to the others too: wrong numbers.

    Args:
        rounded: Module-level graph after `RoundWeights`; it is not changed.
        ranges: Activation ranges by layer.
        exact: Layers whose kernels add biases in float: they are left alone.

    Returns:
        `rounded` itself, or a copy in which further calls are of new layers that share the weight;
        and the ranges with those of the new layers.
    """
    layers = weight_layers(rounded)
    scales = {
        name: [chosen.scale for chosen in inputs]
        for name, inputs in read_ranges(rounded, ranges, exact).items()
        if layers[name].module.bias is not None
    }
    result, origins = split_layers(rounded, scales)
    return result, {**ranges, **{new: ranges[name] for new, (name, _) in origins.items()}}


def split_layers(
    graph: fx.GraphModule, keys: Mapping[str, Sequence[_Key]]
) -> tuple[fx.GraphModule, dict[str, tuple[str, _Key]]]:
    """Give a layer of its own to every call whose key differs from that of the first call.

    Args:
        graph: Module-level graph; it is not changed.
        keys: Of the calls of a layer, in graph order, by the layer's name.

    Returns:
        `graph` itself, or a copy in which further calls are of new layers that share the weight;
        and by the names of the new layers the old name and the key.
    """
    result, origins = graph, dict[str, tuple[str, _Key]]()
    layers = weight_layers(graph)
    for name, of_calls in keys.items():
        if len(set(of_calls)) <= 1:
            continue
        if result is graph:
            result = copy_graph_module(graph)
        targets = {of_calls[0]: name}
        for node, key in zip(layers[name].nodes, of_calls, strict=True):
            if key not in targets:
                clone = shallow_clone(layers[name].module)
                if isinstance(clone.bias, Tensor):
                    clone.bias = nn.Parameter(clone.bias.detach().clone())
                targets[key] = free_name(result, f"{name}_call")
                add_module(result, targets[key], clone)
                origins[targets[key]] = (name, key)
            if targets[key] != name:
                old = next(n for n in result.graph.nodes if n.name == node.name)
                new = insert_call(result, targets[key], old.args, anchor=old)
                old.replace_all_uses_with(new)
                result.graph.erase_node(old)
    result.recompile()
    return result, origins


def read_ranges(
    graph: fx.GraphModule,
    ranges: Mapping[str, StaticActivation],
    left_out: Collection[str] = (),
) -> dict[str, list[ActivationRange]]:
    """Range that each call of each layer really reads: its own, or that of the output it reads.

    Args:
        graph: Module-level graph.
        ranges: Activation ranges by layer.
        left_out: Layers that count among the readers of a value but are not told of.

    Returns:
        By layer, the ranges of its calls in graph order.
    """
    calls = {n: name for name, layer in weight_layers(graph).items() for n in layer.nodes}
    ordered = {node: calls[node] for node in graph.graph.nodes if node in calls}
    read: dict[fx.Node, ActivationRange] = {}
    for site in activation_sites(ordered, ranges):  # the narrower site of a value comes later
        for call in site.value.users if site.calls is None else site.calls:
            read[call] = site.range
    inputs: dict[str, list[ActivationRange]] = {}
    for call, name in ordered.items():
        if name in ranges and name not in left_out:
            inputs.setdefault(name, []).append(read[call])
    return inputs


def _shifts(module: nn.Module, input_scale: float, output_scale: float) -> Tensor:
    """Exponent k of each output channel, float64 [out_channels]; 0 for all that are in order."""
    scale = _tensor(module, "weight_scale").double()
    largest = torch.full_like(scale, output_scale)
    if isinstance(module.bias, Tensor):
        largest = torch.maximum(largest, module.bias.detach().double().abs())
    needed = largest / (_STEPS * input_scale)
    return torch.log2(needed / scale).ceil().clamp(min=0)


def _tensor(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value
