"""Let own layers read the codes that another own layer's output was rounded to."""

from dataclasses import dataclass

import torch
from torch import fx

import mpqdm_fx.backends.lowbit.ops  # noqa: F401 - registers the operators
from mpqdm_fx.passes.base import GraphPass

__all__ = ["ReuseCodes"]

_mpqdm = torch.ops.mpqdm


@dataclass(frozen=True, kw_only=True)
class ReuseCodes(GraphPass):
    """Drop `dequantize_mixed` and `quantize_static_mixed` between a value and readers of its range.

    1. Both have the same constants: numbers of a range have the codes that they came from.
    2. Whatever else reads the numbers still does; without such readers they are not computed.
    3. It comes after `MoveLayouts`: a permutation between the two hides them from each other.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Connect the readers with the codes; False if there was nothing to drop."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target is not _mpqdm.quantize_static_mixed.default:
                continue
            numbers, *known = node.args
            if not isinstance(numbers, fx.Node) or list(numbers.args[1:]) != known:
                continue
            if numbers.target is _mpqdm.dequantize_mixed.default:
                codes = numbers.args[0]
                assert isinstance(codes, fx.Node)
                node.replace_all_uses_with(codes)
                graph_module.graph.erase_node(node)
                modified = True
        return modified
