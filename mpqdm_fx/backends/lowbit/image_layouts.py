"""Choose for every value whether its channels lie first or last, so that the fewest bytes move.

Operators bound to their axes say how their inputs and results lie. All others compute in either
layout; each is a choice. A value that somebody reads the other way has to be copied, once for all
such readers. The cheapest choices are a minimum cut between "first" and "last".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from mpqdm_fx.backends.lowbit.axes import moved_axes, to_first, to_last
from mpqdm_fx.backends.lowbit.layout_free import (
    FIRST,
    LAST,
    LayoutFree,
    has_layout,
    is_free_turn,
    layout_free,
)
from mpqdm_fx.backends.lowbit.min_cut import SOURCE, TARGET, MinimumCut
from mpqdm_fx.graph.nodes import sizes

__all__ = ["ImageLayouts"]


@dataclass(frozen=True, kw_only=True)
class ImageLayouts:
    """What lies how in a graph, and how it would lie best.

    Attributes:
        labels: Of every value with a layout: where its channels are as the graph writes it.
        free: Calls that can be turned.
        moves: Permutations between the two layouts, with the value that each is a copy of.
        copies: Bytes of each of these permutations that copies an image: something that is, was
            or becomes a value [B, C, H, W] or [B, H, W, C].
        best: The label in which each call of `free` computes, for least cost.
        bytes_now: What the permutations of the graph copy.
        bytes_best: What they would.
    """

    labels: Mapping[fx.Node, int]
    free: Mapping[fx.Node, LayoutFree]
    moves: Mapping[fx.Node, fx.Node]
    copies: Mapping[fx.Node, int]
    best: Mapping[fx.Node, int]
    bytes_now: int
    bytes_best: int

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> "ImageLayouts":
        """Read a graph and choose."""
        labelled = _Labels(graph_module)
        labels, free, moves = labelled.labels(), labelled.free, labelled.moves
        values = _values(graph_module, labels, free, moves)
        best = _cheapest(values, free)
        sizes_of_moves = {node: _bytes(node, labels[node]) for node in moves}
        return cls(
            labels=labels,
            free=free,
            moves=moves,
            best=best,
            copies={n: size for n, size in sizes_of_moves.items() if size and labelled.known(n)},
            bytes_now=sum(sizes_of_moves.values()),
            bytes_best=sum(value.cost(best) for value in values),
        )


class _Labels:
    """Labels that agree: equal across calls that can be turned, opposite across permutations.

    A forest of values (union-find): each knows its parent, and whether its label is the other one.
    A call at which labels would disagree is taken as bound to its axes.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.free: dict[fx.Node, LayoutFree] = {}
        self.moves: dict[fx.Node, fx.Node] = {}
        self._nodes = [node for node in graph_module.graph.nodes if has_layout(node)]
        self._parents: dict[fx.Node, tuple[fx.Node, int]] = {
            node: (node, 0) for node in self._nodes
        }
        self._given: dict[fx.Node, int] = {}  # label of a root
        for node in self._nodes:
            self._read(graph_module, node)

    def labels(self) -> dict[fx.Node, int]:
        """The label of every value; those that nothing tells are taken to be first."""
        result = {}
        for node in self._nodes:
            root, other = self._root(node)
            result[node] = self._given.get(root, FIRST) ^ other
        return result

    def known(self, node: fx.Node) -> bool:
        """Whether something tells the label of a value."""
        return self._root(node)[0] in self._given

    def _read(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        order = moved_axes(node)
        if order is not None:
            self._read_move(node, order)
            return
        call = layout_free(graph_module, node)
        if call is None:
            return
        agree = all(self._join(node, link, 0) for link in call.links)
        if agree and len(call.labels) == 1:
            agree = self._give(node, min(call.labels))
        if agree:
            self.free[node] = call

    def _read_move(self, node: fx.Node, order: list[int]) -> None:
        source, rank = node.args[0], len(order)
        assert isinstance(source, fx.Node)
        labels = [  # of the source
            label
            for label, turned in ((FIRST, to_last(rank)), (LAST, to_first(rank)))
            if order == turned
        ]
        if not labels or not self._join(node, source, 1):
            return
        if len(labels) == 1 and not self._give(source, labels[0]):
            return
        self.moves[node] = source

    def _root(self, node: fx.Node) -> tuple[fx.Node, int]:
        """Root of a value, and whether their labels are opposite."""
        parent, other = self._parents[node]
        if parent is node:
            return node, 0
        root, above = self._root(parent)
        self._parents[node] = (root, other ^ above)
        return self._parents[node]

    def _join(self, a: fx.Node, b: fx.Node, other: int) -> bool:
        """Make two labels equal, or opposite; False if they are the contrary already."""
        (root_a, other_a), (root_b, other_b) = self._root(a), self._root(b)
        differ = other_a ^ other_b ^ other
        if root_a is root_b:
            return differ == 0
        given_a, given_b = self._given.get(root_a), self._given.get(root_b)
        if given_a is not None and given_b is not None and given_a ^ given_b != differ:
            return False
        self._parents[root_a] = (root_b, differ)
        if given_a is not None:
            self._given[root_b] = given_a ^ differ
        return True

    def _give(self, node: fx.Node, label: int) -> bool:
        """Give a value its label; False if it has the other one."""
        root, other = self._root(node)
        return self._given.setdefault(root, label ^ other) == label ^ other


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A value in whatever layouts it is needed.

    Attributes:
        bytes: What a copy of it takes.
        writer: The call that gives it, if that can be turned; else the label that it gives.
        readers: Likewise of what reads it.
    """

    bytes: int
    writer: fx.Node | int
    readers: tuple[fx.Node | int, ...]

    def cost(self, chosen: Mapping[fx.Node, int]) -> int:
        """Bytes that are copied."""

        def label(end: fx.Node | int) -> int:
            return chosen[end] if isinstance(end, fx.Node) else end

        return self.bytes * any(label(r) != label(self.writer) for r in self.readers)


def _values(
    graph_module: fx.GraphModule,
    labels: Mapping[fx.Node, int],
    free: Mapping[fx.Node, LayoutFree],
    moves: Mapping[fx.Node, fx.Node],
) -> list[_Value]:
    readers: dict[fx.Node, dict[fx.Node | int, None]] = {}
    for node in graph_module.graph.nodes:
        if node in moves:
            continue
        for source in node.all_input_nodes:
            if source not in labels:
                continue
            linked = node in free and source in free[node].links
            reader = node if linked else labels[source]
            readers.setdefault(_written(source, moves), {})[reader] = None
    return [
        _Value(
            bytes=_bytes(node, labels[node]),
            writer=node if node in free else labels[node],
            readers=tuple(found),
        )
        for node, found in readers.items()
    ]


def _written(node: fx.Node, moves: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The value that permutations made a copy of."""
    while node in moves:
        node = moves[node]
    return node


def _bytes(node: fx.Node, label: int) -> int:
    value = node.meta["val"]
    size: int = math.prod(sizes(node)) * value.element_size()
    return 0 if is_free_turn(node, label) else size


def _cheapest(values: list[_Value], free: Mapping[fx.Node, LayoutFree]) -> dict[fx.Node, int]:
    """Labels of the calls; of equal costs, as many as can be are last."""
    cut = MinimumCut()
    ends = {FIRST: SOURCE, LAST: TARGET}

    def end(of: fx.Node | int) -> fx.Node | str:
        return of if isinstance(of, fx.Node) else ends[of]

    for value in values:
        # A copy is paid once, however many read it: two relays stand for "somebody reads it last"
        # and "somebody reads it first".
        last, first = object(), object()
        writer = end(value.writer)
        cut.add(writer, last, value.bytes)
        cut.add(first, writer, value.bytes)
        for reader in map(end, value.readers):
            cut.add(last, reader, math.inf)
            cut.add(reader, first, math.inf)
    group = cut.solve()
    return {node: FIRST if node in group else LAST for node in free}
