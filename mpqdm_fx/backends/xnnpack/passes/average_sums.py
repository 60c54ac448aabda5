"""Write sums as means times their number: XNNPACK in ExecuTorch (1.5.1) averages, and sums nothing.

Models pool prompts by sums over the tokens that a mask leaves.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument, sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["AverageSums"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class AverageSums(GraphPass):
    """Rewrite `sum.dim_IntList` of float32 and float64 over static axes that are named.

    Sums of numbers without axes are left alone. The mean is rounded and the product once more.
    """

    tolerance: ClassVar[float] = 1e-6

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every sum that the rule covers; False if there was none."""
        modified = False
        nodes = graph_module.graph.find_nodes(op="call_function", target=_aten.sum.dim_IntList)
        for node in nodes:
            number = _summed(node)
            if not number:
                continue
            args = (
                node.args[0],
                argument(node, 1, "dim", None),
                argument(node, 2, "keepdim", False),
            )
            mean = insert_call(graph_module, _aten.mean.dim, args, anchor=node)
            total = insert_call(graph_module, _aten.mul.Tensor, (mean, float(number)), anchor=node)
            node.replace_all_uses_with(total)
            graph_module.graph.erase_node(node)
            modified = True
        return modified


def _summed(node: fx.Node) -> int:
    """How many numbers each sum has; 0 if the rule does not cover the node."""
    source = node.args[0]
    axes: Any = argument(node, 1, "dim", None)
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or not isinstance(value, Tensor) or not axes:
        return 0
    if not value.dim():  # torch takes the axes 0 and -1 of a number
        return 0
    if value.dtype not in (torch.float32, torch.float64) or argument(node, 3, "dtype", None):
        return 0
    shape = sizes(source)
    summed = [shape[axis] for axis in axes]
    return 0 if -1 in summed else torch.Size(summed).numel()
