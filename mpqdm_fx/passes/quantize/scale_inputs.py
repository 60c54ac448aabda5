"""Bring the channels that a layer reads to one size, and its weights the other way.

`W x = (W s) (x / s)` for any positive s per input channel (SmoothQuant, arXiv 2211.10438, equation
3). One range for all channels then wastes fewer codes on the small ones: where a few channels are
10 to 100 times larger than the others, that is most of what 8 bits lose. Padding with zeros stays
padding with zeros. With powers of two as factors nothing is rounded, so the function is the same
to the last bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import (
    add_tensor,
    insert_call,
    keep_fetched,
    replace_module,
    shallow_clone,
)
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.numerics.solve.outliers import power_of_two
from mpqdm_fx.passes.base import GraphPass

__all__ = ["SCALES", "ScaleInputs", "factors_of", "is_scaled"]

_aten = torch.ops.aten

SCALES = "input_scales"
"""Where a graph keeps the inverse factors, by layer name."""


@dataclass(frozen=True, kw_only=True)
class ScaleInputs(GraphPass):
    """Divide what layers read by a factor per channel, and multiply their weights by it.

    1. Every call of a named layer reads the product of its input with the inverse factors, which
       are a buffer `input_scales.<layer>` [C, 1, ...] (of a linear layer [C]).
    2. Calls that read one value with the same factors share the product.
    3. A layer whose inverse factors are in the graph already is left alone.

    Attributes:
        factors: Factor of each input channel, float [C], by layer; powers of two.
    """

    factors: Mapping[str, Tensor]

    tolerance: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Refuse factors that would round.

        Raises:
            DialectError: A factor is no power of two.
        """
        super().__post_init__()
        for name, factor in self.factors.items():
            finite = bool((factor.isfinite() & factor.reciprocal().isfinite()).all())
            if not finite or not torch.equal(factor, power_of_two(factor)):
                raise DialectError(f"{name}: factors of its input are powers of two")

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Return the pass on all weight layers, and on none."""
        factors = {
            name: 2.0 ** (torch.arange(_channels(layer)) % 5 - 2)
            for name, layer in weight_layers(graph_module).items()
        }
        return (cls(factors=factors), cls(factors={}))

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every named layer is there, with as many input channels as factors.

        Raises:
            DialectError: One is not.
        """
        layers = weight_layers(graph_module)
        for name, factor in self.factors.items():
            if name not in layers:
                raise DialectError(f"factors name {name!r}, which is no weight layer of this graph")
            if factor.shape != (_channels(layers[name]),):
                raise DialectError(
                    f"{name}: it reads {_channels(layers[name])} channels, and has factors of "
                    f"shape {tuple(factor.shape)}"
                )

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Insert the products; False if all of them are there."""
        layers = weight_layers(graph_module)
        factors = {
            name: factor.float()
            for name, factor in self.factors.items()
            if not all(is_scaled(call) for call in layers[name].nodes)
        }
        names = {call: name for name in factors for call in layers[name].nodes}
        products: dict[tuple[fx.Node, bytes], fx.Node] = {}
        for call in [node for node in graph_module.graph.nodes if node in names]:
            name, source = names[call], call.args[0]
            assert isinstance(source, fx.Node)
            inverse = factors[name].reciprocal().view(-1, *[1] * (layers[name].weight.dim() - 2))
            key = (source, inverse.numpy().tobytes() + bytes(inverse.dim()))
            if key not in products:
                attribute = add_tensor(graph_module, f"{SCALES}.{name}", inverse, anchor=call)
                args = (source, attribute)
                products[key] = insert_call(graph_module, _aten.mul.Tensor, args, anchor=call)
            call.update_arg(0, products[key])
        for name, factor in factors.items():
            keep_fetched(graph_module, name)
            replace_module(graph_module, name, _multiplied(layers[name], factor))
        return bool(factors)


def is_scaled(call: fx.Node) -> bool:
    """Whether a weight layer's call reads the product with inverse factors."""
    product = call.args[0]
    if not isinstance(product, fx.Node) or product.target is not _aten.mul.Tensor:
        return False
    attribute = product.args[1]
    return (
        isinstance(attribute, fx.Node)
        and attribute.op == "get_attr"
        and str(attribute.target).startswith(f"{SCALES}.")
    )


def factors_of(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """Factors of a graph's scaled inputs by layer: with them its float model gets the same form.

    Args:
        graph_module: A graph after `ScaleInputs`, rounded or not.
    """
    factors = {}
    for name, layer in weight_layers(graph_module).items():
        if is_scaled(layer.nodes[0]):
            attribute = layer.nodes[0].args[0].args[1]  # type: ignore[union-attr]
            inverse = graph_module.get_buffer(str(attribute.target))  # type: ignore[union-attr]
            factors[name] = inverse.detach().float().reciprocal().flatten().cpu()
    return factors


def _channels(layer: WeightLayer) -> int:
    return layer.weight.shape[1] * int(getattr(layer.module, "groups", 1))


def _multiplied(layer: WeightLayer, factor: Tensor) -> nn.Module:
    """A copy of a layer, its weights multiplied by the factor of their input channel."""
    weight = layer.weight.detach()
    groups = int(getattr(layer.module, "groups", 1))
    factors = factor.to(weight).view(groups, 1, -1, *[1] * (weight.dim() - 2))
    wide = (weight.view(groups, -1, *weight.shape[1:]) * factors).view_as(weight)
    clone = shallow_clone(layer.module)
    clone._parameters = {
        **layer.module._parameters,
        "weight": nn.Parameter(wide.contiguous(), requires_grad=layer.weight.requires_grad),
    }
    return clone
