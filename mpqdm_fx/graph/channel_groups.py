"""Values whose channels may be put into another order together: between linear layers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.layers import called_module

__all__ = ["ChannelGroup", "channel_group"]

_aten = torch.ops.aten
# Functions of each element alone; the channels are the last axis.
_ELEMENTWISE = frozenset(
    {
        _aten.abs.default,
        _aten.add.Tensor,
        _aten.clone.default,
        _aten.div.Tensor,
        _aten.dropout.default,
        _aten.exp.default,
        _aten.gelu.default,
        _aten.leaky_relu.default,
        _aten.mul.Tensor,
        _aten.neg.default,
        _aten.relu.default,
        _aten.sigmoid.default,
        _aten.silu.default,
        _aten.sub.Tensor,
        _aten.tanh.default,
    }
)
_MODULES = (nn.GELU, nn.SiLU, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout)


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Calls of linear layers around values that only elementwise functions connect.

    An order of channels given to the rows of all writers and the columns of all readers changes
    nothing outside.

    Attributes:
        writers: Calls whose outputs are in the group, in graph order.
        readers: Calls that read values of the group, in graph order.
    """

    writers: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]


def channel_group(graph_module: fx.GraphModule, call: fx.Node) -> ChannelGroup | None:
    """The group that a linear layer's output belongs to; None if it reaches anything else.

    Args:
        graph_module: Module-level graph with values in its meta.
        call: A call of a linear layer.
    """
    channels = _channels(call)
    if channels is None:
        return None
    inside: set[fx.Node] = set()
    writers, readers = set(), set()
    waiting = [call]
    while waiting:
        node = waiting.pop()
        if node in inside:
            continue
        inside.add(node)
        if called_module(graph_module, node, nn.Linear) is not None:
            writers.add(node)
        else:
            sources = [n for n in node.all_input_nodes if not _is_shared(n)]
            if not all(_may_join(graph_module, n, channels) for n in sources):
                return None
            waiting.extend(sources)
        for user in node.users:
            if called_module(graph_module, user, nn.Linear) is not None:
                readers.add(user)
            elif _may_join(graph_module, user, channels):
                waiting.append(user)
            else:
                return None
    if not readers:
        return None
    places = {node: place for place, node in enumerate(graph_module.graph.nodes)}

    def ordered(nodes: set[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(sorted(nodes, key=places.__getitem__))

    return ChannelGroup(writers=ordered(writers), readers=ordered(readers))


def _channels(node: fx.Node) -> Any:
    """Size of the last axis; None if there is none."""
    value = node.meta.get("val")
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() else None


def _is_shared(node: fx.Node) -> bool:
    """Whether a value is the same for all channels."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (not value.dim() or _channels(node) == 1)


def _may_join(graph_module: fx.GraphModule, node: fx.Node, channels: Any) -> bool:
    """Whether a value of as many channels comes from a linear layer or an elementwise function."""
    if _channels(node) != channels:
        return False
    elementwise = node.target in _ELEMENTWISE if node.op == "call_function" else None
    return elementwise or called_module(graph_module, node, nn.Linear, *_MODULES) is not None
