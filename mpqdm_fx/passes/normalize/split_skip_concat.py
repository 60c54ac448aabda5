"""Split layers that read a skip concatenation, one layer per part.

The two halves of a U-Net's skip concatenation have very different ranges; one scale for both
ruins the smaller (Q-Diffusion, arXiv 2302.04304, section 3.3.2: "shortcut-splitting
quantization"). A convolution or linear layer is a sum over its input channels, so it splits
exactly: `W @ [a; b] = W_a @ a + W_b @ b`, and each part gets an activation range of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.layers import (
    WeightLayer,
    add_module,
    free_name,
    rebuild_layer,
    weight_layers,
)
from mpqdm_fx.graph.parameters import note_parts
from mpqdm_fx.passes.base import GraphPass

__all__ = ["SplitSkipConcat"]

_aten = torch.ops.aten
_CONCATS = frozenset({_aten.cat.default, _aten.concat.default})
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True, kw_only=True)
class SplitSkipConcat(GraphPass):
    """Turn a layer over a concatenation of channels into a sum of layers over its parts.

    1. The layer is an ungrouped convolution or a Linear, and reads an `aten.cat` of two or more
       parts along its own input channels (axis 1 of [N, C, *spatial], the last axis for a
       Linear) directly. Padding is per channel, so every padding mode splits.
    2. Each part's number of channels is known and static (from `node.meta["val"]`), and all parts
       have one dtype: a layer does not take the whole numbers that a concatenation converts.
    3. A layer called several times is split only if every call reads parts of the same sizes.
    4. At least one part comes out of a weight layer. The sine and cosine halves of a timestep
       embedding do not: they share one range, and splitting them would gain nothing.
    5. Parts that are concatenations themselves are split again.

    The new layers are `<name>_part0`, `<name>_part1`, ... (with a number if taken); the first has
    the bias. The concatenation stays where others use it. Equal up to the order of summation.
    """

    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Apply the rules until no layer reads a concatenation."""
        modified = False
        while readers := _concatenating_layers(graph_module):
            for layer, sizes in readers:
                _split(graph_module, layer, sizes)
            modified = True
        return modified

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """No layer that could be split reads a concatenation.

        Raises:
            DialectError: one does; names the layer.
        """
        for layer, _ in _concatenating_layers(graph_module):
            raise DialectError(
                f"{layer.name!r} ({type(layer.module).__name__}) still reads a concatenation"
            )


def _concatenating_layers(
    graph_module: fx.GraphModule,
) -> list[tuple[WeightLayer, tuple[int, ...]]]:
    """Find layers over a concatenation, each with its parts' numbers of channels."""
    readers = []
    layers = weight_layers(graph_module)
    learned = _downstream(n for layer in layers.values() for n in layer.nodes)
    for layer in layers.values():
        # a subclass may do something else in forward, a buffer may belong to the whole weight
        if type(layer.module) not in _LAYERS or layer.module._buffers:
            continue
        if getattr(layer.module, "groups", 1) != 1:
            continue
        sizes = {_part_sizes(layer.module, node, learned) for node in layer.nodes}
        if len(sizes) == 1 and (parts := sizes.pop()) is not None:
            readers.append((layer, parts))
    return readers


def _downstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return these nodes and all that depend on them."""
    reached: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack.extend(node.users)
    return reached


def _part_sizes(module: nn.Module, call: fx.Node, learned: set[fx.Node]) -> tuple[int, ...] | None:
    concat = call.args[0] if len(call.args) == 1 else None
    if not isinstance(concat, fx.Node) or concat.target not in _CONCATS:
        return None
    parts = _parts(concat)
    if learned.isdisjoint(parts):
        return None
    values = [p.meta.get("val") for p in parts]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if len(parts) < 2 or len(tensors) < len(parts):
        return None
    rank = tensors[0].dim()
    axis = concat.args[1] if len(concat.args) > 1 else concat.kwargs.get("dim", 0)
    # spatial axes follow the channels, as many as the kernel has
    channels = rank - 1 - len(getattr(module, "kernel_size", ()))
    if axis not in (channels, channels - rank) or any(t.dim() != rank for t in tensors):
        return None
    if len({t.dtype for t in tensors}) > 1:
        return None
    sizes = [t.shape[channels] for t in tensors]
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    return tuple(int(size) for size in sizes)


def _parts(concat: fx.Node) -> tuple[fx.Node, ...]:
    parts = concat.args[0]
    assert isinstance(parts, list | tuple)
    return tuple(part for part in parts if isinstance(part, fx.Node))


def _split(graph_module: fx.GraphModule, layer: WeightLayer, sizes: tuple[int, ...]) -> None:
    module = layer.module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    assert bias is None or isinstance(bias, torch.Tensor)
    names = []
    for index, part in enumerate(weight.split_with_sizes(sizes, dim=1)):
        names.append(free_name(graph_module, f"{layer.name}_part{index}"))
        own_bias = bias if index == 0 else None
        add_module(graph_module, names[index], rebuild_layer(module, part, own_bias))
    note_parts(graph_module, layer.name, names)
    for call in layer.nodes:
        concat = call.args[0]
        assert isinstance(concat, fx.Node)
        total: fx.Node | None = None
        for name, part_node in zip(names, _parts(concat), strict=True):
            term = insert_call(graph_module, name, (part_node,), anchor=call)
            total = (
                term
                if total is None
                else insert_call(graph_module, _aten.add.Tensor, (total, term), anchor=call)
            )
        assert total is not None
        call.replace_all_uses_with(total)
        graph_module.graph.erase_node(call)
