"""Reshape once where a graph reshapes twice.

The rewriting of axes leaves views of views. Each is a copy in ExecuTorch (1.5.1), and a view of
more than six axes between two others is one that XNNPACK does not have.
"""

from dataclasses import dataclass

import torch
from torch import fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.nodes import sizes, static_shape
from mpqdm_fx.passes.base import GraphPass

__all__ = ["MergeReshapes"]

_aten = torch.ops.aten
_RESHAPES = frozenset(
    {
        _aten.flatten.using_ints,
        _aten.reshape.default,
        _aten.unflatten.int,
        _aten.view.default,
    }
)


@dataclass(frozen=True, kw_only=True)
class MergeReshapes(GraphPass):
    """Let a reshape of a reshape read what that one reads, and drop reshapes to the size they read.

    `flatten` and `unflatten` count, and become reshapes. Only with static sizes. Bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Merge all; False if there were none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if not _is_static_reshape(node):
                continue
            source = node.args[0]
            while _is_static_reshape(source):
                source = source.args[0]
            if sizes(source) == sizes(node):
                node.replace_all_uses_with(source)
            elif source is not node.args[0]:
                args = (source, sizes(node))
                merged = insert_call(graph_module, _aten.reshape.default, args, anchor=node)
                node.replace_all_uses_with(merged)
            else:
                continue
            graph_module.graph.erase_node(node)
            modified = True
        return modified


def _is_static_reshape(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _RESHAPES:
        return False
    return all(static_shape(n) is not None for n in (node, node.args[0]))
