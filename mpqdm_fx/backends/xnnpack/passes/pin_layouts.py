"""Say in the graph where memory layouts change around layers that quantize at run time.

XNNPACK convolves channels last. In front of a dynamic convolution ExecuTorch (1.5.1,
`channels_last_tagged_reshape_pass.py`) does not stop at the quantizer chain: it walks from first
argument to first argument up to the root of the graph, puts the copy there, and so changes the
layout of all values on the way, whatever their rank and whoever else reads them. With the copies in
the graph already it finds every input in order and never starts to walk. In front of a dynamic
linear layer it puts the opposite copy between chain and layer, which hides the chain from it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from mpqdm_fx.graph.dynamic_chain import DynamicChain
from mpqdm_fx.graph.editing import infer_val, inherit_meta
from mpqdm_fx.graph.layers import called_module
from mpqdm_fx.graph.nodes import rank
from mpqdm_fx.graph.qdq import is_dequantize
from mpqdm_fx.passes.base import GraphPass

__all__ = ["PinLayouts"]

_aten = torch.ops.aten
_COPY = _aten._to_copy.default

_CONVOLUTIONS = frozenset({_aten.conv2d.default, _aten.conv2d.padding})


@dataclass(frozen=True, kw_only=True)
class PinLayouts(GraphPass):
    """Write down the layouts around dynamic layers; ExecuTorch removes copies that cancel.

    1. The chain of a dynamic Conv2d reads a `channels_last` copy of its value, and all users of the
       convolution's output read a `contiguous_format` copy of it. No copy is put behind the
       dequantize node of a static convolution's output: that is channels last already, and a second
       copy is one that ExecuTorch would not remove but execute.
    2. A dynamic linear layer on a value of rank 4 works on rank 3 between two views: views take
       contiguous values only. (A `contiguous_format` copy would not do: ExecuTorch removes it as
       doing nothing before it gives values layouts.) Sizes must be known but for the batch.
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
            if chain is None or not chain.is_private or rank(node) != 4:
                continue
            if _is_convolution(graph_module, node):
                modified |= _pin_input(graph_module, chain)
                modified |= _pin_output(graph_module, node)
            elif _is_linear(graph_module, node):
                modified |= _flatten(graph_module, chain, node)
        return modified


def _pin_input(graph_module: fx.GraphModule, chain: DynamicChain) -> bool:
    value, layout = chain.value, torch.channels_last
    if _is_copy(value, layout) or _is_static_convolution(graph_module, value):
        return False
    _redirect_chain(chain, _insert_copy(graph_module, value, layout, before=chain.choose))
    return True


def _pin_output(graph_module: fx.GraphModule, layer: fx.Node) -> bool:
    layout = torch.contiguous_format
    users = [user for user in layer.users if not _is_copy(user, layout)]
    if not users:
        return False
    copy = _insert_copy(graph_module, layer, layout, before=layer.next)
    for user in users:
        user.replace_input_with(layer, copy)
    return True


def _flatten(graph_module: fx.GraphModule, chain: DynamicChain, layer: fx.Node) -> bool:
    """Let a linear layer of rank 4 work on rank 3."""
    result = layer.meta["val"]
    rows = result.shape[1:3]
    if not all(isinstance(size, int) for size in result.shape[1:]):
        return False
    inside = graph_module.graph.call_function
    with graph_module.graph.inserting_before(chain.choose):
        flat = inside(_aten.flatten.using_ints, (chain.value, 1, 2))
    inherit_meta(flat, chain.value)
    infer_val(graph_module, flat)
    _redirect_chain(chain, flat)
    users = list(layer.users)
    with graph_module.graph.inserting_after(layer):
        restored = inside(_aten.unflatten.int, (layer, 1, list(rows)))
    inherit_meta(restored, layer)
    restored.meta["val"] = result
    for user in users:
        user.replace_input_with(layer, restored)
    for node in (*chain.nodes, layer):
        infer_val(graph_module, node)
    if layer.meta["val"].dim() == 4:  # its inputs have no values to infer from
        layer.meta["val"] = result.flatten(1, 2)
    return True


def _redirect_chain(chain: DynamicChain, value: fx.Node) -> None:
    chain.choose.update_arg(0, value)
    chain.quantize.update_arg(0, value)


def _is_static_convolution(graph_module: fx.GraphModule, value: fx.Node) -> bool:
    """Whether a value is the dequantized output of a static 2-D convolution."""
    if not is_dequantize(value):
        return False
    quantize = value.args[0]
    source = quantize.args[0] if isinstance(quantize, fx.Node) else None
    return isinstance(source, fx.Node) and _is_convolution(graph_module, source)


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
