"""Write small powers as products: of powers, XNNPACK in ExecuTorch (1.5.1) has the integer 2 alone.

GELUs that a model writes itself cube their input, and norms square theirs by 2.0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.passes.base import GraphPass

__all__ = ["MultiplyPowers"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class MultiplyPowers(GraphPass):
    """Rewrite `pow` of floating-point values by 2.0, 3 and 4, whole or as floats.

    Left alone: whole numbers, whose products are whole where their powers are not. The same
    products, rounded once more.
    """

    tolerance: ClassVar[float] = 1e-6

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every power that the rule covers; False if there was none."""
        modified = False
        for node in graph_module.graph.find_nodes(
            op="call_function", target=_aten.pow.Tensor_Scalar
        ):
            x, power = node.args
            value = x.meta.get("val") if isinstance(x, fx.Node) else None
            integer = type(power) is int and power == 2  # taken as it is
            if integer or power not in (2, 3, 4) or not isinstance(value, Tensor):
                continue
            if not value.is_floating_point():
                continue
            square = insert_call(graph_module, _aten.mul.Tensor, (x, x), anchor=node)
            result = square
            if power > 2:
                args = (square, x if power == 3 else square)
                result = insert_call(graph_module, _aten.mul.Tensor, args, anchor=node)
            node.replace_all_uses_with(result)
            graph_module.graph.erase_node(node)
            modified = True
        return modified
