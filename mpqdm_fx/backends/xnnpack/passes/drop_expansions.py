"""Leave out expansions in front of arithmetic, which broadcasts by itself.

Attention masks are expanded to all heads and modulations to all tokens. ExecuTorch (1.5.1) has a
portable kernel for `expand` only: it copies, and parts the program in two.
"""

from dataclasses import dataclass

import torch
from torch import fx

from mpqdm_fx.graph.nodes import broadcast_shape, static_shape
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DropExpansions"]

_aten = torch.ops.aten
_EXPANSIONS = frozenset({_aten.expand.default, _aten.expand_as.default})
#: Operators whose tensors broadcast to one another, by the number of these tensors.
_BROADCASTS = {
    _aten.add.Tensor: 2,
    _aten.sub.Tensor: 2,
    _aten.mul.Tensor: 2,
    _aten.div.Tensor: 2,
    _aten.maximum.default: 2,
    _aten.minimum.default: 2,
    _aten.where.self: 3,
}


@dataclass(frozen=True, kw_only=True)
class DropExpansions(GraphPass):
    """Let an operator that broadcasts read x in the place of `aten.expand(x)`.

    Only where its result keeps its shape and dtype, and with static sizes: among values of several
    dtypes, one without axes does not count. Bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Go past every expansion that is not needed; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.op != "call_function" or node.target not in _EXPANSIONS:
                continue
            for user in list(node.users):
                if _broadcasts(user, node):
                    user.replace_input_with(node, node.args[0])
                    modified = True
            if not node.users:
                graph_module.graph.erase_node(node)
        return modified


def _broadcasts(user: fx.Node, expansion: fx.Node) -> bool:
    """Tell whether a user gives the same from what is expanded."""
    count = next((n for target, n in _BROADCASTS.items() if user.target is target), 0)
    operands = user.args[:count]
    if expansion not in operands:
        return False
    source = expansion.args[0]
    assert isinstance(source, fx.Node)
    read = [source if n is expansion else n for n in operands if isinstance(n, fx.Node)]
    shapes = [static_shape(n) for n in read]
    result = static_shape(user)
    if result is None or any(shape is None for shape in shapes):
        return False
    if static_shape(source) == ():
        chosen = read[1:] if user.target is _aten.where.self else read  # what the result is of
        if len({n.meta["val"].dtype for n in chosen}) > 1:
            return False
    return broadcast_shape([shape for shape in shapes if shape is not None]) == result
