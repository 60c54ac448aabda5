"""Say of average pooling without padding that padding does not count.

XNNPACK in ExecuTorch (1.4.1) averages over what is there, and refuses a pooling that would count
padding, also where there is none. `nn.AvgPool2d(2)`, which halves an image in many models, is one.
"""

from dataclasses import dataclass

import torch
from torch import fx

from mpqdm_fx.graph.nodes import argument
from mpqdm_fx.passes.base import GraphPass

__all__ = ["ExcludePadding"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class ExcludePadding(GraphPass):
    """Set `count_include_pad` of `avg_pool2d` to False where it makes no difference.

    That is where the padding is zero and sizes are not rounded up. Bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Change every such pooling; False if there was none."""
        modified = False
        for node in graph_module.graph.find_nodes(
            op="call_function", target=_aten.avg_pool2d.default
        ):
            kernel_size = argument(node, 1, "kernel_size", None)
            stride = argument(node, 2, "stride", []) or kernel_size
            padding = argument(node, 3, "padding", 0)
            padded = any(padding) if isinstance(padding, list | tuple) else padding != 0
            counted = argument(node, 5, "count_include_pad", True)
            if padded or argument(node, 4, "ceil_mode", False) or not counted:
                continue
            divisor = argument(node, 6, "divisor_override", None)
            settings = (kernel_size, stride, padding, False, False)
            node.args = (node.args[0], *settings, *(() if divisor is None else (divisor,)))
            node.kwargs = {}
            modified = True
        return modified
