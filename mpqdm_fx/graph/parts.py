"""Runs of neighbouring nodes, and what crosses from one to the next."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

__all__ = ["GraphPart"]


@dataclass(frozen=True, kw_only=True)
class GraphPart:
    """Neighbouring nodes.

    Attributes:
        nodes: In running order.
        reads: Earlier values that they read.
        gives: Their values that later nodes read, or the graph returns.
    """

    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]

    @classmethod
    def of(cls, nodes: Sequence[fx.Node]) -> "GraphPart":
        """The part that these nodes are."""
        inner = set(nodes)
        reads = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inner)
        gives = (node for node in nodes if any(user not in inner for user in node.users))
        return cls(nodes=tuple(nodes), reads=tuple(reads), gives=tuple(gives))
