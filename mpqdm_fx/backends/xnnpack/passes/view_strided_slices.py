"""Write slices with a step as a reshape and a selection.

Rotary embeddings take every other number of a head. XNNPACK in ExecuTorch (1.5.1) slices with step
one alone, and leaves others on a portable kernel that parts the program in two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument
from mpqdm_fx.passes.base import GraphPass

__all__ = ["ViewStridedSlices"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class ViewStridedSlices(GraphPass):
    """Rewrite floating-point `x[start:end:step]` of static size with a step above one.

    Of the m numbers that are taken, each is one of a window of `step` numbers: the m windows are
    sliced off, viewed as [m, step], and one column is selected. Left alone where the axis has no m
    whole windows. Numbers are only moved: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every slice that the rule covers; False if there was none."""
        modified = False
        slices = graph_module.graph.find_nodes(op="call_function", target=_aten.slice.Tensor)
        for node in slices:
            if _has_windows(node):
                node.replace_all_uses_with(_selected(graph_module, node))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _has_windows(node: fx.Node) -> bool:
    step = argument(node, 4, "step", 1)
    source, value = node.args[0], node.meta.get("val")
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    if step == 1 or not isinstance(before, Tensor) or not isinstance(value, Tensor):
        return False
    if not value.is_floating_point() or 0 in value.shape:
        return False
    if not all(isinstance(n, int) for n in (*before.shape, *value.shape)):
        return False
    axis = argument(node, 1, "dim", 0)
    assert isinstance(axis, int)
    assert isinstance(step, int)
    return bool(value.shape[axis] * step <= before.shape[axis])


def _selected(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    x = node.args[0]
    assert isinstance(x, fx.Node)
    shape = list(x.meta["val"].shape)
    axis, step = argument(node, 1, "dim", 0), argument(node, 4, "step", 1)
    assert isinstance(axis, int)
    assert isinstance(step, int)
    axis %= len(shape)
    size, taken = shape[axis], node.meta["val"].shape[axis]
    first, _, _ = slice(argument(node, 2, "start", None), None).indices(size)
    start = min(first, size - taken * step)  # where the first window begins
    if taken * step < size:
        x = emit(_aten.slice.Tensor, x, axis, start, start + taken * step)
    windows = emit(_aten.reshape.default, x, [*shape[:axis], taken, step, *shape[axis + 1 :]])
    return emit(_aten.select.int, windows, axis + 1, first - start)
