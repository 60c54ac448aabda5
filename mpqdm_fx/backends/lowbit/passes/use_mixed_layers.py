"""Let own kernels run weight layers on values that lie channels last."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn

import mpqdm_fx.backends.lowbit.ops  # noqa: F401 - registers the operators
from mpqdm_fx.backends.lowbit.axes import permuted, to_first, to_last
from mpqdm_fx.backends.lowbit.blob import pack_blob
from mpqdm_fx.backends.lowbit.layers import call_refusal
from mpqdm_fx.graph.editing import add_tensor, insert_call, keep_fetched, replace_module
from mpqdm_fx.graph.layers import WeightLayer, is_pointwise, padding_sides, weight_layers
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.graph.upsampling import nearest_factors
from mpqdm_fx.passes.base import GraphPass
from mpqdm_fx.records.activations import ActivationRange, StaticActivation

__all__ = ["UseMixedLayers"]

_mpqdm = torch.ops.mpqdm


@dataclass(frozen=True, eq=False, kw_only=True)
class UseMixedLayers(GraphPass):
    """Turn rounded layers into a quantizer and `mpqdm::conv2d_mixed` or `linear_mixed`.

    1. A convolution reads a permutation [B, H, W, C] of its value and its users a permutation
       [B, C, H, W] of what it gives; `MoveLayouts` takes away the pairs that cancel. Where it reads
       an image that was upsampled by two to the nearest pixel, it reads the image before, and
       repeats the pixels itself: the range is the same, and there are a quarter of the numbers.
    2. Ranges are those of `QuantizeActivations`: one a sample for convolutions, one a row for
       linear layers, one a pixel for 1x1 convolutions, which are linear layers over the pixels
       (`mpqdm::quantize_mixed`). Layers that read one value with equal parts share its codes.
       A fixed range is two constants, and `mpqdm::quantize_static_mixed` reads them. What such a
       layer gives is rounded too, by that operator and `mpqdm::dequantize_mixed`.
    3. The weights are a buffer `<layer>.weight_blob`, uint8; the float weight goes.
    4. A layer is left alone unless own kernels take all its calls (`layers.call_refusal`).

    Attributes:
        blobs: Weight blob by layer name, from `lowbit.blob.pack_blob`.
        static: Of layers with fixed ranges, those of each call in graph order, as they are in use:
            the input's may be that of another layer's output. All others are dynamic.
    """

    blobs: Mapping[str, Tensor] = field(default_factory=dict)
    static: Mapping[str, Sequence[StaticActivation]] = field(default_factory=dict)

    # Inputs are rounded, and weights are what the blob says.
    preserves_function: ClassVar[bool] = False

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """All layers that fit, at four bits: ranges chosen at run time, and fixed ones."""
        blobs, layers = _example_blobs(graph_module), weight_layers(graph_module)
        grid = ActivationRange(scale=1 / 16, zero_point=3)
        pair = StaticActivation(input=grid, output=grid)
        static = {name: [pair] * len(layers[name].nodes) for name in blobs}
        return (cls(blobs=blobs), cls(blobs=blobs, static=static))

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
                keep_fetched(graph_module, layer.name)
                replace_module(graph_module, layer.name, nn.Module())
                blob = self.blobs[layer.name]
                values.weights[layer.name] = add_tensor(
                    graph_module, f"{layer.name}.weight_blob", blob, anchor=call
                )
            ranges = self.static.get(layer.name)
            chosen = ranges[layer.nodes.index(call)] if ranges else None
            _rewrite_call(graph_module, call, layer, values, chosen)
        return bool(calls)


class _SharedValues:
    """What several calls read, inserted once."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._last: dict[fx.Node, fx.Node] = {}
        self._codes: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        self._static_codes: dict[tuple[fx.Node, ActivationRange], fx.Node] = {}
        self._ranges: dict[tuple[float, int], tuple[fx.Node, fx.Node]] = {}
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

    def static_codes(
        self, value: fx.Node, chosen: ActivationRange, layer: str, anchor: fx.Node
    ) -> list[fx.Node]:
        """Codes of a fixed range, its scale and its zero point."""
        known = self._range(chosen, layer, anchor)
        key = (value, chosen)
        if key not in self._static_codes:
            target = _mpqdm.quantize_static_mixed.default
            codes = insert_call(self._graph_module, target, (value, *known), anchor=anchor)
            self._static_codes[key] = codes
        return [self._static_codes[key], *known]

    def rounded(
        self, value: fx.Node, chosen: ActivationRange, layer: str, anchor: fx.Node
    ) -> fx.Node:
        """A value rounded to a fixed range."""
        args = tuple(self.static_codes(value, chosen, layer, anchor))
        return insert_call(self._graph_module, _mpqdm.dequantize_mixed.default, args, anchor=anchor)

    def _range(
        self, chosen: ActivationRange, layer: str, anchor: fx.Node
    ) -> tuple[fx.Node, fx.Node]:
        """The constants of a range, named by the first layer that has it."""
        scale = torch.tensor([chosen.scale], dtype=torch.float32)
        zero_point = torch.tensor([chosen.zero_point], dtype=torch.int32)
        key = (float(scale), chosen.zero_point)
        if key not in self._ranges:
            self._ranges[key] = (
                add_tensor(self._graph_module, f"{layer}.scale", scale, anchor=anchor),
                add_tensor(self._graph_module, f"{layer}.zero_point", zero_point, anchor=anchor),
            )
        return self._ranges[key]


