"""What rounding the input of each weight layer does to the model's output, by kind of quantizer.

To first order the error e of a value changes the output by J e, and E_v <v, J e>^2 = |J e|^2 for
random signs v. `<v, J e>` is the sum over a sample's positions of gradient times error, from the
backward pass that `probes` makes anyway. The square is taken after that sum, over all layers that
read the same numbers: errors of a coarse step are systematic, and the sum of squares, which takes
them as independent, is 3 to 90 times too small for them. Errors of different values are taken as
independent.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.bits.channel_sizes import ChannelSizes, SeenChannels
from mpqdm_fx.calibration.ranges import RangeSamples
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.graph.quantizer_sites import row_axes
from mpqdm_fx.graph.quantizers import fixed_quantizer
from mpqdm_fx.graph.same_values import value_key
from mpqdm_fx.numerics.activations.dynamic import fake_quantize_dynamic
from mpqdm_fx.records.activations import OUTPUT_BITS, NoiseLevels, Side
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.run.speed import InputOption
from mpqdm_fx.run.walk import Walk

__all__ = ["ActivationCosts"]

_RANGE_VALUES = 2**13  # numbers that a range is searched on, for its cost alone


@dataclass(frozen=True, kw_only=True)
class _InputKey:
    """How a weight layer's calls read their input: equal ones see the same rounded numbers.

    Attributes:
        values: What they read.
        bits: Width that the settings give; None for that of the option.
        axes: What shares a dynamic range.
    """

    values: Hashable
    bits: int | None
    axes: int | tuple[int, ...]


class ActivationCosts:
    """Costs of the inputs of all weight layers; a `GradientWatch` of `output_energies`.

    Args:
        graph_module: Normalized float graph.
        calls: Calibration calls: for the sizes of channels, and for static ranges.
        settings: Widths and seed.
        options: What is to be measured.
        levels: Groups of noise levels, for options of the kind `"timestep"`.
        max_memory: Bytes of activations held in memory.
        half: Hold activations as float16.

    Attributes:
        units: Layers that read the same numbers, directly or through others, and so get one
            option: by name of the first of them in graph order.
        sizes: How large the channels are that they read.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        calls: Sequence[Mapping[str, Any]],
        settings: MPQConfig,
        options: Sequence[InputOption],
        *,
        levels: NoiseLevels | None = None,
        max_memory: int | None = None,
        half: bool = False,
    ) -> None:
        layers = weight_layers(graph_module)
        width = None if settings.measures_widths else settings.activation_bits
        self._layer_of = {call.name: layer for layer in layers.values() for call in layer.nodes}
        self._readers = {
            call.name: _InputKey(
                values=value_key(graph_module, call.args[0]),
                bits=settings.own_activation_bits(name) or width,
                axes=row_axes(layer.module),
            )
            for name, layer in layers.items()
            for call in layer.nodes
        }
        self.units = _units(layers, self._readers)
        self._unit_of = {name: unit for unit, names in self.units.items() for name in names}
        self._options = [option for option in options if option.kind != "float"]
        self._sums = {unit: dict.fromkeys(options, 0.0) for unit in self.units}
        self._now: dict[tuple[str, Hashable, InputOption], Tensor] = {}
        self._shown = 0
        self._levels = levels
        self._argument = find_noise_argument(graph_module, settings.noise_argument)
        self._group = torch.zeros(1, dtype=torch.int64)
        self._rounders: dict[tuple[str, str, InputOption], nn.Module] = {}
        with_memory = {"max_memory": max_memory, "half": half}
        is_fixed = any(option.is_fixed for option in options)
        seen: SeenChannels | None = None
        if is_fixed and self._settle_at_once():
            # what scales an input is known where its ranges are searched: one walk does
            seen = SeenChannels(graph_module, self.units)
            self.sizes = ChannelSizes(largest=seen.largest, mean_square={})
        else:
            self.sizes = ChannelSizes.of(graph_module, calls, self.units, **with_memory)  # type: ignore[arg-type]
        if is_fixed:
            self._search_ranges(graph_module, calls, settings, seen, **with_memory)  # type: ignore[arg-type]
        if seen is not None:
            self.sizes = seen.sizes()

    def costs(self) -> dict[str, dict[InputOption, float]]:
        """Squared error of the model's output by unit and option, mean over samples and probes."""
        scale = 1.0 / max(1, self._shown)
        return {
            unit: {option: total * scale for option, total in sums.items()}
            for unit, sums in self._sums.items()
        }

    def kind(self, call: fx.Node) -> Hashable:
        """Calls of one width and granularity that read one value share a quantizer."""
        return self._readers[call.name]

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Find the groups of noise levels of the samples that come."""
        if self._levels is not None and self._argument is not None:
            told = torch.as_tensor(inputs[str(self._argument.target)])
            self._group = self._levels.group_of(told)

    def inputs(self, call: fx.Node, x: Tensor, gradient: Tensor, samples: int) -> None:
        """Add what rounding a value does to the output for its readers."""
        reader, layer = self._readers[call.name], self._layer_of[call.name]
        for option in self._options:
            factor = self._factor(layer, option)
            scaled = x if factor is None else x / factor
            if option.kind == "dynamic":
                rounded = fake_quantize_dynamic(scaled, self._width(reader, option), reader.axes)
            else:
                rounded = self._rounded(scaled, call, "input", option)
            error = rounded - scaled
            error = error if factor is None else error * factor
            self._add(call, option, _changes(error, gradient, samples))

    def outputs(self, call: fx.Node, y: Tensor, gradient: Tensor, samples: int) -> None:
        """Add what rounding an output does: static layers write integers."""
        for kind in ("static", "timestep"):
            options = [option for option in self._options if option.kind == kind]
            if options:
                error = self._rounded(y, call, "output", InputOption(kind=kind)) - y
                changes = _changes(error, gradient, samples)
                for option in options:
                    self._add(call, option, changes, side=call.name)

    def finish(self, samples: int) -> None:
        """Square what one random direction brought together."""
        for (unit, _, option), changes in self._now.items():
            self._sums[unit][option] += float(changes.square().sum())
        self._now.clear()
        self._shown += samples

    def _add(
        self,
        call: fx.Node,
        option: InputOption,
        changes: Tensor,
        *,
        side: Hashable = None,
    ) -> None:
        unit = self._unit_of[self._layer_of[call.name].name]
        key = (unit, side or self._readers[call.name], option)
        self._now[key] = self._now[key] + changes if key in self._now else changes

    def _settle_at_once(self) -> bool:
        """Whether all that a unit reads is one value: seen once, its channels' sizes are known."""
        values: dict[str, Hashable] = {}
        return all(
            values.setdefault(self._unit_of[self._layer_of[call].name], reader.values)
            == reader.values
            for call, reader in self._readers.items()
        )

    @staticmethod
    def _width(reader: _InputKey, option: InputOption) -> int:
        width = reader.bits or option.bits
        assert width is not None
        return width

    def _rounded(self, value: Tensor, call: fx.Node, side: Side, option: InputOption) -> Tensor:
        group = self._group
        if option.kind == "static" or len(value) % len(group):  # a constant: the first group's
            group = torch.zeros(1, dtype=torch.int64)
        rounder = self._rounders[call.name, side, option].to(value.device)
        rounded: Tensor = rounder(value, group.to(value.device))
        return rounded

    def _factor(self, layer: WeightLayer, option: InputOption) -> Tensor | None:
        """Factors of the channels that a layer reads, in the shape of its input's last axes."""
        if not option.exponent:
            return None
        factor = self.sizes.factor(self._unit_of[layer.name], option.exponent)
        trailing = 0 if isinstance(layer.module, nn.Linear) else layer.weight.dim() - 2
        return factor.view(-1, *[1] * trailing)

    def _search_ranges(
        self,
        graph_module: fx.GraphModule,
        calls: Sequence[Mapping[str, Any]],
        settings: MPQConfig,
        seen: SeenChannels | None,
        *,
        max_memory: int | None,
        half: bool,
    ) -> None:
        """Find the range of what each call reads and writes; show what is read to `seen`."""
        walk = Walk(graph_module, calls, progress="ranges", max_memory=max_memory, half=half)
        fixed = [option for option in self._options if option.is_fixed]
        fitted = settings.fits_activation_levels
        groups = [self._groups_of(call) for call in calls]

        def search(
            node: fx.Node, side: Side, call: fx.Node, widths: Mapping[InputOption, int]
        ) -> None:
            layer = self._layer_of[call.name]
            samples: dict[tuple[str, float], RangeSamples] = {}
            try:
                for option, bits in widths.items():
                    same = (option.kind, option.exponent)
                    if same not in samples:
                        factor = self._factor(layer, option)
                        values = walk.values(node)
                        scaled = values if factor is None else (value / factor for value in values)
                        samples[same] = self._samples(scaled, option, groups, settings.seed)
                    ranges = samples[same].ranges(bits, fitted=fitted)
                    self._rounders[call.name, side, option] = fixed_quantizer(ranges)
            except CalibrationError as error:
                raise CalibrationError(f"{layer.name}, {side}: {error}") from error

        searched: set[tuple[fx.Node, _InputKey]] = set()
        written: fx.Node | None = None
        for node in walk:
            if written is not None and written in walk.alive:
                kinds = sorted({option.kind for option in fixed})
                widths = {InputOption(kind=kind): OUTPUT_BITS for kind in kinds}
                search(written, "output", written, widths)
            written = None
            if seen is not None:
                seen.see(walk, node)
            if node.name in self._readers:
                source, reader = node.args[0], self._readers[node.name]
                assert isinstance(source, fx.Node)
                if (source, reader) not in searched:  # the first call stands for all of them
                    searched.add((source, reader))
                    widths = {option: self._width(reader, option) for option in fixed}
                    search(source, "input", node, widths)
                written = node

    def _groups_of(self, call: Mapping[str, Any]) -> Tensor:
        self.start(call)
        return self._group

    def _samples(
        self,
        values: Iterable[Tensor],
        option: InputOption,
        groups: Sequence[Tensor],
        seed: int,
    ) -> RangeSamples:
        limit = _RANGE_VALUES
        if option.kind == "static" or self._levels is None:
            return RangeSamples.of(values, seed, limit=limit)
        count = self._levels.count
        return RangeSamples.by_noise_level(values, groups, count, seed, limit=limit)


def _changes(error: Tensor, gradient: Tensor, samples: int) -> Tensor:
    """What the error of a value does to <v, f> of each sample, to first order, float64 [B]."""
    rows = samples if len(error) % samples == 0 else 1
    product = (gradient * error).reshape(rows, -1)
    changes = product.sum(dim=1, dtype=torch.float64).cpu()
    if rows != samples:  # a value that all samples share
        changes = torch.cat([changes, changes.new_zeros(samples - 1)])
    return changes


def _units(
    layers: Mapping[str, WeightLayer], readers: Mapping[str, _InputKey]
) -> dict[str, tuple[str, ...]]:
    """Layers that have to be quantized alike, because they read the same rounded numbers."""
    first_of: dict[_InputKey, str] = {}
    above: dict[str, str] = {}

    def root(name: str) -> str:
        while above[name] != name:
            name = above[name]
        return name

    for name, layer in layers.items():
        above.setdefault(name, name)
        for call in layer.nodes:
            above[root(name)] = root(first_of.setdefault(readers[call.name], name))
    units: dict[str, list[str]] = {}
    for name in layers:
        units.setdefault(root(name), []).append(name)
    return {names[0]: tuple(names) for names in units.values()}
