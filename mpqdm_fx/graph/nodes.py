"""What a node says of itself: arguments, rank and sizes of its value."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

__all__ = ["argument", "broadcast_shape", "rank", "replace_by_number", "sizes", "static_shape"]


def argument(node: fx.Node, position: int, name: str, default: object) -> object:
    """Return an argument of a call, wherever it stands."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def rank(node: fx.Node) -> int | None:
    """Number of axes of a node's value; None where it is no tensor, or not known."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def sizes(node: fx.Node) -> list[int]:
    """Static sizes of a node's value, -1 where an axis is dynamic."""
    return [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]


def static_shape(node: object) -> tuple[int, ...] | None:
    """Shape of a node's tensor; None where an axis is dynamic, or there is no node or no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    return tuple(value.shape) if all(isinstance(n, int) for n in value.shape) else None


def broadcast_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The size that values of these static sizes have together; RuntimeError if they do not fit."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def replace_by_number(node: fx.Node, number: bool | float) -> None:
    """Write a number wherever a node stands as an argument; the node has no users then."""
    for user in list(node.users):
        args, kwargs = fx.node.map_arg(
            (user.args, dict(user.kwargs)), lambda n: number if n is node else n
        )
        user.args, user.kwargs = args, kwargs
