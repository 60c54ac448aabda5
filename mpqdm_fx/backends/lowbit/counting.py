"""Count what own operators cost beside their arithmetic: crossings and layout copies."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from mpqdm_fx.backends.lowbit.image_layouts import ImageLayouts
from mpqdm_fx.backends.lowbit.layers import LayerChoice
from mpqdm_fx.backends.lowbit.ops import NAMESPACE

__all__ = ["Borders", "OwnWork", "count_borders", "layout_copies", "own_work"]


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


@dataclass(frozen=True, kw_only=True)
class OwnWork:
    """What own kernels do of a program, and what that costs beside their arithmetic.

    Attributes:
        own_layers: Layers that own kernels run.
        left_layers: Reason by name for every other weight layer.
        own_operators: How often each own operator is called.
        crossings: Values handed over between own operators and XNNPACK's delegates.
        layout_copies: Copies of images between channels first and channels last.
        layout_copy_bytes: Bytes that they copy.
    """

    own_layers: tuple[str, ...]
    left_layers: Mapping[str, str]
    own_operators: Mapping[str, int]
    crossings: int
    layout_copies: int
    layout_copy_bytes: int


def own_work(
    choice: LayerChoice, borders: Borders, graph_module: fx.GraphModule | None
) -> dict[str, Any]:
    """The fields of `OwnWork`, for records that have them.

    Args:
        choice: Layers by what runs them.
        borders: Counted in the partitioned graph.
        graph_module: The module-level graph with own operators; None of a float program.
    """
    copies, size = (0, 0) if graph_module is None else layout_copies(graph_module)
    return {
        "own_layers": choice.own,
        "left_layers": choice.left,
        "own_operators": borders.own_operators,
        "crossings": borders.crossings,
        "layout_copies": copies,
        "layout_copy_bytes": size,
    }


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
