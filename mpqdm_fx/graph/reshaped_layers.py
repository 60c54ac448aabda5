"""Layers that compute what others do with their weights in another shape."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

__all__ = ["ROUNDED_BUFFERS", "with_numbers_of"]

#: What a rounded layer holds beside its weight and bias.
ROUNDED_BUFFERS = frozenset({"weight_codes", "weight_scale"})

_Layer = TypeVar("_Layer", bound=nn.Module)


def with_numbers_of(
    source: nn.Module, layer: _Layer, reshaped: Callable[[Tensor], Tensor]
) -> _Layer:
    """Give a layer the weight, the bias, and the integers and scales of another one.

    Args:
        source: Has no buffers but `ROUNDED_BUFFERS`.
        layer: Of the same rows, without a bias; its weight is replaced.
        reshaped: Brings the weight, and its integers, to the layer's shape; rows stay the first
            axis.

    Returns:
        The layer.
    """
    weight, bias = source.weight, source.bias
    assert isinstance(weight, Tensor)
    layer.weight = nn.Parameter(reshaped(weight.detach()), requires_grad=weight.requires_grad)
    if isinstance(bias, Tensor):
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    layer.train(source.training)
    for name, buffer in source._buffers.items():
        assert buffer is not None
        layer.register_buffer(name, reshaped(buffer) if name == "weight_codes" else buffer)
    return layer
