"""Say of average pooling without padding that padding does not count.

XNNPACK in ExecuTorch (1.4.1) averages over what is there, and refuses a pooling that would count
padding, also where there is none. `nn.AvgPool2d(2)`, which halves an image in many models, is one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpqdm_fx.graph.base import GraphPass

__all__ = ["ExcludePadding"]

_aten = torch.ops.aten
_NAMES = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_DEFAULTS: tuple[Any, ...] = ([], 0, False, True, None)


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
            given = dict(zip(_NAMES, node.args[1:], strict=False)) | dict(node.kwargs)
            full = {
                name: given.get(name, default)
                for name, default in zip(_NAMES[1:], _DEFAULTS, strict=True)
            }
            padding = full["padding"]
            padded = any(padding) if isinstance(padding, list | tuple) else padding != 0
            if padded or full["ceil_mode"] or not full["count_include_pad"]:
                continue
            stride = full["stride"] or given["kernel_size"]
            override = full["divisor_override"]
            settings = (given["kernel_size"], stride, padding, False, False)
            node.args = (node.args[0], *settings, *(() if override is None else (override,)))
            node.kwargs = {}
            modified = True
        return modified
