"""Remove multiplication and division by one, and repetition to the size that is there already.

diffusers divides every residual by an `output_scale_factor` that is 1. A backend reads and writes
the whole image for it, and ExecuTorch (1.5.1) converts the factor on a portable kernel at every
run if it is an int.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.passes.base import GraphPass

__all__ = ["DropUnitFactors"]

_aten = torch.ops.aten
_SCALED = frozenset({_aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar, _aten.div.Scalar})


@dataclass(frozen=True, kw_only=True)
class DropUnitFactors(GraphPass):
    """Replace a node by its input x if it is one of these and has the shape and dtype of x.

    1. x * 1, 1 * x or x / 1 with a Python number.
    2. x * y or x / y, and y * x, with y = `aten.ones` or `aten.ones_like`.
    3. `aten.expand` of x.

    Bit-equal: 1 is neutral in every arithmetic.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Remove every such node; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            operand = _operand(node)
            if operand is not None and _alike(node, operand):
                node.replace_all_uses_with(operand)
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _operand(node: fx.Node) -> fx.Node | None:
    """The input that equals the result, as far as the arguments tell."""
    if node.op != "call_function":
        return None
    if node.target is _aten.expand.default:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if node.target not in _SCALED or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if isinstance(first, fx.Node) and _is_one(second):
        return first
    product = node.target in (_aten.mul.Tensor, _aten.mul.Scalar)
    return second if product and isinstance(second, fx.Node) and _is_one(first) else None


def _is_one(value: object) -> bool:
    if isinstance(value, fx.Node):
        return value.target in (_aten.ones.default, _aten.ones_like.default)
    return isinstance(value, int | float) and value == 1


def _alike(node: fx.Node, operand: fx.Node) -> bool:
    a, b = node.meta.get("val"), operand.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    # symbolic sizes count as equal only if they are the same expression: no guard is made
    return a.dtype == b.dtype and [str(n) for n in a.shape] == [str(n) for n in b.shape]
