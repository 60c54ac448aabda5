"""Write 1-D convolutions as 2-D ones over images of one row.

XNNPACK quantizes at run time what linear layers and 2-D convolutions read, and nothing else.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from mpqdm_fx.graph.editing import insert_call, keep_fetched, replace_module
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.graph.reshaped_layers import ROUNDED_BUFFERS, with_numbers_of
from mpqdm_fx.passes.base import GraphPass

__all__ = ["WidenSequences"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class WidenSequences(GraphPass):
    """Turn `Conv1d` into `Conv2d` of the same name and kernel (1, k), between reshapes.

    1. The convolution pads with zeros, and all its calls read an input with a batch axis and static
       sizes under one name.
    2. The integers and scales of a rounded layer stay with it.
    """

    # A backend may sum in another order; a later quantizer may take the neighbouring code.
    tolerance: ClassVar[float] = 1e-2

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every such convolution; False if there was none."""
        modified = False
        for name, layer in weight_layers(graph_module).items():
            if _fits(layer):
                keep_fetched(graph_module, name)
                replace_module(graph_module, name, _widened(layer.module))
                for call in layer.nodes:
                    _rewrite_call(graph_module, call)
                modified = True
        return modified


def _fits(layer: WeightLayer) -> bool:
    conv = layer.module
    if type(conv) is not nn.Conv1d or conv.padding_mode != "zeros":
        return False
    return set(conv._buffers) <= ROUNDED_BUFFERS and all(
        node.target == layer.name and not node.kwargs and _has_sizes(node) for node in layer.nodes
    )


def _has_sizes(node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node) or "val" not in source.meta or "val" not in node.meta:
        return False
    return len(sizes(source)) == 3 and -1 not in sizes(source)[1:]


def _widened(conv: nn.Module) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv1d)
    padding = conv.padding if isinstance(conv.padding, str) else (0, conv.padding[0])
    layer = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (1, conv.kernel_size[0]),
        stride=(1, conv.stride[0]),
        padding=padding,
        dilation=(1, conv.dilation[0]),
        groups=conv.groups,
        bias=False,
        device="meta",
    )
    return with_numbers_of(conv, layer, lambda weight: weight.unsqueeze(2))


def _rewrite_call(graph_module: fx.GraphModule, call: fx.Node) -> None:
    def emit(target: str | torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=call)

    source = call.args[0]
    assert isinstance(source, fx.Node)
    channels, length = sizes(source)[1:]
    image = emit(_aten.reshape.default, source, [-1, channels, 1, length])
    rows = emit(str(call.target), image)
    result = emit(_aten.reshape.default, rows, [-1, *sizes(call)[1:]])
    call.replace_all_uses_with(result)
    graph_module.graph.erase_node(call)
