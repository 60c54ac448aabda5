"""Insert static per-tensor q/dq pairs at the inputs and outputs of weight layers.

Static int8 kernels (torch.ao's and XNNPACK's alike) read integers and write integers: a layer's
input and its output both have a fixed scale and zero point. Which value gets which pair is decided
in `activation_sites`, once for this pass, for torch.ao and for PT2E; so all doors round the same
values at the same places.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import fx

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.base import GraphPass
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.qdq import insert_pair, is_dequantize, is_quantize
from mpqdm_fx.plan import ActivationRange, LayerActivation

__all__ = ["ActivationSite", "QuantizeActivations", "activation_sites", "is_quantized_call"]


@dataclass(frozen=True, kw_only=True)
class ActivationSite:
    """One value that is quantized, with what range and for whom.

    Attributes:
        value: Node that produces the value.
        range: Its quantization; the scale is a float32 number, as every backend stores it.
        calls: Weight-layer calls that read the quantized value; None if all users do.
        layer: Name of the layer that the range belongs to.
    """

    value: fx.Node
    range: ActivationRange
    calls: tuple[fx.Node, ...] | None
    layer: str


def activation_sites(
    calls: Mapping[fx.Node, str], ranges: Mapping[str, LayerActivation]
) -> list[ActivationSite]:
    """Decide which values are quantized.

    1. A call's output is quantized with its layer's output range, for all its users.
    2. A call's input is quantized for the weight-layer calls that read it, and for nobody else:
       norms and residual sums keep the float value. Calls that ask for the same width share one
       pair, with the range of the first of them (`to_q`, `to_k` and `to_v` have one input).
    3. A value that is the output of one call and the input of another gets one pair: the output
       range, or the input range where that is narrower and nobody else reads the value. If others
       do, they read the output pair, and the narrower pair follows it.

    Rules 2 and 3 at equal widths are what `prepare_fx` and `prepare_pt2e` do: they share an
    observer between an output and an input of the same dtype and code range.

    Args:
        calls: Weight-layer calls in graph order, with their layer's name; `args[0]` is the input.
            Module-level calls or aten ops.
        ranges: Ranges by layer name; calls of other layers stay in float.

    Returns:
        Sites in graph order of their values; of one value, the one for all users first.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    written: dict[fx.Node, LayerActivation] = {}
    for call, name in calls.items():
        if name in ranges:
            value = call.args[0]
            assert isinstance(value, fx.Node)
            readers.setdefault(value, []).append(call)
            written[call] = ranges[name]
    if not written:
        return []

    sites = []
    for value in _in_graph_order([*readers, *written]):
        output = written[value].output if value in written else None
        narrow: dict[int, list[fx.Node]] = {}
        for call in readers.get(value, ()):
            bits = written[call].input.bits
            if output is None or bits < output.bits:
                narrow.setdefault(bits, []).append(call)
        if output is not None and {c for group in narrow.values() for c in group} != {*value.users}:
            sites.append(_site(value, output, None, calls[value]))
        for group in narrow.values():
            first = calls[group[0]]
            sites.append(_site(value, ranges[first].input, tuple(group), first))
    return sites


def _site(
    value: fx.Node, chosen: ActivationRange, calls: tuple[fx.Node, ...] | None, layer: str
) -> ActivationSite:
    scale = float(torch.tensor(chosen.scale, dtype=torch.float32))
    chosen = dataclasses.replace(chosen, scale=scale)
    return ActivationSite(value=value, range=chosen, calls=calls, layer=layer)


def _in_graph_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    wanted = set(nodes)
    graph = next(iter(wanted)).graph
    return [node for node in graph.nodes if node in wanted]


@dataclass(frozen=True, kw_only=True)
class QuantizeActivations(GraphPass):
    """Insert `quantized_decomposed` quantize/dequantize pairs around weight layers.

    1. The values are those of `activation_sites`.
    2. An input-side pair serves the weight-layer calls of its value; all other users keep the
       float value. An output-side pair replaces all uses of the output.
    3. Codes are int8, within the `bits` of the range: `-2**(bits-1)..2**(bits-1)-1`.
    4. A graph whose named layers all have their pairs already is left alone.

    Attributes:
        ranges: Input and output range by weight-layer name. Layers without an entry stay in float.
    """

    ranges: Mapping[str, LayerActivation]

    preserves_function: ClassVar[bool] = False

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Return the pass at 8 and 4 bits on every weight layer, and on none."""
        layers = weight_layers(graph_module)

        def ranges(bits: int) -> dict[str, LayerActivation]:
            one = ActivationRange(scale=8.0 / 2**bits, zero_point=0, bits=bits)
            return {name: LayerActivation(input=one, output=one) for name in layers}

        return (cls(ranges=ranges(8)), cls(ranges=ranges(4)), cls(ranges={}))

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every layer with a range is a weight layer of the graph, and all or none have pairs.

        Raises:
            DialectError: One is not, or some layers have pairs and others none.
        """
        layers = weight_layers(graph_module)
        for name in self.ranges:
            if name not in layers:
                raise DialectError(
                    f"ranges name {name!r}, which is no convolution or linear layer of this graph; "
                    f"collect ranges on the graph that is quantized"
                )

        done = [is_quantized_call(node) for node in self._calls(graph_module)]
        if any(done) and not all(done):
            raise DialectError(
                "some of the named layers already read and write quantized values; quantize the "
                "activations of all layers at once, on the graph with float activations"
            )

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Insert the pairs; False if nothing was to be inserted."""
        calls = self._calls(graph_module)
        if all(is_quantized_call(node) for node in calls):
            return False
        latest: dict[fx.Node, fx.Node] = {}
        for site in activation_sites(calls, self.ranges):
            source = latest.get(site.value, site.value)
            users = [u for u in source.users if site.calls is None or u in site.calls]
            restored = insert_pair(graph_module, source, _parameters(site.range))
            for user in users:
                user.replace_input_with(source, restored)
            if site.calls is None:
                latest[site.value] = restored
        return True

    def _calls(self, graph_module: fx.GraphModule) -> dict[fx.Node, str]:
        """Calls of the named layers, in graph order."""
        layers = weight_layers(graph_module)
        names = {n: name for name in self.ranges if name in layers for n in layers[name].nodes}
        return {node: names[node] for node in graph_module.graph.nodes if node in names}


def is_quantized_call(call: fx.Node) -> bool:
    """Whether a weight-layer call reads a dequantized value and only quantized ones are read of it.

    Args:
        call: A call with its input as `args[0]`.
    """
    source = call.args[0]
    assert isinstance(source, fx.Node)
    return is_dequantize(source) and all(is_quantize(user) for user in call.users)


def _parameters(chosen: ActivationRange) -> tuple[Any, ...]:
    limits = (chosen.quant_min, chosen.quant_max)
    return (chosen.scale, chosen.zero_point, *limits, torch.int8)
