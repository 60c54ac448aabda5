"""Give every reader of a value that is quantized at run time a quantizer chain of its own.

XNNPACK runs a dynamic layer together with the chain in front of it. ExecuTorch (1.5.1) brings that
chain into the layout that its layer wants, by a copy placed inside or in front of the chain; with
two layers behind one chain (a convolution and a linear layer on one value) each gets the other's
copy, and the layer behind it is no longer seen as quantized.
"""

from dataclasses import dataclass

from torch import fx

from mpqdm_fx.graph.dynamic_chain import DynamicChain
from mpqdm_fx.passes.base import GraphPass

__all__ = ["UnshareDynamicQuantizers"]


@dataclass(frozen=True, kw_only=True)
class UnshareDynamicQuantizers(GraphPass):
    """Clone chains of choose_qparams, quantize and dequantize until each has one reader.

    1. The first reader keeps the chain; each further one gets a copy of all five nodes.
    2. Chains that share a part of their nodes are separated likewise.
    3. The result computes the same numbers: the nodes of a chain have no state.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Clone; False if no chain was shared."""
        modified = False
        taken: set[fx.Node] = set()
        for node in list(graph_module.graph.nodes):
            chain = DynamicChain.behind(node)
            if chain is None:
                continue
            for user in list(node.users):
                if taken.isdisjoint(chain.nodes):
                    taken.update(chain.nodes)
                    continue
                user.replace_input_with(node, _clone(graph_module.graph, chain))
                modified = True
        return modified


def _clone(graph: fx.Graph, chain: DynamicChain) -> fx.Node:
    """Copy a chain behind its last node; return the copy's dequantize node."""
    copies: dict[fx.Node, fx.Node] = {}
    last = chain.dequantize
    for node in chain.nodes:
        with graph.inserting_after(last):
            last = graph.node_copy(node, lambda source: copies.get(source, source))
        copies[node] = last
    return last
