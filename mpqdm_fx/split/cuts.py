"""Where to cut a graph, so that values which depend on few of its inputs are computed elsewhere.

Inputs come in groups. A node *belongs* to a group if its value depends on that group's inputs and
on constants alone; symbolic sizes count as known wherever an input of the group has them. What
belongs to no group is the *rest*. A *cut* is a group's value that the rest reads.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mpqdm_fx.graph.lanes import is_quantizer
from mpqdm_fx.graph.layers import WEIGHT_LAYERS, called_module
from mpqdm_fx.graph.qdq import is_quantize
from mpqdm_fx.graph.quantizers import DynamicQuantizer
from mpqdm_fx.run.cost import Sizes, value_bytes

__all__ = ["Cuts", "Leaf", "find_cuts", "input_leaves", "is_size", "is_view", "known_size"]

_SYM_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """How a graph falls apart.

    The following conditions hold: every node of `groups[g]` or `rest` has its inputs in the same
    set, but for cuts that the rest reads and for sizes that are read off another input; a constant
    may be in several sets; `cuts[g]` is within `groups[g]`.

    Attributes:
        cuts: By group, the values that the rest takes, in graph order. Groups without any are
            left out.
        groups: By group, the nodes that compute them.
        rest: All other nodes that are needed, the output included.
    """

    cuts: Mapping[str, tuple[fx.Node, ...]]
    groups: Mapping[str, frozenset[fx.Node]]
    rest: frozenset[fx.Node]


def find_cuts(
    graph_module: fx.GraphModule,
    group_of: Mapping[str, str],
    *,
    passable: Callable[[fx.Node], bool],
    pays: Callable[[fx.Node], bool] | None = None,
    sizes: Sizes | None = None,
) -> Cuts:
    """Choose the cuts.

    1. A value is passed if something was computed for it: not a bare view, cast or entry of an
       input (or what `pays` says).
    2. A quantizer stays with the layer that owns it: that which wrote the value, for the pair
       behind a layer's output; else that which reads it. So no cut runs through a q/dq pair, nor
       between a dynamic quantizer and its reader.
    3. Of several views of one value, those that together hold more bytes than the value are
       replaced by it (an expanded mask, keys that are read in two layouts).

    Args:
        graph_module: A module-level graph with values in its nodes' meta; it is not changed.
        group_of: Group by placeholder; a placeholder without entry is the rest's.
        passable: Whether a value may become an input of the rest at all.
        pays: Instead of rule 1, whether a value of a group should be passed.
        sizes: Numbers for symbolic sizes; for rule 3.
    """
    finder = _Finder(graph_module, group_of, passable, pays)
    blocked: set[fx.Node] = set()
    while True:
        rest, cuts = finder.walk(blocked)
        dearer = finder.dearer_than_their_source(cuts, sizes)
        if not dearer:
            break
        blocked |= dearer
    by_group: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node in cuts:
            by_group.setdefault(finder.owner[node] or "", []).append(node)
    ordered = {
        name: by_group[name] for name in dict.fromkeys(group_of.values()) if name in by_group
    }
    return Cuts(
        cuts={name: tuple(nodes) for name, nodes in ordered.items()},
        groups={name: finder.closure(name, nodes) for name, nodes in ordered.items()},
        rest=frozenset(rest),
    )


class _Finder:
    """What does not change while cuts are tried: owners, and where a cut is allowed."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        group_of: Mapping[str, str],
        passable: Callable[[fx.Node], bool],
        pays: Callable[[fx.Node], bool] | None,
    ) -> None:
        self.graph_module = graph_module
        self.names = frozenset(group_of.values())
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        self.leaves: dict[str | None, list[Leaf]] = {
            name: list(input_leaves(p for p in placeholders if group_of.get(p.target) == name))
            for name in (None, *self.names)
        }
        self.owner = self._owners(group_of)
        computed = pays or self._computed().__contains__
        readers_own = self._read_quantizers()
        self.allowed = {
            node
            for node, owner in self.owner.items()
            if owner is not None
            and node not in readers_own
            and not is_quantize(node)
            and computed(node)
            and passable(node)
        }

    def _owners(self, group_of: Mapping[str, str]) -> dict[fx.Node, str | None]:
        """Group that each node belongs to; None for the rest and for what depends on no input."""
        homes: dict[fx.Node, frozenset[str]] = {}  # where a value can be computed
        owner: dict[fx.Node, str | None] = {}
        for node in self.graph_module.graph.nodes:
            inputs = node.all_input_nodes
            owner[node] = None
            homes[node] = self.names.intersection(*(homes[i] for i in inputs))
            if node.op == "placeholder":
                owner[node] = group_of.get(node.target)
                homes[node] = self.names & {owner[node]}
            elif node.target is _SYM_SIZE:
                homes[node] |= {g for g in self.names if self._knows(g, node)}
            elif not is_size(node) and node.op != "output":
                owners = {owner[i] for i in inputs} & homes[node]
                owner[node] = next(iter(owners)) if len(owners) == 1 else None
        return owner

    def _knows(self, name: str, size: fx.Node) -> bool:
        is_number = isinstance(size.meta.get("val"), int)
        return is_number or known_size(size, self.leaves[name]) is not None

    def _computed(self) -> set[fx.Node]:
        """Values of groups for which more was done than to view, cast or quantize an input."""
        computed: set[fx.Node] = set()
        for node, owner in self.owner.items():
            moved = is_view(self.graph_module, node) or is_quantizer(self.graph_module, node)
            if owner is None or node.op == "placeholder":
                continue
            if not moved or any(i in computed for i in node.all_input_nodes):
                computed.add(node)
        return computed

    def _read_quantizers(self) -> set[fx.Node]:
        """Quantizers that belong to who reads them, and views of what they return."""
        quantizers: set[fx.Node] = set()
        for node in self.graph_module.graph.nodes:
            if is_quantizer(self.graph_module, node):
                value: Any = node
                while isinstance(value, fx.Node) and is_quantizer(self.graph_module, value):
                    value = value.args[0]
                written = called_module(self.graph_module, value, *WEIGHT_LAYERS) is not None
                if not written or called_module(self.graph_module, node, DynamicQuantizer):
                    quantizers.add(node)
            elif is_view(self.graph_module, node) and quantizers.intersection(node.all_input_nodes):
                quantizers.add(node)
        return quantizers

    def walk(self, blocked: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
        """Nodes of the rest, and the values that it takes."""
        rest: set[fx.Node] = set()
        cuts: set[fx.Node] = set()
        stack = [
            node
            for node in self.graph_module.graph.nodes
            if node.op == "output" or (_is_kept(node) and self.owner[node] is None)
        ]
        while stack:
            node = stack.pop()
            if node in self.allowed and node not in blocked:
                cuts.add(node)
            elif node not in rest:
                rest.add(node)
                stack += self._read(node, None)
        return rest, cuts

    def closure(self, name: str, cuts: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """Nodes that compute a group's cuts, and checks of what only the group knows."""
        nodes = self.graph_module.graph.nodes
        stack = [*cuts, *(n for n in nodes if _is_kept(n) and self.owner[n] == name)]
        closure: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in closure:
                closure.add(node)
                stack += self._read(node, name)
        return frozenset(closure)

    def _read(self, node: fx.Node, name: str | None) -> list[fx.Node]:
        """Inputs that a node has in a method: sizes are read off the method's own inputs."""
        if node.target is _SYM_SIZE and self.owner[node.all_input_nodes[0]] != name:
            if isinstance(node.meta.get("val"), int):
                return []
            place = known_size(node, self.leaves[name])
            if place is not None:
                return [place[0].placeholder]
        return node.all_input_nodes

    def dearer_than_their_source(self, cuts: set[fx.Node], sizes: Sizes | None) -> set[fx.Node]:
        """Cuts that are views, where the value they are views of has fewer bytes than all."""
        by_source: dict[fx.Node, set[fx.Node]] = {}
        for node in cuts:
            source = node
            while is_view(self.graph_module, source) and source.all_input_nodes:
                source = source.all_input_nodes[0]
            by_source.setdefault(source, set()).add(node)
        views: set[fx.Node] = set()
        for source, nodes in by_source.items():
            total = sum(value_bytes(node, sizes) for node in nodes)
            if source in self.allowed and total > value_bytes(source, sizes):
                views |= nodes - {source}
        return views


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A tensor among the inputs of a graph.

    Attributes:
        placeholder: The input that it is, or is in.
        keys: Keys that lead to it, for a tensor in containers.
        value: Its fake value.
    """

    placeholder: fx.Node
    keys: tuple[Any, ...]
    value: torch.Tensor


def input_leaves(placeholders: Iterable[fx.Node]) -> Iterator[Leaf]:
    """Yield the tensors of placeholders; those in containers where something reads them."""

    def visit(node: fx.Node, root: fx.Node, keys: tuple[Any, ...]) -> Iterator[Leaf]:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            yield Leaf(placeholder=root, keys=keys, value=value)
            return
        for user in node.users:
            if user.target is operator.getitem and user.args[0] is node:
                yield from visit(user, root, (*keys, user.args[1]))

    for placeholder in placeholders:
        yield from visit(placeholder, placeholder, ())


def is_size(node: fx.Node) -> bool:
    """Tell whether a node is a size of a tensor, or arithmetic on sizes."""
    if node.target is _SYM_SIZE:
        return True
    is_number = isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymBool)
    inputs = node.all_input_nodes
    return node.op == "call_function" and is_number and bool(inputs) and all(map(is_size, inputs))


def known_size(node: fx.Node, leaves: Iterable[Leaf]) -> tuple[Leaf, int] | None:
    """Find the tensor and the axis that have the symbolic size which a `sym_size` node returns.

    Args:
        node: A call of `aten.sym_size.int`.
        leaves: Where to look.
    """
    size = node.meta.get("val")
    if not isinstance(size, torch.SymInt):
        return None
    for leaf in leaves:
        for axis, extent in enumerate(leaf.value.shape):
            if isinstance(extent, torch.SymInt) and extent.node.expr == size.node.expr:
                return leaf, axis
    return None


def is_view(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node only looks at its input: a view, a cast, an entry, a dropout."""
    if node.target is operator.getitem:
        return True
    if called_module(graph_module, node, nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _is_kept(node: fx.Node) -> bool:
    """Whether a node without users does something all the same: an assertion."""
    return node.op.startswith("call_") and not node.users and node.is_impure()
