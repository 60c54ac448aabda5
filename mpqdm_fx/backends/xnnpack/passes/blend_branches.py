"""Write choices between two values as their weighted sum.

Tokens behind the end of a prompt are replaced by a learned one (`torch.where`). ExecuTorch (1.5.1)
has a portable kernel for it only, which parts the program in two.
"""

import operator
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.moves import MOVES
from mpqdm_fx.passes.base import GraphPass

__all__ = ["BlendBranches"]

_aten = torch.ops.aten
#: Ops whose result is infinite where what they read is.
_CARRIERS = MOVES | {
    _aten._to_copy.default,
    _aten.add.Tensor,
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.expand_as.default,
    _aten.index.Tensor,
    _aten.masked_fill.Scalar,
    _aten.masked_fill.Tensor,
    _aten.mul.Tensor,
    _aten.neg.default,
    _aten.slice_scatter.default,
    _aten.stack.default,
    _aten.sub.Tensor,
    _aten.to.dtype,
    _aten.tril.default,
    _aten.triu.default,
    _aten.unflatten.int,
    _aten.where.self,
}


@dataclass(frozen=True, kw_only=True)
class BlendBranches(GraphPass):
    """Rewrite `where(c, a, b)` of float32 values as `a * c - b * (c - 1)`.

    With c one or zero this is a or b, if neither is infinite or NaN. Constants and parameters are
    looked at, also through what moves, joins, adds and multiplies them, and such calls left alone;
    what else is computed is taken to be finite.

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
    met, stack = set[fx.Node](), [branch]
    while stack:
        node = stack.pop()
        if node.op == "get_attr":
            if not operator.attrgetter(str(node.target))(graph_module).isfinite().all():
                return False
        elif any(isinstance(n, float) and not isfinite(n) for n in _numbers(node)):
            return False
        elif node.target in _CARRIERS and node not in met:
            stack += node.all_input_nodes
        met.add(node)
    return True


def _numbers(node: fx.Node) -> list[object]:
    """Arguments of a call, those in lists among them."""
    return pytree.tree_leaves((node.args, dict(node.kwargs)))


def _blended(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    choice, first, second = node.args
    weight = emit(_aten.to.dtype, choice, torch.float32)
    rest = emit(_aten.sub.Tensor, weight, 1.0)
    products = emit(_aten.mul.Tensor, first, weight), emit(_aten.mul.Tensor, second, rest)
    return emit(_aten.sub.Tensor, *products)
