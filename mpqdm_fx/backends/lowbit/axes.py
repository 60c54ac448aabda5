"""Axes of values with channels first and channels last."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from mpqdm_fx.graph.editing import infer_val, inherit_meta
from mpqdm_fx.graph.nodes import sizes

__all__ = ["moved_axes", "moves_nothing", "permuted", "to_first", "to_last"]

_aten = torch.ops.aten


def to_last(rank: int) -> list[int]:
    """Permutation that moves axis 1, the channels, behind all others."""
    return [0, *range(2, rank), 1]


def to_first(rank: int) -> list[int]:
    """Permutation that moves the last axis, the channels, behind the batch; undoes `to_last`."""
    return [0, rank - 1, *range(1, rank - 1)]


def moved_axes(node: fx.Node) -> list[int] | None:
    """The permutation that a node is of its first argument; None if it is none."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or node.kwargs:
        return None
    rank = value.dim()
    if node.target is _aten.permute.default:
        return [axis % rank for axis in cast("Sequence[int]", node.args[1])]
    if node.target is _aten.transpose.int:
        order = list(range(rank))
        first, second = (axis % rank for axis in cast("Sequence[int]", node.args[1:3]))
        order[first], order[second] = order[second], order[first]
        return order
    return None


def permuted(
    graph_module: fx.GraphModule, source: fx.Node, order: Sequence[int], *, anchor: fx.Node
) -> fx.Node:
    """Insert a permutation before `anchor`: a view where no number moves in memory.

    Args:
        graph_module: The copy to edit, in place.
        source: A value of known sizes, contiguous; its provenance is taken over.
        order: For each new axis the old one.
        anchor: Node to insert before.
    """
    shape = sizes(source)
    target, argument = _aten.permute.default, list(order)
    if moves_nothing(shape, order):
        target, argument = _aten.reshape.default, [shape[axis] for axis in order]
    with graph_module.graph.inserting_before(anchor):
        node = graph_module.graph.call_function(target, (source, argument))
    inherit_meta(node, source)
    infer_val(graph_module, node)
    return node


def moves_nothing(shape: Sequence[int], order: Sequence[int]) -> bool:
    """Whether a permutation leaves all numbers of a contiguous value in their order."""
    long = [axis for axis in order if shape[axis] != 1]
    return long == sorted(long)
