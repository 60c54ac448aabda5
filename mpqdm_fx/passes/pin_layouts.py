"""Say in the graph where memory layouts change around layers that quantize at run time.

XNNPACK convolves channels last. In front of a dynamic convolution ExecuTorch (1.4.1,
`channels_last_tagged_reshape_pass.py`) does not stop at the quantizer chain: it walks from first
argument to first argument up to the root of the graph, puts the copy there, and so changes the
layout of all values on the way, whatever their rank and whoever else reads them. With the copies in
the graph already it finds every input in order and never starts to walk.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from mpqdm_fx.graph.base import GraphPass
from mpqdm_fx.graph.dynamic_chain import DynamicChain
from mpqdm_fx.graph.editing import infer_val, inherit_meta
from mpqdm_fx.graph.layers import called_module

__all__ = ["PinLayouts"]

_aten = torch.ops.aten
_COPY = _aten._to_copy.default

_CONVOLUTIONS = frozenset({_aten.conv2d.default, _aten.conv2d.padding})


@dataclass(frozen=True, kw_only=True)
class PinLayouts(GraphPass):
    """Insert layout copies around dynamic layers; ExecuTorch removes those that cancel.

    1. The chain of a dynamic Conv2d reads a `channels_last` copy of its value, and all users of the
       convolution's output read a `contiguous_format` copy of it.
    2. The chain of a dynamic linear layer on a value of rank 4 reads a `contiguous_format` copy:
       else ExecuTorch puts the copy between the chain and the layer, which then counts as float.
    3. A chain with several readers is left alone; `UnshareDynamicQuantizers` goes first.
    """

    # The numbers are moved, not changed; but a convolution may sum in another order when its input
    # lies channels last, and a later quantizer may then take the neighbouring code.
    tolerance: ClassVar[float] = 1e-2

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Insert the copies; False if all were there."""
        modified = False
        for node in list(graph_module.graph.nodes):
            chain = DynamicChain.behind(node.args[0]) if node.args else None
            if chain is None or not chain.is_private or _rank(node) != 4:
                continue
            if _is_convolution(graph_module, node):
                modified |= _pin_input(graph_module, chain, torch.channels_last)
                modified |= _pin_output(graph_module, node)
            elif _is_linear(graph_module, node):
                modified |= _pin_input(graph_module, chain, torch.contiguous_format)
        return modified


def _pin_input(
    graph_module: fx.GraphModule, chain: DynamicChain, layout: torch.memory_format
) -> bool:
    value = chain.value
    if _is_copy(value, layout) and chain.choose.args[0] is value:
        return False
    copy = _insert_copy(graph_module, value, layout, before=chain.choose)
    chain.choose.update_arg(0, copy)
    chain.quantize.update_arg(0, copy)
    return True


def _pin_output(graph_module: fx.GraphModule, layer: fx.Node) -> bool:
    layout = torch.contiguous_format
    users = [user for user in layer.users if not _is_copy(user, layout)]
    if not users:
        return False
    copy = _insert_copy(graph_module, layer, layout, before=layer.next)
    _redirect(users, layer, copy)
    return True


def _redirect(users: Iterable[fx.Node], old: fx.Node, new: fx.Node) -> None:
    for user in users:
        user.replace_input_with(old, new)


def _insert_copy(
    graph_module: fx.GraphModule, value: fx.Node, layout: torch.memory_format, *, before: fx.Node
) -> fx.Node:
    with graph_module.graph.inserting_before(before):
        copy = graph_module.graph.call_function(_COPY, (value,), {"memory_format": layout})
    inherit_meta(copy, value)
    infer_val(graph_module, copy)
    return copy


def _is_copy(node: fx.Node, layout: torch.memory_format) -> bool:
    return node.target is _COPY and dict(node.kwargs) == {"memory_format": layout}


def _is_convolution(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return node.target in _CONVOLUTIONS or bool(called_module(graph_module, node, nn.Conv2d))


def _is_linear(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    is_op = node.target is _aten.linear.default
    return is_op or bool(called_module(graph_module, node, nn.Linear))


def _rank(layer: fx.Node) -> int:
    """Rank of what a layer writes, which is that of what it reads; -1 where it is not known."""
    value: Any = layer.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1
