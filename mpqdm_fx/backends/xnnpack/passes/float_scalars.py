"""Write whole numbers as fractions in arithmetic of floating-point tensors.

ExecuTorch (1.5.1) makes a tensor of the number in `x + 1`: of an int64, which it converts on a
portable kernel at every run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.passes.base import GraphPass

__all__ = ["FloatScalars"]

_aten = torch.ops.aten
_ARITHMETIC = frozenset(
    {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.rsub.Scalar}
)
_EXACT = 2**24
"""Up to here float32 holds every whole number; half precision rounds both alike."""


@dataclass(frozen=True, kw_only=True)
class FloatScalars(GraphPass):
    """Replace an int operand of `+`, `-`, `*` and `/` by the float of its value.

    The result keeps its dtype, that of the tensor. Bit-equal: either number is converted to it.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every such number; False if there was none."""
        modified = False
        for node in graph_module.graph.nodes:
            if node.op != "call_function" or node.target not in _ARITHMETIC:
                continue
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if not all(_is_float(source) for source in node.args if isinstance(source, fx.Node)):
                continue
            for index, operand in enumerate(node.args[:2]):
                if type(operand) is int and abs(operand) <= _EXACT:
                    node.update_arg(index, float(operand))
                    modified = True
        return modified


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
