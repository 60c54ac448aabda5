"""Write means over any axes as means over the last two of four, the only ones that XNNPACK takes.

Norms that a model writes itself are made of such means: RMS norms of tokens (`x.pow(2).mean(-1)`),
norms over the channels of images (`x.mean(1)`). ExecuTorch (1.5.1) leaves them on a portable
kernel, which cuts the program in two at every norm.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument, sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["ViewMeans"]

_aten = torch.ops.aten
_TAKEN = (2, 3)


@dataclass(frozen=True, kw_only=True)
class ViewMeans(GraphPass):
    """Rewrite every `mean.dim` of float32 or float64.

    1. The axes that are averaged move behind the others, if they are not there.
    2. The value is viewed as [N, L, M, 1], with M their numbers; its mean over the last two axes is
       viewed as the size that the op gives.
    3. Left alone: means over the last two of four axes that keep them, over a dynamic axis, or with
       more than one dynamic axis beside, of empty values and of numbers, and with a dtype of their
       own.

    The same sums in another order.
    """

    tolerance: ClassVar[float] = 1e-6

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every mean that the rules cover; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            axes = _averaged(node)
            if axes:
                node.replace_all_uses_with(_viewed(graph_module, node, axes))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _averaged(node: fx.Node) -> tuple[int, ...]:
    """Axes that a mean runs over, ascending; none if the rules do not cover the node."""
    source = node.args[0] if node.target is _aten.mean.dim else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or not isinstance(value, Tensor) or not value.dim():
        return ()
    if value.dtype not in (torch.float32, torch.float64) or argument(node, 3, "dtype", None):
        return ()
    given = argument(node, 1, "dim", None)
    axes = tuple(sorted({axis % value.dim() for axis in given})) if given else ()  # type: ignore[attr-defined]
    keeps = bool(argument(node, 2, "keepdim", False))
    if value.dim() == 4 and axes == _TAKEN and keeps:
        return ()
    shape = sizes(source)
    kept = [size for axis, size in enumerate(shape) if axis not in axes]
    covered = 0 not in shape and kept.count(-1) <= 1 and kept.count(-1) == shape.count(-1)
    return axes if covered else ()


def _viewed(graph_module: fx.GraphModule, node: fx.Node, axes: tuple[int, ...]) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    x = node.args[0]
    assert isinstance(x, fx.Node)
    shape = sizes(x)
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    order = [*kept, *axes]
    if order != sorted(order):
        x = emit(_aten.permute.default, x, order)
    first, *rest = [shape[axis] for axis in kept] or [1]
    middle = -1 if -1 in rest else torch.Size(rest).numel()
    numbers = torch.Size([shape[axis] for axis in axes]).numel()
    tokens = emit(_aten.reshape.default, x, [first, middle, numbers, 1])
    mean = emit(_aten.mean.dim, tokens, list(_TAKEN), True)
    return emit(_aten.reshape.default, mean, sizes(node))
