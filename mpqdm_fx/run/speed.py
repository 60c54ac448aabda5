"""How long a program of a graph takes, layer by layer and by kind of activation, relatively.

The unit is one multiply-add of a float convolution. Rates are those of XNNPACK with two threads on
an x86 core with VNNI, fitted to the programs of a UNet of 27 M parameters (`benchmarks/phone.py`:
66 ms in float, 29 ms static, 25 ms dynamic); Arm cores with dot products have about the same
proportions. They are for choosing between layers, not for promising milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
from torch import fx

from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.records.report import ActivationKind
from mpqdm_fx.run.cost import elements, node_cost, products

__all__ = ["InputOption", "layer_time", "other_time", "weight_bytes"]


@dataclass(frozen=True, kw_only=True)
class InputOption:
    """One way to treat what a layer reads.

    Attributes:
        kind: How it is quantized.
        bits: Width of its codes, where that is chosen; None for what the settings say.
        exponent: How far its channels are brought to one size before (`passes.ScaleInputs`): 0 not
            at all, 1 wholly.
    """

    kind: ActivationKind
    bits: int | None = None
    exponent: float = 0.0

    @property
    def is_fixed(self) -> bool:
        """Whether ranges are found beforehand."""
        return self.kind in ("static", "timestep")


_Sizes = Mapping[sympy.Symbol, int]

_INT8_PRODUCT = 0.25
_QUANTIZE = 50  # an element that is read and rounded, or written and restored
_ELEMENT = 40  # an element of what works element by element
_WEIGHT_BYTE = 10  # a byte of weights that is fetched
_BYTES: Mapping[ActivationKind, int] = {"float": 4, "static": 1, "timestep": 1, "dynamic": 1}


def layer_time(
    graph_module: fx.GraphModule, layer: WeightLayer, option: InputOption, sizes: _Sizes
) -> float:
    """Time of all calls of a weight layer.

    Args:
        graph_module: Its graph.
        layer: The layer.
        option: How its input is treated.
        sizes: Symbols of the graph's shapes; see `cost.bind_sizes`.
    """
    total = 0.0
    for call in layer.nodes:
        multiplications = node_cost(graph_module, call, sizes)
        source = call.args[0]
        assert isinstance(source, fx.Node)
        read = elements(source, sizes)
        if option.kind == "float":
            total += multiplications
            continue
        total += _INT8_PRODUCT * multiplications + _QUANTIZE * read
        if option.is_fixed:
            total += _QUANTIZE * elements(call, sizes)
        if option.exponent:
            total += _ELEMENT * read
    return total + _WEIGHT_BYTE * weight_bytes(layer, option) * len(layer.nodes)


def weight_bytes(layer: WeightLayer, option: InputOption) -> int:
    """Bytes of a layer's weights in a program: int8 kernels have int8 weights, float ones float."""
    return layer.weight.numel() * _BYTES[option.kind]


def other_time(graph_module: fx.GraphModule, sizes: _Sizes) -> float:
    """Time of all that is no weight layer; see `layer_time`."""
    calls = {call for layer in weight_layers(graph_module).values() for call in layer.nodes}
    total = 0.0
    for node in graph_module.graph.nodes:
        if node in calls or node.op not in ("call_function", "call_module"):
            continue
        multiplications = products(graph_module, node, sizes)
        if multiplications is None:
            cost = node_cost(graph_module, node, sizes)
            total += _ELEMENT * cost if cost > 1 else 0  # views are free
        else:
            total += multiplications
    return total
