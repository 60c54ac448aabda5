"""Which modules are leaves of the graph, and the copies that may stand in for them.

A leaf is a stock torch.nn layer (convolution, linear, embedding, norm, activation, dropout). Its
forward takes one tensor and nothing else, so the ATen nodes of one call, whatever they are, equal
``module(input)``. A subclass with its own forward gives no such promise (extra arguments,
adapters), so it is a leaf only when its single node is provably the stock layer's node.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import activation, batchnorm, dropout, instancenorm

from mpqdm_fx.graph.editing import shallow_clone

__all__ = ["LEAF_CLASSES", "evaluation_copy", "leaf_class", "out_of_place", "whole_or_stock"]

_ACTIVATIONS = tuple(
    getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention"
)
_DROPOUTS = tuple(getattr(dropout, name) for name in dropout.__all__)

LEAF_CLASSES: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    *_ACTIVATIONS,
    *_DROPOUTS,
)
"""The stock layers that become ``call_module`` nodes; everything else stays ATen."""

_MODE_DEPENDENT = (
    *_DROPOUTS,
    batchnorm._BatchNorm,
    instancenorm._InstanceNorm,
    nn.RReLU,
)

_CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    torch.ops.aten.conv1d.default: nn.Conv1d,
    torch.ops.aten.conv2d.default: nn.Conv2d,
    torch.ops.aten.conv3d.default: nn.Conv3d,
}


def leaf_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the stock class that ``module`` is an instance of, or None if it is not a leaf."""
    return next((c for c in type(module).__mro__ if c in LEAF_CLASSES), None)


def evaluation_copy(module: nn.Module) -> nn.Module:
    """Return ``module``, or a copy in evaluation mode if its result depends on the mode.

    Shares parameters and buffers; the caller's module keeps its training flag.
    """
    if not isinstance(module, _MODE_DEPENDENT):
        return module
    clone: nn.Module = shallow_clone(module)
    clone.training = False
    return clone


def out_of_place(module: nn.Module) -> nn.Module:
    """Return ``module``, or a copy that returns a new tensor if it overwrites its input."""
    if not getattr(module, "inplace", False):
        return module
    clone: nn.Module = shallow_clone(module)
    clone.inplace = False  # type: ignore[assignment]
    return clone


def whole_or_stock(
    module: nn.Module,
    nodes: Sequence[fx.Node],
    source: fx.Node,
    tensor_of: Callable[[fx.Node], torch.Tensor | None],
    *,
    whole: bool,
) -> nn.Module | None:
    """Return a module whose call on ``source`` is exactly ``nodes``, or None if none is known.

    ``module`` itself if its forward is the stock one and nothing is hooked onto it. A subclass with
    its own forward, or a hooked module, yields a stock layer that shares its parameters if the only
    node is the stock layer's operator on these very parameters and settings.

    Args:
        module: A leaf module (``leaf_class`` is not None).
        nodes: ATen nodes of one call of ``module``, without assertions.
        source: The one tensor node that ``nodes`` read besides constants.
        tensor_of: The parameter, buffer or constant that a lifted input node stands for.
        whole: Whether ``nodes`` are all that the call computes.
    """
    stock = leaf_class(module)
    assert stock is not None
    if whole and type(module).forward is stock.forward and not _is_altered(module):
        return module
    if len(nodes) != 1 or not _is_stock_node(module, nodes[0], source, tensor_of):
        return None
    twin = shallow_clone(module)
    twin.__class__ = stock
    for name in ("forward", "_conv_forward"):
        twin.__dict__.pop(name, None)
    twin._modules = {}
    twin._forward_hooks = type(twin._forward_hooks)()
    twin._forward_pre_hooks = type(twin._forward_pre_hooks)()
    return twin


def _is_altered(module: nn.Module) -> bool:
    """Tell whether calling ``module`` does more than its class's forward."""
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def _is_stock_node(
    module: nn.Module,
    node: fx.Node,
    source: fx.Node,
    tensor_of: Callable[[fx.Node], torch.Tensor | None],
) -> bool:
    """Tell whether ``node`` is the stock linear or convolution with ``module``'s state."""

    def holds(position: int, tensor: torch.Tensor | None) -> bool:
        argument = node.args[position] if len(node.args) > position else None
        if not isinstance(argument, fx.Node):
            return argument is None and tensor is None
        return tensor is not None and tensor_of(argument) is tensor

    if node.kwargs or not node.args or node.args[0] is not source:
        return False
    if isinstance(module, nn.Linear):
        return (
            node.target is torch.ops.aten.linear.default
            and holds(1, module.weight)
            and holds(2, module.bias)
        )
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if not isinstance(module, _CONVOLUTIONS.get(node.target, ())):
            return False
        ones = (1,) * len(module.kernel_size)
        defaults = [ones, (0,) * len(ones), ones, 1]
        settings = [*node.args[3:], *defaults[max(len(node.args) - 3, 0) :]]
        wanted = [module.stride, module.padding, module.dilation, module.groups]
        return (
            module.padding_mode == "zeros"
            and holds(1, module.weight)
            and holds(2, module.bias)
            and all(_as_tuple(s) == _as_tuple(w) for s, w in zip(settings, wanted, strict=True))
        )
    return False


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
