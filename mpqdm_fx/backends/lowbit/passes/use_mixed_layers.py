"""Let own kernels run weight layers on values that lie channels last."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Self

import torch
from torch import Tensor, fx, nn

import mpqdm_fx.backends.lowbit.ops  # noqa: F401 - registers the operators
from mpqdm_fx.backends.lowbit.axes import permuted, to_first, to_last
from mpqdm_fx.backends.lowbit.blob import pack_blob
from mpqdm_fx.backends.lowbit.layers import call_refusal
from mpqdm_fx.graph.editing import add_tensor, insert_call, replace_module
from mpqdm_fx.graph.layers import WeightLayer, is_pointwise, padding_sides, weight_layers
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["UseMixedLayers"]

_mpqdm = torch.ops.mpqdm


@dataclass(frozen=True, eq=False, kw_only=True)
class UseMixedLayers(GraphPass):
    """Turn rounded layers into `mpqdm::quantize_mixed` and `conv2d_mixed` or `linear_mixed`.

    1. A convolution reads a permutation [B, H, W, C] of its value and its users a permutation
       [B, C, H, W] of what it gives; `MoveLayouts` takes away the pairs that cancel.
    2. Ranges are those of `QuantizeActivations`: one a sample for convolutions, one a row for
       linear layers, one a pixel for 1x1 convolutions, which are linear layers over the pixels.
       Layers that read one value with equal parts share its codes.
    3. The weights are a buffer `<layer>.weight_blob`, uint8; the float weight goes.
    4. A layer is left alone unless own kernels take all its calls (`layers.call_refusal`).

    Attributes:
        blobs: Weight blob by layer name, from `lowbit.blob.pack_blob`.
    """

    blobs: Mapping[str, Tensor] = field(default_factory=dict)

    # Inputs are rounded, and weights are what the blob says.
    preserves_function: ClassVar[bool] = False

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """All layers that fit, at four bits."""
        return (cls(blobs=_example_blobs(graph_module)),)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every layer of `blobs` that fits; False if there was none."""
        calls: dict[fx.Node, WeightLayer] = {}
        for name, layer in weight_layers(graph_module).items():
            fits = all(call_refusal(layer.module, call) is None for call in layer.nodes)
            if name in self.blobs and fits:
                calls |= dict.fromkeys(layer.nodes, layer)
        values = _SharedValues(graph_module)
        for call in [node for node in graph_module.graph.nodes if node in calls]:
            layer = calls[call]
            if call is layer.nodes[0]:
                replace_module(graph_module, layer.name, nn.Module())
                blob = self.blobs[layer.name]
                values.weights[layer.name] = add_tensor(
                    graph_module, f"{layer.name}.weight_blob", blob, anchor=call
                )
            _rewrite_call(graph_module, call, layer, values)
        return bool(calls)


class _SharedValues:
    """What several calls read, inserted once."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._last: dict[fx.Node, fx.Node] = {}
        self._codes: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        self.weights: dict[str, fx.Node] = {}

    def last(self, value: fx.Node, anchor: fx.Node) -> fx.Node:
        """An image with its channels last."""
        if value not in self._last:
            order = to_last(len(sizes(value)))
            self._last[value] = permuted(self._graph_module, value, order, anchor=anchor)
        return self._last[value]

    def codes(self, value: fx.Node, parts: int, anchor: fx.Node) -> list[fx.Node]:
        """Codes, scales and zero points."""
        key = (value, parts)
        if key not in self._codes:
            target = _mpqdm.quantize_mixed.default
            all_three = insert_call(self._graph_module, target, (value, parts), anchor=anchor)
            self._codes[key] = [
                insert_call(self._graph_module, operator.getitem, (all_three, i), anchor=anchor)
                for i in range(3)
            ]
        return self._codes[key]


def _rewrite_call(
    graph_module: fx.GraphModule, call: fx.Node, layer: WeightLayer, values: _SharedValues
) -> None:
    module, value, weight = layer.module, call.args[0], values.weights[layer.name]
    assert isinstance(value, fx.Node)
    if isinstance(module, nn.Linear):
        parts = prod(sizes(value)[:-1])
        args = (*values.codes(value, parts, call), weight, module.out_features)
        result = insert_call(graph_module, _mpqdm.linear_mixed.default, args, anchor=call)
    else:
        assert isinstance(module, nn.Conv2d)
        image = values.last(value, call)
        if is_pointwise(module):
            parts = prod(sizes(image)[:-1])
            args = (*values.codes(image, parts, call), weight, module.out_channels)
            last = insert_call(graph_module, _mpqdm.linear_mixed.default, args, anchor=call)
        else:
            shape = (
                module.out_channels,
                module.kernel_size[0],
                module.stride[0],
                padding_sides(module)[0],
            )
            codes = values.codes(image, sizes(image)[0], call)
            args = (*codes, weight, *shape)
            last = insert_call(graph_module, _mpqdm.conv2d_mixed.default, args, anchor=call)
        result = permuted(graph_module, last, to_first(4), anchor=call)
    call.replace_all_uses_with(result)
    graph_module.graph.erase_node(call)


def _example_blobs(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    blobs = {}
    for name, layer in weight_layers(graph_module).items():
        if any(call_refusal(layer.module, call) is not None for call in layer.nodes):
            continue
        weight = layer.weight.detach()
        scale = weight.flatten(1).abs().amax(1).clamp(min=1e-6) / 15
        codes = weight / scale.reshape(-1, *[1] * (weight.dim() - 1))
        bias = layer.module.bias
        assert bias is None or isinstance(bias, Tensor)
        blobs[name] = pack_blob(codes.round().to(torch.int8), scale, bias)
    return blobs
