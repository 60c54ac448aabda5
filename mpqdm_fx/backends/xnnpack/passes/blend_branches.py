"""Write choices between two values as their weighted sum.

Tokens behind the end of a prompt are replaced by a learned one (`torch.where`). ExecuTorch (1.5.1)
has a portable kernel for it only, which parts the program in two.
"""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.passes.base import GraphPass

__all__ = ["BlendBranches"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class BlendBranches(GraphPass):
    """Rewrite `where(c, a, b)` of float32 values as `a * c - b * (c - 1)`.

    With c one or zero this is a or b, if neither is infinite or NaN. Constants and parameters are
    looked at, and such calls left alone; what is computed is taken to be finite.

    Zeros may lose their sign.
    """

    tolerance: ClassVar[float] = 1e-7

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every choice that the rule covers; False if there was none."""
        modified = False
        for node in graph_module.graph.find_nodes(op="call_function", target=_aten.where.self):
            if all(_is_finite(graph_module, branch) for branch in node.args[1:]):
                node.replace_all_uses_with(_blended(graph_module, node))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _is_finite(graph_module: fx.GraphModule, branch: object) -> bool:
    value = branch.meta.get("val") if isinstance(branch, fx.Node) else None
    if not isinstance(branch, fx.Node) or not isinstance(value, Tensor):
        return False
    if value.dtype is not torch.float32:
        return False
    if branch.op == "get_attr":
        return bool(operator.attrgetter(str(branch.target))(graph_module).isfinite().all())
    if branch.target in (_aten.full.default, _aten.scalar_tensor.default):
        return abs(float(branch.args[-1])) < float("inf")  # type: ignore[arg-type]
    return True


def _blended(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    choice, first, second = node.args
    weight = emit(_aten.to.dtype, choice, torch.float32)
    rest = emit(_aten.sub.Tensor, weight, 1.0)
    products = emit(_aten.mul.Tensor, first, weight), emit(_aten.mul.Tensor, second, rest)
    return emit(_aten.sub.Tensor, *products)
