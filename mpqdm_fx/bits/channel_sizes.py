"""How large the channels are that weight layers read, and what brings them to one size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.solve.outliers import power_of_two
from mpqdm_fx.run.walk import Walk

__all__ = ["ChannelSizes"]

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
    ) -> Self:
        """Run the graph once.

        Args:
            graph_module: Normalized float graph.
            calls: Calibration calls.
            units: Names of layers that read the same channels, by the unit's name.
            max_memory: Bytes of activations held in memory.
            half: Hold activations as float16.
        """
        layers = weight_layers(graph_module)
        unit_of = {
            call: (unit, layers[name])
            for unit, names in units.items()
            for name in names
            for call in layers[name].nodes
        }
        maxima: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        seen: set[tuple[str, object]] = set()
        walk = Walk(graph_module, calls, progress="channels", max_memory=max_memory, half=half)
        for node in walk:
            if node not in unit_of:
                continue
            unit, layer = unit_of[node]
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if (unit, source) in seen:
                continue
            seen.add((unit, source))
            axis = -1 if isinstance(layer.module, nn.Linear) else 1 - layer.weight.dim()
            for value in walk.values(source):
                rows = value.movedim(axis, -1).float()
                rows = rows.reshape(-1, rows.shape[-1])
                largest = rows.abs().amax(dim=0).cpu()
                maxima[unit] = torch.maximum(maxima.get(unit, largest), largest)
                energy = rows.square().sum(dim=0, dtype=torch.float64).cpu()
                squares[unit] = squares[unit] + energy if unit in squares else energy
                counts[unit] = counts.get(unit, 0) + len(rows)
        means = {unit: energy / max(1, counts[unit]) for unit, energy in squares.items()}
        return cls(largest=maxima, mean_square=means)

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
