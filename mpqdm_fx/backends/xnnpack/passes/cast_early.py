"""Cast integers to floats before their axes are moved, not after.

Phone backends compute in floats. A timestep that comes as an integer is reshaped on portable
kernels until it is cast; cast first, all that follows is delegated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.passes.base import GraphPass

__all__ = ["CastEarly"]

_aten = torch.ops.aten
#: Ops that move numbers about without looking at them.
_MOVES = frozenset(
    {
        _aten.expand.default,
        _aten.flatten.using_ints,
        _aten.permute.default,
        _aten.reshape.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.squeeze.dim,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)


@dataclass(frozen=True, kw_only=True)
class CastEarly(GraphPass):
    """Rewrite `cast(move(x))` as `move(cast(x))`.

    1. A cast is `aten.to.dtype` from an integer or boolean dtype to float32, without other
       settings.
    2. A move is an op that rearranges, repeats or picks numbers, whose only user is the cast.
    3. A chain of moves is passed one after the other.

    The same numbers are cast: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Move every cast as far up as it goes; False if none moved."""
        modified = False
        for node in list(graph_module.graph.nodes):
            cast = node
            while (move := _movable(cast)) is not None:
                cast = _swap(graph_module, cast, move)
                modified = True
        return modified


def _movable(cast: fx.Node) -> fx.Node | None:
    """The move that a cast can pass, or None."""
    if cast.target is not _aten.to.dtype or len(cast.args) != 2 or cast.kwargs:
        return None
    move = cast.args[0]
    if cast.args[1] is not torch.float32 or not isinstance(move, fx.Node):
        return None
    value = move.meta.get("val")
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return None
    if move.target not in _MOVES or list(move.users) != [cast]:
        return None
    source = move.args[0]
    return move if isinstance(source, fx.Node) and "val" in source.meta else None


def _swap(graph_module: fx.GraphModule, cast: fx.Node, move: fx.Node) -> fx.Node:
    """Return the new cast."""
    args = (move.args[0], torch.float32)
    early = insert_call(graph_module, _aten.to.dtype, args, anchor=move)
    target = move.target
    assert callable(target)
    arguments = (early, *move.args[1:])
    moved = insert_call(graph_module, target, arguments, dict(move.kwargs), anchor=cast)
    cast.replace_all_uses_with(moved)
    for node in (cast, move):
        graph_module.graph.erase_node(node)
    return early
