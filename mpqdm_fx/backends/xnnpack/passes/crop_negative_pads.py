"""Write negative padding as slices: XNNPACK pads, and ExecuTorch's own kernel refuses to crop.

A program with such a pad is lowered, and then fails when it is run (ExecuTorch 1.5.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument
from mpqdm_fx.passes.base import GraphPass

__all__ = ["CropNegativePads"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class CropNegativePads(GraphPass):
    """Replace a constant pad with negative sides by slices, and a pad of what is positive.

    Numbers are only moved: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every one; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            sides = _sides(node)
            if any(side < 0 for side in sides):
                node.replace_all_uses_with(_cropped(graph_module, node, sides))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _sides(node: fx.Node) -> Sequence[int]:
    """What a constant pad adds, last axis first, front and back; nothing for other nodes."""
    if node.op != "call_function" or not isinstance(node.args[0] if node.args else None, fx.Node):
        return ()
    if node.target is _aten.pad.default and argument(node, 2, "mode", "constant") != "constant":
        return ()
    if node.target not in (_aten.pad.default, _aten.constant_pad_nd.default):
        return ()
    sides = argument(node, 1, "pad", ())
    assert isinstance(sides, Sequence)
    return sides if all(isinstance(side, int) for side in sides) else ()


def _cropped(graph_module: fx.GraphModule, node: fx.Node, sides: Sequence[int]) -> fx.Node:
    value = node.args[0]
    for axis, (front, back) in enumerate(zip(sides[::2], sides[1::2], strict=True), start=1):
        if front < 0 or back < 0:
            end = [back] if back < 0 else []
            args = (value, -axis, max(0, -front), *end)
            value = insert_call(graph_module, _aten.slice.Tensor, args, anchor=node)
    positive = [max(0, side) for side in sides]
    if any(positive):
        fill = argument(node, 3 if node.target is _aten.pad.default else 2, "value", None)
        padding = (value, positive, 0.0 if fill is None else fill)
        value = insert_call(graph_module, _aten.constant_pad_nd.default, padding, anchor=node)
    assert isinstance(value, fx.Node)
    return value
