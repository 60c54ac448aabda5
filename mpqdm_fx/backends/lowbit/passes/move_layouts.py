"""Move permutations to where they copy least, and cancel those that meet."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mpqdm_fx.backends.lowbit.axes import permuted
from mpqdm_fx.backends.lowbit.image_layouts import ImageLayouts
from mpqdm_fx.backends.lowbit.layout_free import turn
from mpqdm_fx.graph.editing import eliminate_dead_code, writes_in_place
from mpqdm_fx.passes.base import GraphPass

__all__ = ["MoveLayouts"]


@dataclass(frozen=True, kw_only=True)
class MoveLayouts(GraphPass):
    """Compute element by element, join, cut, pad and view in the layout that copies fewest bytes.

    1. A permutation between channels first and channels last is a copy. What computes alike in
       both layouts (`layout_free`) is turned where that saves copies; what is bound to its axes
       (layers, own operators, means, the graph's inputs and outputs) stays.
    2. The choice is the best there is, over the whole graph (`image_layouts`).
    3. A value that is read both ways is copied once, in front of the first such reader.
    4. Values of unknown sizes stay as they are, and so does a graph that writes in place.

    Numbers are only moved; but a layer may sum in another order on a value that lies otherwise.
    """

    # A later quantizer may then take the neighbouring code.
    tolerance: ClassVar[float] = 1e-2

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Move permutations until no fewer bytes can be copied; False if none can at once."""
        if any(writes_in_place(graph_module, node) for node in graph_module.graph.nodes):
            return False
        modified = False
        while True:
            layouts = ImageLayouts.of(graph_module)
            if layouts.bytes_best >= layouts.bytes_now:
                return modified
            _Rewriter(graph_module, layouts).run()
            eliminate_dead_code(graph_module)
            modified = True


class _Rewriter:
    """Writes a graph in the chosen layouts."""

    def __init__(self, graph_module: fx.GraphModule, layouts: ImageLayouts) -> None:
        self._graph_module = graph_module
        self._layouts = layouts
        # value to its form with the channels first (0) and last (1)
        self._forms: dict[fx.Node, dict[int, fx.Node]] = {}

    def run(self) -> None:
        """Rewrite all nodes in order; what nothing reads any more is left to be swept."""
        layouts = self._layouts
        for node in list(self._graph_module.graph.nodes):
            if node in layouts.moves:
                self._forms[node] = self._forms[layouts.moves[node]]
                continue
            label, best = layouts.labels.get(node), layouts.best.get(node)
            if best is not None and best != label:
                assert label is not None
                call = layouts.free[node]
                forms = self._inputs(node) | {a: self._form(a, best, node) for a in call.links}
                self._forms[node] = {best: call.turned(self._graph_module, forms, label)}
                continue
            for source, written in self._inputs(node).items():
                node.replace_input_with(source, written)
            if label is not None:
                self._forms[node] = {label: node}

    def _inputs(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """What stands for the inputs of a node as the graph wrote them."""
        labels = self._layouts.labels
        sources = [source for source in node.all_input_nodes if source in labels]
        return {source: self._form(source, labels[source], node) for source in sources}

    def _form(self, source: fx.Node, label: int, anchor: fx.Node) -> fx.Node:
        forms = self._forms[source]
        if label not in forms:
            other = forms[1 - label]
            order = turn(other.meta["val"].dim(), 1 - label)
            forms[label] = permuted(self._graph_module, other, order, anchor=anchor)
        return forms[label]
