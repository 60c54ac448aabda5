"""How large the channels are that weight layers read, and what brings them to one size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.solve.outliers import power_of_two
from mpqdm_fx.run.walk import Walk

__all__ = ["ChannelSizes", "SeenChannels"]

_FLOOR = 2.0**-8
"""Of the largest channel: one that was silent over the calibration calls may wake up later."""


@dataclass(frozen=True, kw_only=True)
class ChannelSizes:
    """How large every channel is that the layers of a unit read, over calibration calls.

    Attributes:
        largest: Largest magnitude, float32 [C] by unit.
        mean_square: Mean square, float64 [C] by unit.
    """

    largest: Mapping[str, Tensor]
    mean_square: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        graph_module: fx.GraphModule,
        calls: Sequence[Mapping[str, Any]],
        units: Mapping[str, Sequence[str]],
        *,
        max_memory: int | None = None,
        half: bool = False,
    ) -> "ChannelSizes":
        """Run the graph once.

        Args:
            graph_module: Normalized float graph.
            calls: Calibration calls.
            units: Names of layers that read the same channels, by the unit's name.
            max_memory: Bytes of activations held in memory.
            half: Hold activations as float16.
        """
        seen = SeenChannels(graph_module, units)
        walk = Walk(graph_module, calls, progress="channels", max_memory=max_memory, half=half)
        for node in walk:
            seen.see(walk, node)
        return seen.sizes()

    def factor(self, unit: str, exponent: float) -> Tensor:
        """Powers of two next to the maxima's power, about 1 on average, float32 [C].

        Args:
            unit: Name of the unit.
            exponent: 0 leaves the channels as they are, 1 brings all to one size. In between the
                weights take a part of the spread: they are rounded as well.
        """
        largest = self.largest[unit]
        floor = float(largest.max()) * _FLOOR
        if not floor > 0:
            return torch.ones_like(largest)
        logarithm = largest.clamp_min(floor).double().log2()
        return power_of_two(torch.exp2(exponent * (logarithm - logarithm.mean())))


class SeenChannels:
    """Sizes of channels, by the way of a walk.

    Args:
        graph_module: Normalized float graph.
        units: Names of layers that read the same channels, by the unit's name.

    Attributes:
        largest: Largest magnitude so far, float32 [C] by unit.
    """

    def __init__(self, graph_module: fx.GraphModule, units: Mapping[str, Sequence[str]]) -> None:
        layers = weight_layers(graph_module)
        self._unit_of = {
            call: (unit, layers[name])
            for unit, names in units.items()
            for name in names
            for call in layers[name].nodes
        }
        self.largest: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seen: set[tuple[str, fx.Node]] = set()

    def see(self, walk: Walk, node: fx.Node) -> None:
        """Look at what a layer reads, before the walk executes its call."""
        if node not in self._unit_of:
            return
        unit, layer = self._unit_of[node]
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if (unit, source) in self._seen:
            return
        self._seen.add((unit, source))
        axis = -1 if isinstance(layer.module, nn.Linear) else 1 - layer.weight.dim()
        for value in walk.values(source):
            rows = value.movedim(axis, -1).float()
            rows = rows.reshape(-1, rows.shape[-1])
            largest = rows.abs().amax(dim=0).cpu()
            self.largest[unit] = torch.maximum(self.largest.get(unit, largest), largest)
            energy = rows.square().sum(dim=0, dtype=torch.float64).cpu()
            known = self._squares.get(unit)
            self._squares[unit] = energy if known is None else known + energy
            self._counts[unit] = self._counts.get(unit, 0) + len(rows)

    def sizes(self) -> ChannelSizes:
        """Of all that was seen."""
        means = {
            unit: energy / max(1, self._counts[unit]) for unit, energy in self._squares.items()
        }
        return ChannelSizes(largest=self.largest, mean_square=means)
