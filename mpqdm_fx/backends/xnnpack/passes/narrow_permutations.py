"""Write permutations of more than six axes with fewer: XNNPACK has no values of more.

Video transformers put patches together by permutations of seven or eight axes. ExecuTorch (1.5.1)
delegates them, and its runtime then refuses the program with error 0x1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["NarrowPermutations"]

_aten = torch.ops.aten
_MOST = 6  # axes of a value of XNNPACK


@dataclass(frozen=True, kw_only=True)
class NarrowPermutations(GraphPass):
    """Rewrite `permute` and `transpose` of more than six static axes.

    1. Axes of size one are left out, and axes that stay side by side are one.
    2. If still more than six are left, runs of axes change places one after the other.
    3. The result is viewed as the size that the op gives; that view, and one before, go when
       `MergeReshapes` runs.

    Numbers are only moved: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every such permutation; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            order = _order(node)
            if order is not None:
                node.replace_all_uses_with(_narrowed(graph_module, node, order))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _order(node: fx.Node) -> list[int] | None:
    """Which axis of the input each axis of the result is; None if the rules do not cover it."""
    if node.op != "call_function" or node.kwargs:
        return None
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() <= _MOST or -1 in sizes(node):
        return None
    axes = list(range(value.dim()))
    if node.target is _aten.permute.default:
        order = node.args[1]
        assert isinstance(order, list | tuple)
        return [axes[axis] for axis in order]  # type: ignore[index]
    if node.target is _aten.transpose.int:
        first, second = node.args[1:]
        axes[first], axes[second] = axes[second], axes[first]  # type: ignore[index]
        return axes
    return None


def _narrowed(graph_module: fx.GraphModule, node: fx.Node, order: list[int]) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    x = node.args[0]
    assert isinstance(x, fx.Node)
    shape = sizes(x)
    runs = _runs([axis for axis in order if shape[axis] != 1], shape)
    lengths = {run[0]: torch.Size([shape[axis] for axis in run]).numel() for run in runs}
    source, target = sorted(lengths), [run[0] for run in runs]
    steps = [(source, target)] if len(source) <= _MOST else list(_exchanges(source, target))
    for before, after in steps:
        groups = _runs_between(before, after)
        view = [torch.Size([lengths[axis] for axis in group]).numel() for group in groups]
        x = emit(_aten.reshape.default, x, view)
        places = sorted(range(len(groups)), key=lambda i: after.index(groups[i][0]))
        if places != sorted(places):
            x = emit(_aten.permute.default, x, places)
    return emit(_aten.reshape.default, x, sizes(node))


def _runs(order: list[int], shape: list[int]) -> list[list[int]]:
    """Axes in their new order, those together that follow one another before and after."""
    runs: list[list[int]] = []
    for axis in order:
        between = shape[runs[-1][-1] + 1 : axis] if runs else []
        if runs and axis > runs[-1][-1] and all(size == 1 for size in between):
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs


def _exchanges(source: list[int], target: list[int]) -> list[tuple[list[int], list[int]]]:
    """Steps from one order to another, of which each moves one axis to its place."""
    steps = []
    current = source
    for place, axis in enumerate(target):
        if current[place] != axis:
            rest = [other for other in current[place:] if other != axis]
            moved = [*current[:place], axis, *rest]
            steps.append((current, moved))
            current = moved
    return steps


def _runs_between(before: list[int], after: list[int]) -> list[list[int]]:
    """The old order, cut where two neighbours part."""
    groups: list[list[int]] = []
    for axis in before:
        if groups and after.index(axis) == after.index(groups[-1][-1]) + 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups
