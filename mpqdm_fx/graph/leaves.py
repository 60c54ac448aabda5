"""Which modules are leaves of the graph, and the stock layers that stand in for altered ones.

A leaf is a stock torch.nn layer (convolution, linear, embedding, norm, activation, dropout). Its
forward takes one tensor and nothing else, so the ATen nodes of one call, whatever they are, equal
``module(input)``. Whoever reads such a layer (rows, ranges, kernels) trusts its attributes. A layer
with a forward, helper method or hook of its own gives no such promise. Of it, only a node that is
provably a stock layer's operator on the layer's own weight is a call; the rest stays ATen.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import activation, batchnorm, dropout, instancenorm
from torch.nn.modules import module as hooks

from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.editing import shallow_clone

__all__ = [
    "HOOKS",
    "LEAF_CLASSES",
    "check_modules",
    "evaluation_copy",
    "is_stock",
    "leaf_class",
    "out_of_place",
    "proven_layer",
    "same_settings",
    "whole_layer",
]

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

#: Operators and the stock layers that they are, whose `padding` may be numbers or a word.
_OPERATORS: dict[Any, type[nn.Module]] = {
    torch.ops.aten.conv1d.default: nn.Conv1d,
    torch.ops.aten.conv1d.padding: nn.Conv1d,
    torch.ops.aten.conv2d.default: nn.Conv2d,
    torch.ops.aten.conv2d.padding: nn.Conv2d,
    torch.ops.aten.conv3d.default: nn.Conv3d,
    torch.ops.aten.conv3d.padding: nn.Conv3d,
    torch.ops.aten.linear.default: nn.Linear,
}

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: What follows input, weight and bias in a convolution's operator, and its defaults.
_SETTINGS: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}

#: Where a module holds what runs around its forward.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: Methods of nn.Module that a subclass may define without changing a call.
_NOT_CALLED = frozenset(
    {"extra_repr", "reset_parameters", "_load_from_state_dict", "_save_to_state_dict", "_version"}
)


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


def check_modules(model: nn.Module) -> None:
    """Refuse what decides a call but stands in no module: nothing traced would hold it.

    Raises:
        TraceError: Global module hooks are registered.
    """
    name = type(model).__name__
    if hooks._has_any_global_hook():  # type: ignore[no-untyped-call]
        raise TraceError(
            f"{name} cannot be traced while global module hooks are registered "
            "(register_module_forward_hook and its like): the graph would not hold what they do; "
            "remove them"
        )


def is_stock(module: nn.Module) -> bool:
    """Tell whether calling ``module`` is the forward of its stock class and nothing else.

    1. No hook hangs on it.
    2. No attribute of its own hides one of its class (a patched ``forward``, a compiled call).
    3. No subclass defines what a call uses: a method of the stock class, a property, or a name
       under which the instance holds a tensor.
    """
    stock = leaf_class(module)
    if stock is None or any(getattr(module, registry) for registry in HOOKS):
        return False
    if any(hasattr(stock, name) for name in vars(module)):
        return False
    subclasses = type(module).__mro__[: type(module).__mro__.index(stock)]
    return not any(
        _is_used(name, value, module, stock)
        for subclass in subclasses
        for name, value in vars(subclass).items()
    )


def _is_used(name: str, value: object, module: nn.Module, stock: type[nn.Module]) -> bool:
    """Tell whether a call may meet the attribute ``name`` of a subclass of ``stock``."""
    if name.startswith("__"):
        return name in ("__call__", "__getattr__", "__getattribute__")
    registries = (module._parameters, module._buffers, module._modules)
    return (
        (hasattr(stock, name) and name not in _NOT_CALLED)
        or hasattr(type(value), "__set__")
        or any(name in registry for registry in registries)
    )


def whole_layer(module: nn.Module, nodes: Sequence[fx.Node]) -> nn.Module | None:
    """Return the layer whose call is ``nodes``, all that one call of a stock module computes.

    ``module`` itself, or a copy where its sizes are not those of its weight (one that was put in
    its place): the forward does not read them, but others do.

    Args:
        module: A stock module.
        nodes: ATen nodes of one call of ``module``, without assertions.

    Returns:
        None if the call was made with more than its input.
    """
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # input, weight, bias, stride, padding, output_padding: a call may ask for another size
        rank = len(module.kernel_size)
        expected = _per_axis(module.output_padding, rank)
        paddings = [node.args[5] if len(node.args) > 5 else 0 for node in nodes]
        if any(_per_axis(padding, rank) != expected for padding in paddings):
            return None
    wrong = {n: v for n, v in _sizes(module).items() if getattr(module, n) != v}
    if not wrong:
        return module
    clone: nn.Module = shallow_clone(module)
    clone.__dict__.update(wrong)
    return clone


def proven_layer(
    module: nn.Module, node: fx.Node, tensor_of: Callable[[object], torch.Tensor | None]
) -> nn.Module | None:
    """Return the stock layer that ``node`` is a call of, or None if it is no such call.

    The node must be the operator of a convolution or linear layer on the very weight of ``module``
    and its bias or none. The layer shares them and has the node's settings, whatever ``module``
    says; the node's input is the layer's.

    Args:
        module: A leaf module (``leaf_class`` is not None).
        node: Any node of the exported graph.
        tensor_of: The parameter, buffer or constant that an argument stands for, or None.
    """
    stock = leaf_class(module)
    if stock is None or _OPERATORS.get(node.target) is not stock or node.kwargs:
        return None
    weight, bias = (_argument(node, position, tensor_of) for position in (1, 2))
    parameters: Mapping[str, torch.Tensor | None] = module._parameters
    if weight is None or weight is not parameters.get("weight"):
        return None
    has_bias = len(node.args) > 2 and node.args[2] is not None
    if has_bias and (bias is None or bias is not parameters.get("bias")):
        return None
    settings = {} if stock is nn.Linear else _settings(node, weight.dim() - 2)
    return None if settings is None else _stock_layer(stock, weight, bias, settings)


def same_settings(a: nn.Module, b: nn.Module) -> bool:
    """Tell whether two modules of one stock class with one weight compute the same."""
    names = () if isinstance(a, nn.Linear) else (*_SETTINGS, "padding_mode")
    return (a.bias is b.bias) and all(getattr(a, name) == getattr(b, name) for name in names)


def _argument(
    node: fx.Node, position: int, tensor_of: Callable[[object], torch.Tensor | None]
) -> torch.Tensor | None:
    return tensor_of(node.args[position]) if len(node.args) > position else None


def _settings(node: fx.Node, rank: int) -> dict[str, Any] | None:
    """Settings of a convolution's node as its module holds them; None if one is no constant."""
    settings = {}
    for position, (name, default) in enumerate(_SETTINGS.items(), start=3):
        if name == "padding" and str(node.target).endswith(".padding"):
            default = "valid"  # the operator's own; torch.export leaves defaults out
        value = node.args[position] if len(node.args) > position else default
        if name != "groups" and not isinstance(value, str):
            value = _per_axis(value, rank)
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, int | str) for part in parts):
            return None
        settings[name] = value
    return settings


def _per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * rank if len(values) == 1 else values


def _stock_layer(
    stock: type[nn.Module],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    settings: Mapping[str, Any],
) -> nn.Module:
    """A layer as its constructor makes it, on these very tensors."""
    outputs, inputs, *kernel = weight.shape
    sizes: tuple[Any, ...] = (inputs, outputs)
    if kernel:
        sizes = (inputs * settings["groups"], outputs, tuple(kernel))
    layer = stock(*sizes, bias=bias is not None, device="meta", dtype=weight.dtype, **settings)
    layer._parameters.update(weight=weight, bias=bias)  # type: ignore[call-overload]
    layer.training = False
    return layer


def _sizes(module: nn.Module) -> dict[str, Any]:
    """What a layer's attributes should say of its weight; the forward does not read them."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and weight is not None:
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, _CONVOLUTIONS) and weight is not None:
        return {
            "out_channels": weight.shape[0],
            "in_channels": weight.shape[1] * module.groups,
            "kernel_size": tuple(weight.shape[2:]),
        }
    return {}
