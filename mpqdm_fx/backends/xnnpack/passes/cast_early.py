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
from mpqdm_fx.graph.moves import MOVES
from mpqdm_fx.passes.base import GraphPass

__all__ = ["CastEarly"]

_aten = torch.ops.aten
_OTHER_CASTS = frozenset(
    {_aten.to.dtype_layout, _aten.to.other, _aten.type_as.default, _aten._to_copy.default}
)


@dataclass(frozen=True, kw_only=True)
class CastEarly(GraphPass):
    """Rewrite `cast(move(x))` as `move(cast(x))`.

    1. A cast is `aten.to.dtype` to float32 from another real dtype, without other settings. Other
       casts of a tensor to float32 become such.
    2. A move is an op that rearranges, repeats, joins or picks numbers, and whose users are all
       this cast. What it joins has one dtype.
    3. A chain of moves is passed one after the other.
    4. A cast of float32 numbers that were cast to float64 is left out.

    The same numbers are cast: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Move every cast as far up as it goes; False if none moved."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target in _OTHER_CASTS and _is_between_reals(node):
                args = (node.args[0], torch.float32)
                cast = insert_call(graph_module, _aten.to.dtype, args, anchor=node)
                node.replace_all_uses_with(cast)
                graph_module.graph.erase_node(node)
                modified = True
        queue = [n for n in graph_module.graph.nodes if n.target is _aten.to.dtype]
        while queue:
            cast = queue.pop(0)
            move = _movable(cast)
            if move is not None:
                queue = [c for c in queue if c not in move.users] + _swap(graph_module, move)
                modified = True
        return _drop_detours(graph_module) or modified


def _is_between_reals(node: fx.Node) -> bool:
    source, value = node.args[0], node.meta.get("val")
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(before, Tensor) or not isinstance(value, Tensor):
        return False
    return value.dtype is torch.float32 and not before.is_complex()


def _drop_detours(graph_module: fx.GraphModule) -> bool:
    modified = False
    for node in [n for n in graph_module.graph.nodes if _is_cast(n)]:
        wide = node.args[0]
        plain = isinstance(wide, fx.Node) and wide.target is _aten.to.dtype and not wide.kwargs
        if not plain or wide.args[1] is not torch.float64 or len(wide.args) > 2:
            continue
        source = wide.args[0]
        if isinstance(source, fx.Node) and _dtype(source) is torch.float32:
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
            modified = True
    return modified


def _movable(cast: fx.Node) -> fx.Node | None:
    """The move that a cast can pass, or None."""
    move = cast.args[0] if _is_cast(cast) else None
    if not isinstance(move, fx.Node) or move.target not in MOVES:
        return None
    dtype = _dtype(move)
    if dtype is None or dtype.is_complex or dtype is torch.float32:
        return None
    alike = all(_dtype(source) is dtype for source in _sources(move))
    return move if alike and all(_is_cast(user) for user in move.users) else None


def _is_cast(node: fx.Node) -> bool:
    plain = node.target is _aten.to.dtype and len(node.args) == 2 and not node.kwargs
    return plain and node.args[1] is torch.float32


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _sources(move: fx.Node) -> list[fx.Node]:
    first = move.args[0]
    listed: Any = first if isinstance(first, list | tuple) else [first]
    return [node for node in listed if isinstance(node, fx.Node)]


def _swap(graph_module: fx.GraphModule, move: fx.Node) -> list[fx.Node]:
    """Return the new casts."""
    casts = [
        insert_call(graph_module, _aten.to.dtype, (source, torch.float32), anchor=move)
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
