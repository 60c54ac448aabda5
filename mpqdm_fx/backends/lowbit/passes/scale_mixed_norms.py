"""Let own group norms multiply their channels by the factors that a layer behind them wants."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

import mpqdm_fx.backends.lowbit.ops  # noqa: F401 - registers the operators
from mpqdm_fx.graph.editing import add_tensor
from mpqdm_fx.graph.nodes import static_shape
from mpqdm_fx.graph.norms import constant
from mpqdm_fx.passes.base import GraphPass

__all__ = ["ScaleMixedNorms"]

_aten = torch.ops.aten
_group_norm = torch.ops.mpqdm.group_norm_mixed.default
_FACTOR = 3  # place of the factor among a norm's arguments


@dataclass(frozen=True, kw_only=True)
class ScaleMixedNorms(GraphPass):
    """Give a `group_norm_mixed` the constants that its result is multiplied by.

    1. A product alone reads the norm, which has no factor yet, and its other factor is a constant
       with one number for each channel: channels that a layer wants scaled. A SiLU keeps them out
       of the norm's weight. The product is the same to the last bit.
    2. It comes after `MoveLayouts`: a permutation between the two hides them from each other.
    3. Norm and quantizer meet then (`FuseNormQuantize`): no image between them is stored.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Take the products away; False if there is none of the kind."""
        modified = False
        for product in list(graph_module.graph.nodes):
            if product.target is not _aten.mul.Tensor:
                continue
            for norm, other in (product.args, product.args[::-1]):
                if (factor := _channel_factor(graph_module, norm, other)) is not None:
                    _scale(graph_module, norm, product, factor)
                    modified = True
                    break
        return modified


def _channel_factor(graph_module: fx.GraphModule, norm: object, other: object) -> Tensor | None:
    """What a product multiplies a norm's channels by; None if it does something else."""
    if not isinstance(norm, fx.Node) or norm.target is not _group_norm or len(norm.users) != 1:
        return None
    shape = static_shape(other)
    while isinstance(other, fx.Node) and other.target is _aten.reshape.default:
        other = other.args[0]  # numbers keep their order
    value = constant(graph_module, other)
    known = constant(graph_module, norm.args[_FACTOR])
    assert isinstance(known, Tensor)
    if shape is None or not isinstance(value, Tensor) or value.dtype != torch.float32:
        return None
    if shape[-1:] != known.shape or value.numel() != len(known) or bool((known != 1).any()):
        return None
    return value.detach().reshape(-1)


def _scale(graph_module: fx.GraphModule, norm: fx.Node, product: fx.Node, factor: Tensor) -> None:
    name = f"{norm.name}_factor"
    norm.update_arg(_FACTOR, add_tensor(graph_module, name, factor, anchor=norm))
    product.replace_all_uses_with(norm)
    graph_module.graph.erase_node(product)
