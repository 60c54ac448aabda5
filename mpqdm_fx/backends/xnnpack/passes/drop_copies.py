"""Remove what only copies its input.

Models clone and alias values that nobody overwrites, and join lists that hold one tensor.
ExecuTorch (1.5.1) copies them on portable kernels, which parts the program.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mpqdm_fx.passes.base import GraphPass

__all__ = ["DropCopies"]

_aten = torch.ops.aten
_VIEW = _aten.view_as_complex.default
_COPIES = frozenset(
    {
        _aten.alias.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        _aten.lift_fresh_copy.default,
    }
)


@dataclass(frozen=True, kw_only=True)
class DropCopies(GraphPass):
    """Replace copies, aliases and concatenations of one tensor by what they are of.

    A graph writes into none of its values and reads none by its strides, so that a value and its
    copy are the same; but for `view_as_complex`, with which all copies are left. A program trains
    nothing, so that `detach` is a copy too. Bit-equal.
    """

    # But a copy may lie in memory in another order, in which a sum that follows is rounded.
    tolerance: ClassVar[float] = 1e-6

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Remove every copy; False if there was none."""
        modified = False
        if graph_module.graph.find_nodes(op="call_function", target=_VIEW):
            return False
        for node in list(graph_module.graph.nodes):
            source = _copied(node)
            if source is not None:
                node.replace_all_uses_with(source)
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _copied(node: fx.Node) -> fx.Node | None:
    if node.op == "call_function" and node.target in _COPIES:
        source = node.args[0]
    elif node.target is _aten.cat.default:
        parts = node.args[0]
        assert isinstance(parts, list | tuple)
        source = parts[0] if len(parts) == 1 else None
    else:
        source = None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    return source
