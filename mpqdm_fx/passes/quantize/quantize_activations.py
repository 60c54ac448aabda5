"""Quantize what weight layers read and write: fixed ranges, ranges by noise level, or dynamic ones.

Static int8 kernels (torch.ao's and XNNPACK's alike) read integers and write integers: a layer's
input and its output both have a fixed scale and zero point. Which value gets which pair is decided
in `activation_sites`, once for this pass, for torch.ao and for PT2E; so all doors round the same
values at the same places. Ranges by noise level sit at the same places. Dynamic kernels round what
a layer reads and write floats.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import fx

from mpqdm_fx.errors import ConfigError, DialectError
from mpqdm_fx.graph.layers import called_module, weight_layers
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.graph.qdq import insert_pair, is_dequantize, is_quantize
from mpqdm_fx.graph.quantizer_sites import (
    follows_batch,
    insert_groups,
    insert_quantizer,
    row_axes,
)
from mpqdm_fx.graph.quantizers import FIXED_QUANTIZERS, DynamicQuantizer, fixed_quantizer
from mpqdm_fx.passes.base import GraphPass
from mpqdm_fx.records.activations import (
    Activation,
    ActivationRange,
    DynamicActivation,
    NoiseLevels,
    Side,
    StaticActivation,
    TimestepActivation,
)

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

    @property
    def side(self) -> Side:
        """Whether the range is that of the layer's input or of its output."""
        return "output" if self.calls is None else "input"


