"""Remove dropout that does nothing.

In eval mode dropout hands its input through. Removing it keeps the patterns that later passes and
backends look for (linear then chunk, norm then conv) free of a node in between.
"""

from dataclasses import dataclass

import torch
from torch import fx, nn

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.layers import called_module
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DropDropout"]

_MODULES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

# each is f(input, p, train)
_FUNCTIONS = frozenset(
    {
        torch.ops.aten.dropout.default,
        torch.ops.aten.feature_dropout.default,
        torch.ops.aten.alpha_dropout.default,
        torch.ops.aten.feature_alpha_dropout.default,
    }
)


@dataclass(frozen=True, kw_only=True)
class DropDropout(GraphPass):
    """Replace every inactive dropout by its input. Bit-equal.

    1. A dropout module in eval mode, or with p = 0.
    2. An aten dropout with train=False, or with p = 0.

    Active dropout (train mode) stays: it is part of the function.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Apply rules 1 and 2 everywhere."""
        inactive = [n for n in graph_module.graph.nodes if _is_inactive(graph_module, n)]
        for node in inactive:
            node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
            graph_module.graph.erase_node(node)
        return bool(inactive)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """No inactive dropout is left.

        Raises:
            DialectError: one is; names the node.
        """
        for node in graph_module.graph.nodes:
            if _is_inactive(graph_module, node):
                raise DialectError(f"inactive dropout {node.name!r} ({node.target}) is left")


def _is_inactive(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    module = called_module(graph_module, node, *_MODULES)
    if isinstance(module, _MODULES):
        return not module.training or module.p == 0
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return False
    p = node.args[1] if len(node.args) > 1 else node.kwargs["p"]
    train = node.args[2] if len(node.args) > 2 else node.kwargs["train"]
    return isinstance(p, int | float) and (p == 0 or train is False)
