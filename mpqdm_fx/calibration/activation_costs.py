"""What rounding the input of each weight layer does to the model's output, by kind of quantizer.

To first order the error e of a value changes the output by J e, and E_v <v, J e>^2 = |J e|^2 for
random signs v. `<v, J e>` is the sum over a sample's positions of gradient times error, from the
backward pass that `probes` makes anyway. The square is taken after that sum: errors of a coarse
step are systematic, and the sum of squares, which takes them as independent, is 3 to 90 times too
small for them. Errors of different values are taken as independent.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from mpqdm_fx.activations import OUTPUT_BITS, ActivationRange
from mpqdm_fx.calibration.ranges import search_static
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.quantizer_sites import row_axes
from mpqdm_fx.graph.speed import ActivationKind
from mpqdm_fx.graph.walk import Walk
from mpqdm_fx.numerics.dynamic import fake_quantize_dynamic
from mpqdm_fx.numerics.ranges import fake_quantize

__all__ = ["ActivationCosts"]

_RANGE_VALUES = 2**13  # numbers that a range is searched on, for its cost alone


class ActivationCosts:
    """Costs of the inputs of all weight layers; a `GradientWatch` of `output_energies`.

    Args:
        graph_module: Normalized float graph.
        calls: Calibration calls, for static ranges.
        settings: Widths and seed.
        kinds: What is to be measured.

    Attributes:
        units: Layers that share an input, directly or through others, and so get one kind: by name
            of the first of them in graph order.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        calls: Sequence[Mapping[str, Any]],
        settings: MPQConfig,
        kinds: Sequence[ActivationKind],
    ) -> None:
        layers = weight_layers(graph_module)
        self._layer_of = {node.name: name for name, layer in layers.items() for node in layer.nodes}
        self._kind_of = {
            name: (settings.activation_bits_of(name), row_axes(layer.module))
            for name, layer in layers.items()
        }
        self.units = _units(graph_module, self._layer_of, self._kind_of)
        self._unit_of = {name: unit for unit, names in self.units.items() for name in names}
        self._kinds = [kind for kind in kinds if kind != "float"]
        self._sums = {unit: dict.fromkeys(kinds, 0.0) for unit in self.units}
        self._shown = 0
        self._ranges: dict[tuple[str, str], ActivationRange] = {}
        if "static" in kinds:
            self._ranges = _static_ranges(graph_module, calls, settings)

    def costs(self, samples: int, probes: int) -> dict[str, dict[ActivationKind, float]]:
        """Squared error of the model's output by unit and kind, mean over samples.

        Args:
            samples: Samples that were shown.
            probes: Random directions of each.
        """
        scale = 1.0 / (samples * probes)
        return {
            unit: {kind: total * scale for kind, total in sums.items()}  # type: ignore[misc]
            for unit, sums in self._sums.items()
        }

    def kind(self, call: fx.Node) -> Hashable:
        """Calls of one width and granularity that read one value share a quantizer."""
        return self._kind_of[self._layer_of[call.name]]

    def inputs(self, call: fx.Node, x: Tensor, gradient: Tensor, samples: int) -> None:
        """Add what rounding a value does to the output for its readers."""
        bits, axes = self._kind_of[self._layer_of[call.name]]
        for kind in self._kinds:
            if kind == "dynamic":
                self._add(call, kind, fake_quantize_dynamic(x, bits, axes) - x, gradient, samples)
            else:
                self._add(call, kind, self._static_error(call, "input", x), gradient, samples)

    def outputs(self, call: fx.Node, y: Tensor, gradient: Tensor, samples: int) -> None:
        """Add what rounding an output does: static layers write integers."""
        if "static" in self._kinds:
            self._add(call, "static", self._static_error(call, "output", y), gradient, samples)

    def _static_error(self, call: fx.Node, side: str, value: Tensor) -> Tensor:
        chosen = self._ranges[call.name, side]
        return fake_quantize(value, chosen.scale, chosen.zero_point, chosen.bits) - value

    def _add(
        self, call: fx.Node, kind: ActivationKind, error: Tensor, gradient: Tensor, samples: int
    ) -> None:
        product = (gradient * error).double()
        rows = samples if len(product) % samples == 0 else 1
        changes = product.reshape(rows, -1).sum(dim=1)
        unit = self._unit_of[self._layer_of[call.name]]
        self._sums[unit][kind] += float(changes.square().sum())


def _units(
    graph_module: fx.GraphModule,
    layer_of: Mapping[str, str],
    kind_of: Mapping[str, Hashable],
) -> dict[str, tuple[str, ...]]:
    """Layers that have to be quantized alike, because they share a quantizer."""
    first_reader: dict[tuple[fx.Node, Hashable], str] = {}
    unit_of: dict[str, str] = {}

    def root(name: str) -> str:
        while unit_of[name] != name:
            name = unit_of[name]
        return name

    for node in graph_module.graph.nodes:
        name = layer_of.get(node.name)
        if name is None:
            continue
        unit_of.setdefault(name, name)
        first = first_reader.setdefault((node.args[0], kind_of[name]), name)
        unit_of[root(name)] = root(first)
    units: dict[str, list[str]] = {}
    for name in unit_of:
        units.setdefault(root(name), []).append(name)
    return {names[0]: tuple(names) for names in units.values()}


def _static_ranges(
    graph_module: fx.GraphModule, calls: Sequence[Mapping[str, Any]], settings: MPQConfig
) -> dict[tuple[str, str], ActivationRange]:
    """Range of what each call reads and writes, by the call's name and the side."""
    layers = weight_layers(graph_module)
    layer_of = {node: name for name, layer in layers.items() for node in layer.nodes}
    found: dict[tuple[str, str], ActivationRange] = {}
    walk = Walk(graph_module, calls, progress="ranges")

    def search(node: fx.Node, bits: int) -> ActivationRange:
        return search_static(walk.values(node), bits, settings.seed, limit=_RANGE_VALUES)

    written: fx.Node | None = None
    for node in walk:
        if written is not None and written in walk.alive:
            found[written.name, "output"] = search(written, OUTPUT_BITS)
        written = None
        if node in layer_of:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            found[node.name, "input"] = search(source, settings.activation_bits_of(layer_of[node]))
            written = node
    return found
