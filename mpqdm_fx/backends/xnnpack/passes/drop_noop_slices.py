"""Drop slices that take everything.

`x[:, :, 1:]` is traced as one slice per axis, two of which do nothing. ExecuTorch drops those by
itself, but only after the remedies for its partitioner (`UnshareDequantize`, `RequantizeCopies`)
have looked at the graph: what was not an int8 pattern then becomes one behind their back.
"""

from dataclasses import dataclass

import torch
from torch import fx

from mpqdm_fx.graph.nodes import static_shape
from mpqdm_fx.graph.qdq import is_dequantize, is_quantize
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DropNoopSlices"]


@dataclass(frozen=True, kw_only=True)
class DropNoopSlices(GraphPass):
    """Replace a slice by its input where both have the same shape.

    A slice never adds elements, so equal static sizes mean that it takes all of them in order.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Drop them; False if there were none."""
        modified = False
        target = torch.ops.aten.slice.Tensor
        for node in graph_module.graph.find_nodes(op="call_function", target=target):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if _shape(source) is None or _shape(source) != _shape(node):
                continue
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
            modified = True
        return modified


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    # convert_pt2e puts in q/dq nodes without values; they have the shape of what they read
    while "val" not in node.meta and (is_quantize(node) or is_dequantize(node)):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return static_shape(node)