def _rewrite_call(
    graph_module: fx.GraphModule,
    call: fx.Node,
    layer: WeightLayer,
    values: _SharedValues,
    chosen: StaticActivation | None,
) -> None:
    module, name = layer.module, layer.name
    value, upsampling = _read(module, call)
    is_image = isinstance(module, nn.Conv2d)
    source = values.last(value, call) if is_image else value
    if chosen is None:
        codes = values.codes(source, _parts(module, source), call)
    else:
        codes = values.static_codes(source, chosen.input, name, call)
    target, settings = _operator(module)
    repeated = (upsampling,) if upsampling > 1 else ()
    args = (*codes, values.weights[name], *settings, *repeated)
    result = insert_call(graph_module, target, args, anchor=call)
    if chosen is not None:
        result = values.rounded(result, chosen.output, name, call)
    if is_image:
        result = permuted(graph_module, result, to_first(4), anchor=call)
    call.replace_all_uses_with(result)
    graph_module.graph.erase_node(call)


def _read(module: nn.Module, call: fx.Node) -> tuple[fx.Node, int]:
    """The value that a layer has to read, and how often each of its pixels."""
    value = call.args[0]
    assert isinstance(value, fx.Node)
    if not isinstance(module, nn.Conv2d) or is_pointwise(module):
        return value, 1
    source = value.args[0] if nearest_factors(value) == [2, 2] else None
    return (source, 2) if isinstance(source, fx.Node) else (value, 1)


def _parts(module: nn.Module, source: fx.Node) -> int:
    """Ranges that are chosen at run time: one a row, a pixel or a sample."""
    return prod(sizes(source)[:-1]) if is_pointwise(module) else sizes(source)[0]


def _operator(module: nn.Module) -> tuple[Any, tuple[int, ...]]:
    """The operator that runs a layer, and its arguments behind the weight."""
    if isinstance(module, nn.Linear):
        return _mpqdm.linear_mixed.default, (module.out_features,)
    assert isinstance(module, nn.Conv2d)
    if is_pointwise(module):
        return _mpqdm.linear_mixed.default, (module.out_channels,)
    return _mpqdm.conv2d_mixed.default, (
        module.out_channels,
        module.kernel_size[0],
        module.stride[0],
        padding_sides(module)[0],
    )


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
