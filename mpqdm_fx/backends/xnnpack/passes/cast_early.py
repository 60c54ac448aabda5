"""Cast to float32 before axes are moved, not after.

Phone backends compute in float32. A timestep that comes as an integer, or a rotary table that is
made in float64, is reshaped on portable kernels until it is cast; cast first, all that follows is
delegated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.passes.base import GraphPass

__all__ = ["CastEarly"]

_aten = torch.ops.aten
#: Ops that move numbers about without looking at them.
_MOVES = frozenset(
    {
        _aten.cat.default,
        _aten.expand.default,
        _aten.flatten.using_ints,
        _aten.permute.default,
        _aten.repeat.default,
        _aten.repeat_interleave.self_int,
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

    1. A cast is `aten.to.dtype` to float32 from another real dtype, without other settings; or to
       float64 from float32, where nothing but moves stands between it and inputs of the graph.
       These, too, then stand in front of all that is delegated, not in its middle.
    2. A move is an op that rearranges, repeats, joins or picks numbers, and whose users are all
       this cast. What it joins has one dtype.
    3. A chain of moves is passed one after the other.

    The same numbers are cast: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Move every cast as far up as it goes; False if none moved."""
        modified = False
        queue = [n for n in graph_module.graph.nodes if n.target is _aten.to.dtype]
        while queue:
            cast = queue.pop(0)
            move = _movable(cast)
            if move is not None:
                queue = [c for c in queue if c not in move.users] + _swap(graph_module, cast, move)
                modified = True
        return modified


def _movable(cast: fx.Node) -> fx.Node | None:
    """The move that a cast can pass, or None."""
    dtype = _dtype_of_cast(cast)
    move = cast.args[0] if dtype is not None else None
    if not isinstance(move, fx.Node) or move.target not in _MOVES:
        return None
    if any(_dtype_of_cast(user) is not dtype for user in move.users):
        return None
    source = _dtype(move)
    if source is None or source.is_complex or any(_dtype(n) != source for n in _sources(move)):
        return None
    if dtype is torch.float64:
        passes = source is torch.float32 and _moves_inputs(move)
    else:
        passes = source is not torch.float32
    return move if passes else None


def _dtype_of_cast(node: fx.Node) -> torch.dtype | None:
    """What a plain cast casts to; None for any other node."""
    if node.target is not _aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return None
    dtype = node.args[1]
    return dtype if dtype in (torch.float32, torch.float64) else None  # type: ignore[return-value]


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _sources(move: fx.Node) -> list[fx.Node]:
    first = move.args[0]
    listed: Any = first if isinstance(first, list | tuple) else [first]
    return [node for node in listed if isinstance(node, fx.Node)]


def _moves_inputs(node: fx.Node) -> bool:
    if node.target in _MOVES:
        return all(_moves_inputs(source) for source in _sources(node))
    return node.op == "placeholder"


def _swap(graph_module: fx.GraphModule, cast: fx.Node, move: fx.Node) -> list[fx.Node]:
    """Return the new casts."""
    dtype = cast.args[1]
    casts = [
        insert_call(graph_module, _aten.to.dtype, (source, dtype), anchor=move)
        for source in _sources(move)
    ]
    target = move.target
    assert callable(target)
    joined = isinstance(move.args[0], list | tuple)
    arguments = (casts if joined else casts[0], *move.args[1:])
    moved = insert_call(graph_module, target, arguments, dict(move.kwargs), anchor=move)
    for user in list(move.users):
        user.replace_all_uses_with(moved)
        graph_module.graph.erase_node(user)
    graph_module.graph.erase_node(move)
    return casts
