"""Count what own operators cost beside their arithmetic: crossings and layout copies."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from mpqdm_fx.backends.lowbit.image_layouts import ImageLayouts
from mpqdm_fx.backends.lowbit.ops import NAMESPACE

__all__ = ["Borders", "count_borders", "layout_copies"]


@dataclass(frozen=True, kw_only=True)
class Borders:
    """Own operators of a partitioned method, and its borders with XNNPACK.

    Attributes:
        own_operators: How often each own operator is called.
        crossings: Values that an own operator writes and a delegate reads, or the other way
            round: each is handed over in memory, which takes under a microsecond.
    """

    own_operators: dict[str, int]
    crossings: int


def layout_copies(graph_module: fx.GraphModule) -> tuple[int, int]:
    """Copies of images between channels first and channels last that a graph makes.

    Args:
        graph_module: Module-level graph.

    Returns:
        Their number, and the bytes that they copy.
    """
    layouts = ImageLayouts.of(graph_module)
    return len(layouts.copies), sum(layouts.copies.values())


def count_borders(graph_module: fx.GraphModule, delegated: Collection[fx.Node] = ()) -> Borders:
    """Count in a graph that ExecuTorch has partitioned, or would.

    Args:
        graph_module: Of an edge program.
        delegated: Nodes that would be in delegates, where none were made of them.
    """

    def side(node: fx.Node) -> str | None:
        return "delegate" if node in delegated else _side(node)

    operators: Counter[str] = Counter()
    crossings = 0
    for node in graph_module.graph.nodes:
        own_side = side(node)
        if own_side == "own":
            operators[_operator(node)] += 1
        crossings += sum(
            any(side(user) not in (None, own_side) for user in _readers(value))
            for value in _results(node)
            if own_side is not None and not _is_item(node)
        )
    return Borders(own_operators=dict(sorted(operators.items())), crossings=crossings)


def _operator(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(target, "_op", target))  # edge operators wrap others


def _side(node: fx.Node) -> str | None:
    """Who runs a node; None for portable kernels and for what does not run."""
    if node.op != "call_function":
        return None
    if getattr(node.target, "__name__", "") == "executorch_call_delegate":
        return "delegate"
    return "own" if _operator(node).startswith(f"{NAMESPACE}.") else None


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _results(node: fx.Node) -> list[fx.Node]:
    """The values that a node gives: itself, or the items of its tuple."""
    return [user for user in node.users if _is_item(user)] or [node]


def _readers(value: fx.Node) -> Iterator[fx.Node]:
    return (user for user in value.users if not _is_item(user))
