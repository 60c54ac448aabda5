"""Write products of matrices as `bmm`, the only product of two computed values that XNNPACK takes.

ExecuTorch (1.5.1) expands both operands of `matmul` on a portable kernel, also where there is
nothing to expand, and XNNPACK's `mm` is a layer: its second operand is a weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import broadcast_shape, sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DecomposeMatmul"]

_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.matmul.default, _aten.mm.default})


@dataclass(frozen=True, kw_only=True)
class DecomposeMatmul(GraphPass):
    """Rewrite `matmul` and `mm` of floating-point values [*, L, D] and [*, D, M].

    1. Leading axes that are the same on both sides become one. Others are expanded to each other.
    2. With a matrix on the right, all rows on the left are one matrix.
    3. A vector is a matrix of one row or column.
    4. A column times a row is a product number by number, also where one of them is a constant.
    5. Left alone: other products with parameters and buffers, which layers multiply by; expansions
       and other axes of dynamic size, but for one that both sides lead with; empty values.
    """

    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every product that the rules cover; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if _is_outer(node):
                product = insert_call(graph_module, _aten.mul.Tensor, node.args, anchor=node)
            elif _is_covered(node):
                product = _batched(graph_module, node)
            else:
                continue
            node.replace_all_uses_with(product)
            graph_module.graph.erase_node(node)
            modified = True
        return modified


def _is_outer(node: fx.Node) -> bool:
    """Whether a node multiplies columns with rows: nothing is summed."""
    if node.op != "call_function" or node.target not in _PRODUCTS or len(node.args) != 2:
        return False
    left, right = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in node.args)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    if min(left.dim(), right.dim()) < 2:
        return False
    return left.is_floating_point() and left.dtype == right.dtype and left.shape[-1] == 1


def _is_covered(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _PRODUCTS:
        return False
    sources = [n for n in node.args[:2] if isinstance(n, fx.Node) and n.op != "get_attr"]
    values = [source.meta.get("val") for source in sources]
    if len(sources) < 2 or not all(isinstance(v, Tensor) for v in values):
        return False
    result = node.meta.get("val")
    if not isinstance(result, Tensor) or not result.is_floating_point() or not result.dim():
        return False
    left, right = (sizes(source) for source in sources)
    if 0 in left or 0 in right:
        return False
    if -1 not in left and -1 not in right:
        return True
    same = len(left) == len(right) > 2 and left[:-2] == right[:-2]
    return same and left[:-2].count(-1) == 1 and -1 not in (*left[-2:], *right[-2:])


def _batched(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    def viewed(x: fx.Node, shape: list[int]) -> fx.Node:
        return x if sizes(x) == shape else emit(_aten.reshape.default, x, shape)

    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if len(sizes(left)) == 1:
        left = viewed(left, [1, *sizes(left)])
    if len(sizes(right)) == 1:
        right = viewed(right, [*sizes(right), 1])
    rows, columns = sizes(left)[-2:], sizes(right)[-2:]
    if all(n == 1 for n in sizes(right)[:-2]):
        left, right = viewed(left, [1, -1, rows[1]]), viewed(right, [1, *columns])
    else:
        if sizes(left)[:-2] != sizes(right)[:-2]:
            leading = broadcast_shape([sizes(left)[:-2], sizes(right)[:-2]])
            left, right = (
                x if tuple(sizes(x)[:-2]) == leading else emit(_aten.expand.default, x, shape)
                for x, shape in ((left, [*leading, *rows]), (right, [*leading, *columns]))
            )
        left, right = viewed(left, [-1, *rows]), viewed(right, [-1, *columns])
    return viewed(emit(_aten.bmm.default, left, right), sizes(node))
