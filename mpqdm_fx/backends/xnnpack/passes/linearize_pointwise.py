"""Write 1x1 convolutions as linear layers over the channels of each pixel.

XNNPACK stores the weights of linear layers at four bits, those of convolutions never (ExecuTorch
1.5.1 lowers a 1x1 convolution of four bits to a program that its own runtime refuses).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from mpqdm_fx.graph.editing import insert_call, keep_fetched, replace_module
from mpqdm_fx.graph.layers import WeightLayer, is_pointwise, weight_layers
from mpqdm_fx.graph.nodes import rank
from mpqdm_fx.graph.reshaped_layers import ROUNDED_BUFFERS, with_numbers_of
from mpqdm_fx.passes.base import GraphPass

__all__ = ["LinearizePointwise"]

_aten = torch.ops.aten
_LAST = [0, 2, 3, 1]  # channels last
_FIRST = [0, 3, 1, 2]  # and back
_COPIES = frozenset({_aten.clone.default, _aten.contiguous.default})


@dataclass(frozen=True, kw_only=True)
class LinearizePointwise(GraphPass):
    """Turn 1x1 convolutions into a permutation, a linear layer of the same name, and one back.

    1. The convolution is ungrouped, of stride 1 and without padding, and all its calls read one
       value of rank 4 under one name.
    2. A permutation that undoes the one inserted goes with it, before and behind: attention
       blocks move the channels to the end and back around their projections.
    3. The integers and scales of a rounded layer stay with it.

    Attributes:
        layers: Names of the layers; None for all.
    """

    layers: frozenset[str] | None = None

    # Sums over channels run in another order; a later quantizer may take the neighbouring code.
    tolerance: ClassVar[float] = 1e-2

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every such convolution; False if there was none."""
        modified = False
        for name, layer in weight_layers(graph_module).items():
            if (self.layers is None or name in self.layers) and _fits(layer):
                keep_fetched(graph_module, name)
                replace_module(graph_module, name, _linear(layer.module))
                for call in layer.nodes:
                    _rewrite_call(graph_module, call)
                modified = True
        return modified


def _fits(layer: WeightLayer) -> bool:
    module = layer.module
    if type(module) is not nn.Conv2d or not is_pointwise(module):
        return False
    if not set(module._buffers) <= ROUNDED_BUFFERS:
        return False
    return all(
        node.target == layer.name and len(node.args) == 1 and not node.kwargs and rank(node) == 4
        for node in layer.nodes
    )


def _linear(conv: nn.Module) -> nn.Linear:
    assert isinstance(conv, nn.Conv2d)
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=False, device="meta")
    return with_numbers_of(conv, linear, lambda weight: weight.flatten(1))


def _rewrite_call(graph_module: fx.GraphModule, call: fx.Node) -> None:
    source = call.args[0]
    assert isinstance(source, fx.Node)
    moved = _before_copies(source)
    if _is_permutation(moved, _FIRST):
        last = moved.args[0]
    else:
        last = insert_call(graph_module, _aten.permute.default, (source, _LAST), anchor=call)
    linear = insert_call(graph_module, str(call.target), (last,), anchor=call)
    for user in list(call.users):
        if _is_permutation(user, _LAST):
            user.replace_all_uses_with(linear)
            graph_module.graph.erase_node(user)
    if call.users:
        back = insert_call(graph_module, _aten.permute.default, (linear, _FIRST), anchor=call)
        call.replace_all_uses_with(back)
    graph_module.graph.erase_node(call)


def _before_copies(node: fx.Node) -> fx.Node:
    """The value that `node` is a copy of in memory, if it is one."""
    while node.target in _COPIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_permutation(node: fx.Node, axes: list[int]) -> bool:
    if node.target is not _aten.permute.default or node.kwargs:
        return False
    order: Any = node.args[1]
    return isinstance(order, list | tuple) and [axis % 4 for axis in order] == axes
