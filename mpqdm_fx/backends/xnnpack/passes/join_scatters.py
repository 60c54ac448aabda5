"""Write the overwriting of slices as concatenations.

In-place code (`x[:, :n] = y`) is traced as `slice_scatter`, for which ExecuTorch (1.5.1) has a
portable kernel only; XNNPACK joins slices.
"""

from dataclasses import dataclass

import torch
from torch import fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument, static_shape
from mpqdm_fx.passes.base import GraphPass

__all__ = ["JoinScatters"]

_aten = torch.ops.aten
_SCATTERS = frozenset({_aten.slice_scatter.default, _aten.select_scatter.default})


@dataclass(frozen=True, kw_only=True)
class JoinScatters(GraphPass):
    """Replace `slice_scatter` and `select_scatter` with static sizes by `cat`.

    1. What is overwritten stands between what is left of the axis before and behind it.
    2. With a step that divides the axis, the axis is viewed as [size / step, step], of which one
       column is overwritten from the first row to the last. Other steps are left alone.
    3. What is overwritten in whole is replaced.

    Numbers are only moved: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rules cover; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            span = _span(node)
            if span is not None:
                node.replace_all_uses_with(_joined(graph_module, node, *span))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _span(node: fx.Node) -> tuple[int, int, int, int] | None:
    """Axis, start, end and step of what is overwritten; None if the rules do not cover it."""
    if node.op != "call_function" or node.target not in _SCATTERS:
        return None
    shape = static_shape(node)
    if shape is None or any(static_shape(source) is None for source in node.all_input_nodes):
        return None
    if len({n.meta["val"].dtype for n in (node, *node.all_input_nodes)}) > 1:
        return None
    if node.target is _aten.select_scatter.default:
        axis, index = argument(node, 2, "dim", 0), argument(node, 3, "index", 0)
        assert isinstance(axis, int)
        assert isinstance(index, int)
        start = index % shape[axis]
        return axis % len(shape), start, start + 1, 1
    given = (argument(node, i, name, None) for i, name in enumerate(("start", "end"), start=3))
    axis, step = argument(node, 2, "dim", 0), argument(node, 5, "step", 1)
    assert isinstance(axis, int)
    assert isinstance(step, int)
    size = shape[axis]
    start, end, _ = slice(*given).indices(size)
    if start >= end or (step > 1 and (size % step or start >= step or start + size - end >= step)):
        return None
    return axis % len(shape), start, end, step


def _joined(
    graph_module: fx.GraphModule, node: fx.Node, axis: int, start: int, end: int, step: int
) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    whole, part = node.args[:2]
    assert isinstance(whole, fx.Node)
    assert isinstance(part, fx.Node)
    shape = list(node.meta["val"].shape)
    before, size, behind = shape[:axis], shape[axis], shape[axis + 1 :]
    if step > 1:  # the axis that is cut is the one of the columns
        before, size, end = [*before, size // step], step, start + 1
        axis += 1
    cut = [*before, size, *behind]
    if cut != shape:
        whole = emit(_aten.reshape.default, whole, cut)
    parts = []
    if start:
        parts.append(emit(_aten.slice.Tensor, whole, axis, 0, start))
    filled = [*before, end - start, *behind]
    # a node of its own for each: the partitioner counts different inputs of a concatenation
    parts.append(emit(_aten.reshape.default, part, filled))
    if end < size:
        parts.append(emit(_aten.slice.Tensor, whole, axis, end, size))
    result = emit(_aten.cat.default, parts, axis) if len(parts) > 1 else parts[0]
    return emit(_aten.reshape.default, result, shape) if cut != shape else result
