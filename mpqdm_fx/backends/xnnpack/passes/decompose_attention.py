"""Write scaled dot-product attention out as two batched products and a softmax.

The fused op lowers to a safe softmax (eq, logical_not, any, where, full_like), none of which phone
backends delegate: one fused node costs a dozen fragments of the program. The plain form is all
delegated.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument, sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DecomposeAttention"]

_aten = torch.ops.aten
_SDPA = _aten.scaled_dot_product_attention.default


@dataclass(frozen=True, kw_only=True)
class DecomposeAttention(GraphPass):
    """Rewrite `softmax(q @ k.T * scale + mask) @ v` in plain ops.

    1. query [*, L, D], key [*, S, D] and value [*, S, Dv] are viewed as three-axis tensors, so
       that the products are single `bmm` nodes; the result gets its axes back.
    2. A boolean mask becomes the addition of 0 or of half of the smallest number that the scores'
       dtype has. A row that is masked out entirely gives the mean of the values (in float16 a
       weighted one), where the fused op gives zeros.
    3. Queries are taken in runs, so that no more than `most_scores` numbers of scores are there at
       once (at 4,096 tokens and 8 heads all of them take 512 MiB); the runs are joined.
    4. Without keys the result is zeros, as that of the fused op.
    5. Calls with dropout, `is_causal`, grouped queries, or leading axes that broadcast or of which
       more than one is dynamic are left alone.
    """

    most_scores: int = 1 << 24  # 64 MiB; runs of 1 << 20 are a fifth slower
    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rules cover; False if there was none."""
        modified = False
        for node in graph_module.graph.find_nodes(op="call_function", target=_SDPA):
            if _is_plain(node):
                result = _plain(graph_module, node, self.most_scores)
                node.replace_all_uses_with(result)
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _is_plain(node: fx.Node) -> bool:
    inputs = [node.args[i] for i in range(3)]
    if not all(isinstance(n, fx.Node) and "val" in n.meta for n in inputs):
        return False
    special = (
        argument(node, 4, "dropout_p", 0.0),
        argument(node, 5, "is_causal", False),
        node.kwargs.get("enable_gqa", False),
    )
    shapes = [sizes(n) for n in inputs if isinstance(n, fx.Node)]
    leading = {tuple(shape[:-2]) for shape in shapes}
    last = [size for shape in shapes for size in shape[-2:]]
    return (
        not any(special)
        and len(leading) == 1
        and len(shapes[0]) >= 3
        and leading.pop().count(-1) <= 1
        and -1 not in last
    )


def _plain(graph_module: fx.GraphModule, node: fx.Node, most_scores: int) -> fx.Node:
    def call(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    query, key, value = (n for n in node.args[:3] if isinstance(n, fx.Node))
    shape = sizes(query)
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = 1.0 / math.sqrt(shape[-1])
    if not sizes(key)[-2]:
        return _zeros(graph_module, node, sizes(value)[-1])
    flat = [call(_aten.reshape.default, n, [-1, *sizes(n)[-2:]]) for n in (query, key, value)]
    keys = call(_aten.transpose.int, flat[1], 1, 2)
    # the scale goes to the queries: L * D numbers instead of L * S
    queries = call(_aten.mul.Tensor, flat[0], scale)
    mask = argument(node, 3, "attn_mask", None)
    added = _additive(graph_module, mask, node) if isinstance(mask, fx.Node) else None
    results = []
    for run in _runs(shape[:-1], sizes(key)[-2], most_scores):
        part, part_added = queries, added
        if len(run) < shape[-2]:
            part = call(_aten.slice.Tensor, queries, 1, run.start, run.stop)
            if added is not None and sizes(added)[-2:-1] == [shape[-2]]:
                part_added = call(_aten.slice.Tensor, added, -2, run.start, run.stop)
        scores = call(_aten.bmm.default, part, keys)
        if part_added is not None:
            masked = [*shape[:-2], len(run), sizes(key)[-2]]
            scores = call(_aten.reshape.default, scores, masked)
            scores = call(_aten.add.Tensor, scores, part_added)
            scores = call(_aten.reshape.default, scores, [-1, *masked[-2:]])
        weights = call(_aten.softmax.int, scores, -1)
        results.append(call(_aten.bmm.default, weights, flat[2]))
    result = results[0] if len(results) == 1 else call(_aten.cat.default, results, 1)
    return call(_aten.reshape.default, result, [*shape[:-1], sizes(value)[-1]])


def _zeros(graph_module: fx.GraphModule, node: fx.Node, width: int) -> fx.Node:
    """Zeros in the shape of the result; the query may have other widths, and a dynamic axis."""
    args: tuple[object, ...] = (node.args[0], -1, 0, 1)
    column = insert_call(graph_module, _aten.slice.Tensor, args, anchor=node)
    zero = insert_call(graph_module, _aten.zeros_like.default, (column,), anchor=node)
    repeats = [*[1] * (node.meta["val"].dim() - 1), width]
    return insert_call(graph_module, _aten.repeat.default, (zero, repeats), anchor=node)


def _runs(queries: list[int], keys: int, most_scores: int) -> list[range]:
    """Runs of about equally many queries [*, L], of which each has at most so many scores.

    A dynamic axis counts as one. A run has at least one query.
    """
    *leading, length = queries
    together = math.prod(abs(size) for size in leading) * keys  # dynamic: -1
    longest = max(1, most_scores // together)
    step = math.ceil(length / math.ceil(length / longest))
    return [range(start, min(start + step, length)) for start in range(0, length, step)]


def _additive(graph_module: fx.GraphModule, mask: fx.Node, anchor: fx.Node) -> fx.Node:
    """What a mask adds to the scores."""
    if mask.meta["val"].dtype != torch.bool:
        return mask
    dtype = anchor.meta["val"].dtype
    lowest = torch.finfo(dtype).min / 2  # a score is added; float16 has no room below its smallest
    indicator = insert_call(graph_module, _aten.to.dtype, (mask, dtype), anchor=anchor)
    removed = insert_call(graph_module, _aten.sub.Tensor, (indicator, 1.0), anchor=anchor)
    return insert_call(graph_module, _aten.mul.Tensor, (removed, -lowest), anchor=anchor)
