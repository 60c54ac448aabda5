"""Where two graphs of one model compute the same value, told by module path and operator.

Tracing, our passes, PT2E and ExecuTorch all keep `nn_module_stack`: the module that a node comes
from, and which of its calls. Names of nodes they do not keep.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

import torch
from torch import fx

from mpqdm_fx.graph.layers import WEIGHT_LAYERS
from mpqdm_fx.graph.nodes import rank
from mpqdm_fx.graph.operators import operator_name
from mpqdm_fx.graph.quantizers import ActivationQuantizer

__all__ = ["WEIGHT_OPS", "Site", "matching_sites", "sites"]

#: What a weight layer's operator is called here, in whatever dialect it is written.
WEIGHT_OPS = frozenset({"convolution", "linear"})

# They compute nothing: their value is that of another node.
_MOVES = frozenset(
    {
        "_clone_dim_order",
        "_to",
        "_to_dim_order",
        "alias",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "flatten",
        "permute",
        "reshape",
        "select",
        "slice",
        "squeeze",
        "t",
        "transpose",
        "unflatten",
        "unsafe_view",
        "unsqueeze",
        "view",
    }
)


class Site(NamedTuple):
    """A value of a model, by where it comes from.

    Attributes:
        module: Path of the innermost module; "" for the model itself.
        call: Which call of that module, counted from 0.
        op: Operator's name without namespace, overload and dialect (`convolution`, `add`).
        nth: Which of the operators of that name in that call, counted from 0.
    """

    module: str
    call: int
    op: str
    nth: int

    @property
    def key(self) -> str:
        """The site as one string."""
        return f"{self.module}@{self.call} {self.op} {self.nth}"

    @classmethod
    def from_key(cls, key: str) -> "Site":
        """Inverse of `key`; raises ValueError if it is none."""
        place, op, nth = key.rsplit(" ", 2)
        module, at, call = place.rpartition("@")
        if not at:
            raise ValueError(f"{key!r} names no site")
        return cls(module, int(call), op, int(nth))

    def __str__(self) -> str:
        call = f" (call {self.call + 1})" if self.call else ""
        return f"{self.module or 'the model'}{call}"


def sites(graph_module: fx.GraphModule) -> dict[Site, fx.Node]:
    """The values of a graph, in running order.

    Quantizers are left out, and so is what only moves numbers. In every dialect the value of a
    weight layer is its sum of products with the bias, before it is rounded.

    Args:
        graph_module: A module-level graph, an exported one, or an edge program's module.
    """
    by_site: dict[Site, fx.Node] = {}
    for place, nodes in _places(graph_module).items():
        counts: Counter[str] = Counter()
        for node, op in nodes:
            if op not in _MOVES:
                by_site[Site(*place, op, counts[op])] = node
                counts[op] += 1
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    return dict(sorted(by_site.items(), key=lambda entry: order[entry[1]]))


def matching_sites(
    before: fx.GraphModule, after: fx.GraphModule
) -> dict[Site, tuple[fx.Node, fx.Node]]:
    """Pairs of nodes that compute the same value in two graphs of one model.

    1. The k-th operator of a name in a module's call is that of the other graph, if both have
       equally many of them there.
    2. What is left of a module's call is compared where both end with it: one graph may call the
       module, the other have its pieces.

    Args:
        before: The one graph.
        after: The other graph; its running order and its operators' names are kept.
    """
    earlier, later = sites(before), sites(after)
    earlier_counts, later_counts = (
        Counter((s.module, s.call, s.op) for s in side) for side in (earlier, later)
    )
    partners = {
        site: earlier[site]
        for site in later
        if earlier_counts[site.module, site.call, site.op]
        == later_counts[site.module, site.call, site.op]
    }
    last = {place: nodes[-1][0] for place, nodes in _places(before).items()}
    ends = {nodes[-1][0]: place for place, nodes in _places(after).items()}
    taken = set(partners.values())
    result = {}
    for site, node in later.items():
        partner = partners.get(site)
        if partner is None and node in ends:
            end = last.get(ends[node])
            if end is not None and end not in taken and rank(end) == rank(node):
                partner = end
        if partner is not None:
            result[site] = (partner, node)
    return result


def _places(
    graph_module: fx.GraphModule,
) -> dict[tuple[str, int], list[tuple[fx.Node, str]]]:
    """Nodes with floating-point values and their operators, by module and call of it."""
    places: dict[tuple[str, int], list[tuple[fx.Node, str]]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        op = _operator(graph_module, node)
        value = node.meta.get("val")
        if op is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        stack = node.meta.get("nn_module_stack") or {}
        key, entry = next(reversed(stack.items()), ("", ("", None)))
        call = str(key).rpartition("@")[2]
        places[str(entry[0]), int(call) if call.isdigit() else 0].append((node, op))
    return dict(places)


def _operator(graph_module: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, ActivationQuantizer):
            return None
        if isinstance(module, WEIGHT_LAYERS):
            return "linear" if isinstance(module, torch.nn.Linear) else "convolution"
        return type(module).__name__.lower()
    return operator_name(node)
