"""Write the tanh form of GELU in ops that XNNPACK computes as they are.

ExecuTorch (1.5.1) delegates every GELU as the exact one, with erf, and drops `approximate="tanh"`:
outputs are off by up to 5e-4, which is no rounding and in no message.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.norms import take_over
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DecomposeGelu"]

_aten = torch.ops.aten
_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
_CUBE = 0.044715 * _SLOPE


@dataclass(frozen=True, kw_only=True)
class DecomposeGelu(GraphPass):
    """Rewrite GELU with `approximate="tanh"`, module and aten op, by sigmoid.

    `0.5 x (1 + tanh(k (x + c x^3)))` is `x sigmoid(2 k (x + c x^3))`, with k = sqrt(2 / pi) and
    c = 0.044715 (Hendrycks & Gimpel 2016, arXiv 1606.08415). The exact form is left alone.
    """

    tolerance: ClassVar[float] = 1e-6

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rule covers; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            source = node.args[0] if node.args else None
            if isinstance(source, fx.Node) and _is_tanh_form(graph_module, node):
                take_over(graph_module, node, _plain(graph_module, node, source))
                modified = True
        return modified


def _is_tanh_form(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        stock = isinstance(module, nn.GELU) and type(module).forward is nn.GELU.forward
        return stock and module.approximate == "tanh"
    is_gelu = node.op == "call_function" and node.target is _aten.gelu.default
    return is_gelu and node.kwargs.get("approximate") == "tanh"


def _plain(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node) -> fx.Node:
    def call(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    square = call(_aten.mul.Tensor, source, source)
    slope = call(_aten.add.Tensor, call(_aten.mul.Tensor, square, _CUBE), _SLOPE)
    share = call(_aten.sigmoid.default, call(_aten.mul.Tensor, slope, source))
    return call(_aten.mul.Tensor, source, share)
