"""Write reciprocals as divisions: XNNPACK in ExecuTorch (1.5.1) divides, and has no reciprocal.

Preconditioned models (Karras et al. 2022) scale their input by one; left to a portable kernel, it
parts the program in two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import add_tensor, insert_call
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DivideReciprocals"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class DivideReciprocals(GraphPass):
    """Replace the floating-point `reciprocal` of a tensor with axes by one over it.

    Both are the correctly rounded quotient: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every one; False if there was none."""
        modified = False
        for node in graph_module.graph.find_nodes(
            op="call_function", target=_aten.reciprocal.default
        ):
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
                continue
            ones = torch.ones(1, dtype=value.dtype)
            one = add_tensor(graph_module, f"{node.name}_one", ones, anchor=node)
            result = insert_call(graph_module, _aten.div.Tensor, (one, node.args[0]), anchor=node)
            node.replace_all_uses_with(result)
            graph_module.graph.erase_node(node)
            modified = True
        return modified
