"""Read a part of a concatenation where it comes from.

In-place code fills a value part by part. Written without it, each part is joined to what is left of
the part before, the first to memory that nobody filled.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument, static_shape
from mpqdm_fx.passes.base import GraphPass

__all__ = ["ForwardSlices"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class ForwardSlices(GraphPass):
    """Replace slices of a concatenation along its axis, within one part or of whole parts.

    They become that part, a slice of it, or the concatenation of those that are taken. Reshapes
    that cancel between the two are passed. Static sizes, parts of one rank and one dtype alone.
    Numbers are only moved: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every such slice, and what shows behind it; False if there was none."""
        modified = False
        # in running order: what a slice gives may be a part of the next concatenation
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function" and node.target is _aten.slice.Tensor:
                while (forwarded := _forwarded(graph_module, node)) is not None:
                    node.replace_all_uses_with(forwarded)
                    graph_module.graph.erase_node(node)
                    modified = True
                    if forwarded.target is not _aten.slice.Tensor:
                        break
                    node = forwarded
        return modified


def _forwarded(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What the slice takes, read from the part that it lies in; None if there is no such part."""
    source, shape = node.args[0], static_shape(node)
    if not isinstance(source, fx.Node) or shape is None or argument(node, 4, "step", 1) != 1:
        return None
    source = _passed(source)
    if source.target is not _aten.cat.default or not shape:
        return None
    axis, along = argument(node, 1, "dim", 0), argument(source, 1, "dim", 0)
    assert isinstance(axis, int)
    assert isinstance(along, int)
    if axis % len(shape) != along % len(shape):
        return None
    parts: Any = source.args[0]
    joined = static_shape(source)
    if joined is None or any(static_shape(part) is None for part in parts):
        return None
    # a concatenation converts its parts to one dtype, and passes over an empty one of one axis
    if len({(part.meta["val"].dtype, part.meta["val"].dim()) for part in parts}) > 1:
        return None
    axis %= len(shape)
    start, _, _ = slice(argument(node, 2, "start", None), None).indices(joined[axis])
    taken, offset = [], 0
    for part in parts:
        size = part.meta["val"].shape[axis]
        if offset <= start and start + shape[axis] <= offset + size:
            if size == shape[axis]:
                return part  # type: ignore[no-any-return]
            args = (part, axis, start - offset, start - offset + shape[axis])
            return insert_call(graph_module, _aten.slice.Tensor, args, anchor=node)
        if start <= offset and offset + size <= start + shape[axis]:
            taken.append(part)
        offset += size
    if sum(part.meta["val"].shape[axis] for part in taken) < shape[axis]:
        return None
    return insert_call(graph_module, _aten.cat.default, (taken, axis), anchor=node)


def _passed(node: fx.Node) -> fx.Node:
    """The value before reshapes that come back to its shape."""
    shape, source = static_shape(node), node
    while source.target is _aten.reshape.default:
        before = source.args[0]
        assert isinstance(before, fx.Node)
        source = before
    return source if shape is not None and static_shape(source) == shape else node
