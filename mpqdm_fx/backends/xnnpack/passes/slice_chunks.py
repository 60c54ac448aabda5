"""Write what cuts a tensor into parts as one slice for each part.

XNNPACK in ExecuTorch (1.5.1) slices, but knows no `chunk`, `split` or `unbind`: attention that
makes queries, keys and values with one layer, and norms that are scaled and shifted, fall apart
there.
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument
from mpqdm_fx.passes.base import GraphPass

__all__ = ["SliceChunks"]

_aten = torch.ops.aten
_CUTS = frozenset(
    {
        _aten.chunk.default,
        _aten.split.Tensor,
        _aten.split.sizes,
        _aten.split_with_sizes.default,
        _aten.unbind.int,
    }
)


@dataclass(frozen=True, kw_only=True)
class SliceChunks(GraphPass):
    """Replace `chunk`, `split` and `unbind` by slices where the axis that is cut has a static size.

    A part of `unbind` is a `select`. Parts that nobody reads are not made. Numbers are only moved:
    bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every cut that the rule covers; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            sizes = _part_sizes(node)
            if sizes is None:
                continue
            axis = _axis(node)
            ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
            for part in list(node.users):
                index = part.args[1]
                assert isinstance(index, int)
                end = ends[index]
                args = (node.args[0], axis, end - sizes[index], end)
                if node.target is _aten.unbind.int:
                    result = insert_call(graph_module, _aten.select.int, args[:3], anchor=part)
                else:
                    result = insert_call(graph_module, _aten.slice.Tensor, args, anchor=part)
                part.replace_all_uses_with(result)
                graph_module.graph.erase_node(part)
            graph_module.graph.erase_node(node)
            modified = True
        return modified


def _axis(node: fx.Node) -> int:
    axis = argument(node, 1 if node.target is _aten.unbind.int else 2, "dim", 0)
    assert isinstance(axis, int)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return axis % int(source.meta["val"].dim())


def _part_sizes(node: fx.Node) -> list[int] | None:
    """Sizes of the parts along the axis that is cut, or None if the rule does not cover them."""
    if node.op != "call_function" or node.target not in _CUTS or not node.users:
        return None
    parts = node.meta.get("val")
    if not isinstance(parts, tuple | list) or not all(isinstance(part, Tensor) for part in parts):
        return None
    if any(user.target is not operator.getitem for user in node.users):
        return None
    if node.target is _aten.unbind.int:
        return [1] * len(parts)
    sizes = [part.shape[_axis(node)] for part in parts]
    return sizes if all(isinstance(size, int) for size in sizes) else None
