"""Write sequences that are padded to one length as a stack.

Models that take a list of images pad what they make of them, also a single one. ExecuTorch (1.5.1)
knows no `pad_sequence` and runs a dozen portable kernels for it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import argument, sizes, static_shape
from mpqdm_fx.passes.base import GraphPass

__all__ = ["StackSequences"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class StackSequences(GraphPass):
    """Rewrite `pad_sequence` of static sizes and one dtype, padded at the end, as `stack`.

    Shorter sequences are padded first. Numbers are only moved: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rule covers; False if there was none."""
        modified = False
        nodes = graph_module.graph.find_nodes(op="call_function", target=_aten.pad_sequence.default)
        for node in nodes:
            if _is_static(node):
                node.replace_all_uses_with(_stacked(graph_module, node))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _is_static(node: fx.Node) -> bool:
    if any(static_shape(source) is None for source in node.all_input_nodes):
        return False
    alike = len({source.meta["val"].dtype for source in node.all_input_nodes}) == 1
    return alike and argument(node, 3, "padding_side", "right") == "right"


def _stacked(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    sequences: Any = node.args[0]
    longest = max(sizes(sequence)[0] for sequence in sequences)
    padded = []
    for sequence in sequences:
        missing = longest - sizes(sequence)[0]
        if missing:
            padding = [0] * (2 * len(sizes(sequence)) - 1) + [missing]
            args = (sequence, padding, argument(node, 2, "padding_value", 0.0))
            sequence = insert_call(graph_module, _aten.constant_pad_nd.default, args, anchor=node)
        padded.append(sequence)
    axis = 0 if argument(node, 1, "batch_first", False) else 1
    return insert_call(graph_module, _aten.stack.default, (padded, axis), anchor=node)