def activation_sites(
    calls: Mapping[fx.Node, str], ranges: Mapping[str, StaticActivation]
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
    written: dict[fx.Node, StaticActivation] = {}
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
    members = set(nodes)
    graph = next(iter(members)).graph
    return [node for node in graph.nodes if node in members]


@dataclass(frozen=True, kw_only=True)
class QuantizeActivations(GraphPass):
    """Insert quantizers around weight layers.

    1. Layers with a `StaticActivation` get `quantized_decomposed` quantize/dequantize pairs at the
       values of `activation_sites`. An input-side pair serves the weight-layer calls of its value;
       all other users keep the float value. An output-side pair replaces all uses of the output.
       Codes are int8, within the `bits` of the range: `-2**(bits-1)..2**(bits-1)-1`. A range with
       fitted levels gets a `CodebookQuantizer` there.
    2. Layers with a `TimestepActivation` get a `NoiseLevelQuantizer` (or, with fitted levels, a
       `CodebookQuantizer`) at those same values. One
       `NoiseLevelGroups` node reads the noise levels for all of them. A value that does not
       follow the batch (a constant) cannot depend on the noise level: it gets a pair, with the
       first group's range.
    3. Layers with a `DynamicActivation` read a `DynamicQuantizer`; their outputs stay float. Calls
       of one width and granularity that read one value share it: a range per sample for
       convolutions, per row for linear layers, per pixel for 1x1 convolutions (`row_axes`).
    4. A graph whose named layers all have quantizers already, of whatever mode, is left alone.

    `graph.quantizer_sites` finds the quantizers again and sets their ranges.

    Attributes:
        ranges: Activation by weight-layer name. Layers without an entry stay in float.
        noise_levels: What the groups of every `TimestepActivation` are.
    """

    ranges: Mapping[str, Activation]
    noise_levels: NoiseLevels | None = None

    preserves_function: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse ranges by noise level that do not fit the noise levels.

        Raises:
            ConfigError: There are none, or a layer has another number of groups.
        """
        super().__post_init__()
        for name, activation in self.ranges.items():
            if not isinstance(activation, TimestepActivation):
                continue
            if self.noise_levels is None:
                raise ConfigError(
                    f"{name}: it has ranges by noise level; give the pass `noise_levels` too"
                )
            if len(activation.groups) != self.noise_levels.count:
                raise ConfigError(
                    f"{name}: it has ranges for {len(activation.groups)} groups of noise levels, "
                    f"and `noise_levels` has {self.noise_levels.count} groups"
                )

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Return every mode on all weight layers, none, and all modes side by side."""
        layers = weight_layers(graph_module)

        def static(bits: int, zero_point: int = 0) -> StaticActivation:
            grid = ActivationRange(scale=8.0 / 2**bits, zero_point=zero_point, bits=bits)
            return StaticActivation(input=grid, output=grid)

        table = ActivationRange(scale=0.25, zero_point=0, bits=3, levels=(-9, -3, -1, 0, 1, 4, 11))
        fitted = StaticActivation(input=table, output=static(8).output)
        kinds: list[Activation] = [static(8), static(4), fitted, DynamicActivation(bits=8)]
        levels = None
        if find_noise_argument(graph_module) is not None:
            levels = NoiseLevels(boundaries=(2.5, 6.0))
            kinds.append(TimestepActivation(groups=(static(8), static(8, 3), static(8, -5))))
            other = dataclasses.replace(table, scale=0.5, levels=(-5, 0, 2, 7))
            kinds.append(
                TimestepActivation(
                    groups=(fitted, dataclasses.replace(fitted, input=other), fitted)
                )
            )
        mixed = {name: kinds[index % len(kinds)] for index, name in enumerate(layers)}
        same = [cls(ranges=dict.fromkeys(layers, kind), noise_levels=levels) for kind in kinds]
        return (*same, cls(ranges={}), cls(ranges=mixed, noise_levels=levels))

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every layer with a range is a weight layer of the graph, and all or none are quantized.

        Raises:
            DialectError: One is not, or some layers have quantizers and others none; or ranges by
                noise level are asked of a graph that is told none.
            ConfigError: It takes no argument of the name that the noise levels have.
        """
        layers = weight_layers(graph_module)
        for name in self.ranges:
            if name not in layers:
                raise DialectError(
                    f"ranges name {name!r}, which is no convolution or linear layer of this graph; "
                    f"collect ranges on the graph that is quantized"
                )
        by_level = any(isinstance(a, TimestepActivation) for a in self.ranges.values())
        if by_level and self._noise_argument(graph_module) is None:
            arguments = [str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")]
            raise DialectError(
                f"ranges by noise level need an argument `timestep` of shape [batch], or another "
                f"that `noise_argument` names, and this graph takes ({', '.join(arguments)}); use "
                f"activation_mode='static' or 'dynamic'"
            )
        quantized = [is_quantized_call(graph_module, call) for call in self._calls(graph_module)]
        if any(quantized) and not all(quantized):
            raise DialectError(
                "some of the named layers already read and write quantized values; quantize the "
                "activations of all layers at once, on the graph with float activations"
            )

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Insert the quantizers; False if nothing was to be inserted."""
        calls = self._calls(graph_module)
        if all(is_quantized_call(graph_module, call) for call in calls):
            return False
        self._insert_fixed(graph_module, calls)
        self._insert_dynamic(graph_module, calls)
        return True

    def _insert_fixed(self, graph_module: fx.GraphModule, calls: Mapping[fx.Node, str]) -> None:
        """Insert static pairs and quantizers by noise level."""
        # Where they sit depends on the widths alone, which are the same in all groups.
        widths = {
            name: activation.groups[0] if isinstance(activation, TimestepActivation) else activation
            for name, activation in self.ranges.items()
            if not isinstance(activation, DynamicActivation)
        }
        latest: dict[fx.Node, fx.Node] = {}
        argument, groups = self._noise_argument(graph_module), None
        for site in activation_sites(calls, widths):
            source = latest.get(site.value, site.value)
            users = [u for u in source.users if site.calls is None or u in site.calls]
            activation = self.ranges[site.layer]
            follows = argument is not None and follows_batch(source, argument)
            if isinstance(activation, TimestepActivation) and follows:
                if groups is None:
                    assert self.noise_levels is not None
                    groups = insert_groups(graph_module, self.noise_levels)
                module = fixed_quantizer(activation.ranges(site.side))
                name = f"{site.layer}.{site.side}"
                restored = insert_quantizer(graph_module, module, source, name, groups)
            elif site.range.levels:
                module, name = fixed_quantizer([site.range]), f"{site.layer}.{site.side}"
                restored = insert_quantizer(graph_module, module, source, name)
            else:
                restored = insert_pair(graph_module, source, _parameters(site.range))
            for user in users:
                user.replace_input_with(source, restored)
            if site.calls is None:
                latest[site.value] = restored

    def _noise_argument(self, graph_module: fx.GraphModule) -> fx.Node | None:
        named = self.noise_levels.argument if self.noise_levels else None
        return find_noise_argument(graph_module, named)

    def _insert_dynamic(self, graph_module: fx.GraphModule, calls: Mapping[fx.Node, str]) -> None:
        shared: dict[tuple[fx.Node, int, int | tuple[int, ...]], fx.Node] = {}
        for call, name in calls.items():
            activation = self.ranges[name]
            if not isinstance(activation, DynamicActivation):
                continue
            source = call.args[0]
            assert isinstance(source, fx.Node)
            axes = row_axes(graph_module.get_submodule(str(call.target)))
            key = (source, activation.bits, axes)
            if key not in shared:
                module = DynamicQuantizer(activation.bits, axes)
                shared[key] = insert_quantizer(graph_module, module, source, f"{name}.input")
            call.update_arg(0, shared[key])

    def _calls(self, graph_module: fx.GraphModule) -> dict[fx.Node, str]:
        """Calls of the named layers, in graph order."""
        layers = weight_layers(graph_module)
        names = {n: name for name in self.ranges if name in layers for n in layers[name].nodes}
        return {node: names[node] for node in graph_module.graph.nodes if node in names}


def is_quantized_call(graph_module: fx.GraphModule, call: fx.Node) -> bool:
    """Whether a weight-layer call is quantized, in whatever mode.

    It reads a dynamic quantizer; or it reads a fixed range and only quantizers read its output.

    Args:
        graph_module: The call's graph.
        call: A call with its input as `args[0]`.
    """

    def is_fixed(node: object) -> bool:
        return called_module(graph_module, node, *FIXED_QUANTIZERS) is not None

    source = call.args[0]
    assert isinstance(source, fx.Node)
    if called_module(graph_module, source, DynamicQuantizer) is not None:
        return True
    reads = is_dequantize(source) or is_fixed(source)
    return reads and all(is_quantize(user) or is_fixed(user) for user in call.users)


def _parameters(chosen: ActivationRange) -> tuple[Any, ...]:
    limits = (chosen.quant_min, chosen.quant_max)
    return (chosen.scale, chosen.zero_point, *limits, torch.int8)
