"""Write repeated values as products with ones that broadcast.

Keys that several heads share, prompts for several frames, rows of a rotary table: ExecuTorch
(1.5.1) copies them on portable kernels (`expand`, `repeat`), which parts the program in two.
XNNPACK repeats nothing, but its products broadcast. Nor is a concatenation of one value with itself
delegated, in which the partitioner counts different parts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import add_tensor, insert_call
from mpqdm_fx.graph.nodes import argument
from mpqdm_fx.passes.base import GraphPass

__all__ = ["MultiplyRepeats"]

_aten = torch.ops.aten
_REPEATS = frozenset(
    {
        _aten.expand.default,
        _aten.expand_as.default,
        _aten.repeat.default,
        _aten.repeat_interleave.self_int,
    }
)


@dataclass(frozen=True, kw_only=True)
class MultiplyRepeats(GraphPass):
    """Rewrite `expand`, `repeat` and `repeat_interleave` of float32 and float64 along static axes.

    Each axis along which numbers repeat is one product: x is viewed as [A, 1, B] and multiplied by
    ones [1, times, 1]. What repeats nothing becomes a view. A concatenation whose parts are all one
    value repeats it.

    Left alone: values with a dynamic or an empty axis. Bit-equal but for the payload of NaN.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rule covers; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if _is_covered(node):
                node.replace_all_uses_with(_multiplied(graph_module, node))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _is_covered(node: fx.Node) -> bool:
    source = _source(node)
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    result = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(result, Tensor) or not result.dim():
        return False
    static = all(isinstance(n, int) and n > 0 for n in (*value.shape, *result.shape))
    return static and value.dtype in (torch.float32, torch.float64)


def _source(node: fx.Node) -> fx.Node | None:
    """What a call repeats; None if it is no such call."""
    if node.op != "call_function" or not node.args:
        return None
    source = node.args[0]
    if node.target is _aten.cat.default and isinstance(source, list | tuple):
        alone = len(source) > 1 and all(part is source[0] for part in source)
        source = source[0] if alone else None
    elif node.target not in _REPEATS:
        return None
    return source if isinstance(source, fx.Node) else None


def _multiplied(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    x = _source(node)
    assert x is not None
    shape, result = list(x.meta["val"].shape), list(node.meta["val"].shape)
    interleaved = node.target is _aten.repeat_interleave.self_int
    if interleaved and argument(node, 2, "dim", None) is None:
        shape = [torch.Size(shape).numel()]
    shape = [1] * (len(result) - len(shape)) + shape
    for axis, (old, new) in enumerate(zip(shape, result, strict=True)):
        if old == new:
            continue
        # every number is repeated, or all of the axis is
        cut = axis + 1 if interleaved else axis
        middle = [torch.Size(shape[:cut]).numel(), 1, torch.Size(shape[cut:]).numel()]
        ones = torch.ones(1, new // old, 1, dtype=x.meta["val"].dtype)
        factor = add_tensor(graph_module, f"{node.name}_ones", ones, anchor=node)
        x = emit(_aten.mul.Tensor, emit(_aten.reshape.default, x, middle), factor)
        shape[axis] = new
    return emit(_aten.reshape.default, x, result)
