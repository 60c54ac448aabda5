"""Split linear layers whose output channels are stored at different widths.

XNNPACK stores a layer's weights at four bits all or none: one channel that needs eight makes all of
them bytes. Channels of one width together are layers of their own; the order of channels is put
into the weights that read them, so no value is moved at run time but for a concatenation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar, Self

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.channel_groups import ChannelGroup, channel_group
from mpqdm_fx.graph.editing import (
    add_module,
    free_name,
    insert_call,
    keep_fetched,
    replace_module,
)
from mpqdm_fx.graph.layers import WeightLayer, rebuild_layer, weight_layers
from mpqdm_fx.passes.base import GraphPass

__all__ = ["SplitMixedRows"]

_aten = torch.ops.aten
_CODES, _SCALE = "weight_codes", "weight_scale"
_MOST = 3  # layers that one becomes
# First channels that are narrow in both layers, last those that are in neither's favour: the first
# layer has then two runs of one width and the second three.
_PLACES = {(4, 4): 0, (4, 8): 1, (8, 8): 2, (8, 4): 3}


@dataclass(frozen=True, kw_only=True)
class SplitMixedRows(GraphPass):
    """Turn a linear layer of mixed widths into up to three of one width each, and a concatenation.

    1. Where all that happens to the output is element by element and ends in linear layers,
       channels are sorted by width, and those layers' input channels in the same order. Two layers
       whose outputs meet there (value and gate of a GEGLU) are sorted together.
    2. Elsewhere the channels stay in their order; a layer is split if it has at most three runs of
       one width.
    3. A layer is left alone if its calls differ, if it has buffers other than integers and scales,
       or if four bits in place of eight would save fewer than `least_bytes`.

    The parts of `<name>` are `<name>_rows`, `<name>_rows_1`, ...; a layer that is only sorted keeps
    its name.

    Attributes:
        widths: Stored width of each output channel, 4 or 8, by layer name.
        least_bytes: What a split has to save; an operator takes about 1024 itself.
    """

    widths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    least_bytes: int = 2048

    # Sums over channels run in another order; a later quantizer may take the neighbouring code.
    tolerance: ClassVar[float] = 1e-2

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Widths that alternate, and such as are in order."""
        sizes = {
            name: layer.weight.shape[0]
            for name, layer in weight_layers(graph_module).items()
            if isinstance(layer.module, nn.Linear)
        }
        mixed = {name: [4 + 4 * (i % 3 == 1) for i in range(n)] for name, n in sizes.items()}
        ordered = {name: [4] * (n // 2) + [8] * (n - n // 2) for name, n in sizes.items()}
        return (cls(widths=mixed, least_bytes=0), cls(widths=ordered, least_bytes=0))

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Split every layer that the rules allow; False if there was none."""
        modified = False
        for name in self.widths:
            layer = weight_layers(graph_module).get(name)
            if layer is not None and self._is_wanted(layer):
                modified |= self._sort(graph_module, layer) or self._cut(graph_module, layer)
        return modified

    def _is_wanted(self, layer: WeightLayer) -> bool:
        if type(layer.module) is not nn.Linear or not _is_plain(layer):
            return False
        widths = self.widths[layer.name]
        if set(widths) != {4, 8} or len(widths) != layer.module.out_features:
            return False
        return list(widths).count(4) * layer.module.in_features // 2 >= self.least_bytes

    def _sort(self, graph_module: fx.GraphModule, layer: WeightLayer) -> bool:
        group = channel_group(graph_module, layer.nodes[0]) if len(layer.nodes) == 1 else None
        if group is None or not _are_plain(graph_module, group):
            return False
        layers = weight_layers(graph_module)
        names = [str(node.target) for node in group.writers]
        channels = range(layers[names[0]].weight.shape[0])
        columns = [self.widths.get(name, [8] * len(channels)) for name in names]
        if any(len(column) != len(channels) for column in columns):
            return False
        keys = list(zip(*columns, strict=True))
        if len(columns) == 2:
            order = sorted(channels, key=lambda channel: _PLACES[keys[channel]])
        elif len(columns) == 1:
            order = sorted(channels, key=lambda channel: keys[channel])
        else:
            return False
        for node, column in zip(group.writers, columns, strict=True):
            _split(graph_module, layers[str(node.target)], order, [column[i] for i in order])
        for name in dict.fromkeys(str(node.target) for node in group.readers):
            keep_fetched(graph_module, name)
            replace_module(graph_module, name, _columns(layers[name].module, order))
        return True

    def _cut(self, graph_module: fx.GraphModule, layer: WeightLayer) -> bool:
        widths = self.widths[layer.name]
        if len(list(groupby(widths))) > _MOST:
            return False
        _split(graph_module, layer, range(len(widths)), widths)
        return True


def _is_plain(layer: WeightLayer) -> bool:
    """Whether rows and columns can be taken from a layer, and all its calls are by its name."""
    if not set(layer.module._buffers) <= {_CODES, _SCALE}:
        return False
    return all(
        node.target == layer.name and len(node.args) == 1 and not node.kwargs
        for node in layer.nodes
    )


def _are_plain(graph_module: fx.GraphModule, group: ChannelGroup) -> bool:
    """The same of all layers around a group, and that they are called there alone."""
    layers = weight_layers(graph_module)
    if set(group.writers) & set(group.readers):  # a square layer around which the order would go
        return False
    inside = {*group.writers, *group.readers}
    for node in inside:
        layer = layers.get(str(node.target))
        if layer is None or type(layer.module) is not nn.Linear or not _is_plain(layer):
            return False
        if not set(layer.nodes) <= inside:
            return False
    return all(len(layers[str(node.target)].nodes) == 1 for node in group.writers)


def _split(
    graph_module: fx.GraphModule, layer: WeightLayer, order: Sequence[int], widths: Sequence[int]
) -> None:
    """Replace a layer's calls by those of one layer for each run of equal widths."""
    if len(set(widths)) == 1:
        keep_fetched(graph_module, layer.name)
        replace_module(graph_module, layer.name, _rows(layer.module, order))
        return
    parts, start = [], 0
    for _, run in groupby(widths):
        rows = list(order[start : (start := start + len(list(run)))])
        name = free_name(graph_module, f"{layer.name}_rows")
        add_module(graph_module, name, _rows(layer.module, rows))
        parts.append(name)
    for call in layer.nodes:
        values = [insert_call(graph_module, name, call.args, anchor=call) for name in parts]
        joined = insert_call(graph_module, _aten.cat.default, (values, -1), anchor=call)
        call.replace_all_uses_with(joined)
        graph_module.graph.erase_node(call)


def _rows(linear: nn.Module, rows: Sequence[int]) -> nn.Module:
    assert isinstance(linear, nn.Linear)
    index = torch.tensor(rows)
    bias = None if linear.bias is None else linear.bias[index]
    part = rebuild_layer(linear, linear.weight[index], bias)
    for name, buffer in linear._buffers.items():
        assert isinstance(buffer, Tensor)
        part._buffers[name] = buffer[index]
    return part


def _columns(linear: nn.Module, order: Sequence[int]) -> nn.Module:
    assert isinstance(linear, nn.Linear)
    index = torch.tensor(order)
    sorted_layer = rebuild_layer(linear, linear.weight[:, index], linear.bias)
    if _CODES in linear._buffers:
        codes = linear._buffers[_CODES]
        assert isinstance(codes, Tensor)
        sorted_layer._buffers[_CODES] = codes[:, index]
    return sorted_layer
