"""Write the adding and taking away of axes of size one as reshapes.

XNNPACK in ExecuTorch (1.5.1) adds an axis only behind the last, takes none away, and selects from
none; it reshapes and slices whatever it is given.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument, sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["ReshapeUnitAxes"]

_aten = torch.ops.aten
_UNITS = frozenset(
    {_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default}
)


@dataclass(frozen=True, kw_only=True)
class ReshapeUnitAxes(GraphPass):
    """Rewrite floating-point `unsqueeze`, `squeeze`, `select`, `stack` of one dynamic axis at most.

    1. `unsqueeze` and `squeeze` become one reshape to the size they give.
    2. `select` becomes a slice of length one (none if the axis has size one) and a reshape. Its
       axis must be static.
    3. `stack` becomes a concatenation of values with an axis of size one each.

    Numbers are only moved: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rules cover; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if not _is_covered(node):
                continue
            if node.target is _aten.stack.default:
                result = _joined(graph_module, node)
            else:
                x = _sliced(graph_module, node) if node.target is _aten.select.int else node.args[0]
                args = (x, sizes(node))
                result = insert_call(graph_module, _aten.reshape.default, args, anchor=node)
            node.replace_all_uses_with(result)
            graph_module.graph.erase_node(node)
            modified = True
        return modified


def _is_covered(node: fx.Node) -> bool:
    if node.op != "call_function" or node.kwargs:
        return False
    if node.target not in _UNITS and node.target not in (_aten.select.int, _aten.stack.default):
        return False
    source, value = node.args[0], node.meta.get("val")
    if node.target is _aten.stack.default:
        if len({part.meta["val"].dtype for part in node.all_input_nodes}) > 1:
            return False
        source = node.all_input_nodes[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return False
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
        return False
    shape = sizes(node)
    if shape.count(-1) > 1 or 0 in shape:
        return False
    # a reshape must not fix a size that the op leaves open, nor leave one open that it fixes
    same = shape.count(-1) == sizes(source).count(-1)
    return same and (node.target is not _aten.select.int or isinstance(node.args[2], int))


def _joined(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    parts = node.args[0]
    axis = argument(node, 1, "dim", 0)
    assert isinstance(parts, list | tuple)
    assert isinstance(axis, int)
    axis %= len(sizes(node))
    shape = sizes(node)
    shape[axis] = 1
    views = [
        insert_call(graph_module, _aten.reshape.default, (part, shape), anchor=node)
        for part in parts
    ]
    if len(views) == 1:
        return views[0]
    return insert_call(graph_module, _aten.cat.default, (views, axis), anchor=node)


def _sliced(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    source, axis, index = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(axis, int)
    assert isinstance(index, int)
    size = source.meta["val"].shape[axis]
    if size == 1:
        return source
    start = index % size
    args = (source, axis % source.meta["val"].dim(), start, start + 1)
    return insert_call(graph_module, _aten.slice.Tensor, args, anchor=node)
