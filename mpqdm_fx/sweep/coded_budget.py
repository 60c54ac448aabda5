"""The pitch of a model, which a budget decides as the sweep goes on.

What the layers will take at a pitch is foretold from their weights, and the pitch of the next one
follows from what is left and from how the forecast did so far.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from mpqdm_fx.bits.sensitivity_table import LayerSensitivity, SensitivityTable
from mpqdm_fx.graph.layers import WeightLayer, weight_rows
from mpqdm_fx.numerics.levels.entropy_code import CodeClasses, code_lengths
from mpqdm_fx.numerics.levels.grids import MIN_SCALE
from mpqdm_fx.numerics.levels.packing import SCALE_BITS
from mpqdm_fx.numerics.levels.rans import TOP, lanes_of
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.coded_rounding import coded_size, first_steps
from mpqdm_fx.records.plan import LayerPlan

__all__ = ["COARSEST", "CodedBudget", "coded_plan"]

COARSEST = 200.0
"""Octave of a pitch that leaves each row the coarsest step that it can have."""

_MARGIN = 0.002  # of what is left, for what the forecasts miss
_PRIOR = 0.05  # of all bits: how much it counts beforehand that forecasts are right
_LEAST_SHARE = 0.3  # of its forecast, which a layer can be brought down to in need
_COARSENED = 1.0  # octaves of the pitch, by which what one layer takes may coarsen all others
_WIDEST = 8
_OFFSETS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0)  # octaves of the pitch: two are about a bit a weight
_ROWS = 128  # of a layer, that a forecast looks at
_UNTOLD_ENERGY = 1.0  # where no error told it: inputs never varied, or the weights are zero


def coded_plan(layer: WeightLayer) -> LayerPlan:
    """A plan of a layer that is not rounded yet: whole numbers of any size within int8."""
    shape = tuple(layer.weight.shape)
    return LayerPlan(
        name=layer.name,
        kind=type(layer.module).__name__,
        shape=shape,
        bits=(_WIDEST,) * shape[0],
        coded=0,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Forecast:
    """What a layer will take at a pitch.

    Attributes:
        octaves: Binary logarithms of pitches, ascending.
        sizes: Bits at each, descending.
        weights: Weights of the layer.
        least: Bits at the coarsest steps that it can have.
    """

    octaves: tuple[float, ...]
    sizes: tuple[float, ...]
    weights: int
    least: float

    def bits(self, octave: float) -> float:
        """Between two pitches on the line; beyond, half a bit a weight less for each octave.

        Below all of them it is what int8 holds: no pitch takes more.
        """
        first, last = self.octaves[0], self.octaves[-1]
        if octave >= last:
            return max(self.least, self.sizes[-1] - 0.5 * self.weights * (octave - last))
        upper = next(i for i in range(1, len(self.octaves)) if octave < self.octaves[i])
        x, y = self.octaves[upper - 1 : upper + 1]
        low, high = self.sizes[upper - 1 : upper + 1]
        return low + (high - low) * (max(octave, first) - x) / (y - x)


class CodedBudget:
    """Bits that are left, and the pitch at which the rest will take them.

    Args:
        layers: Layers without fixed widths, in running order.
        table: Sensitivities of all layers.
        bits: What these layers may take in all.
        energies: Mean square of each layer's inputs, where the table was measured on other weights.

    Attributes:
        sensitivity: What an error of each channel's output does to the model's output, by layer.
        energy: Mean square of each layer's inputs, as its errors at eight bits tell it; 1 where
            there were none.
    """

    def __init__(
        self,
        layers: Mapping[str, WeightLayer],
        table: SensitivityTable,
        bits: int,
        *,
        energies: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        measured = {layer.name: layer for layer in table.layers}
        self.sensitivity = {name: measured[name].sensitivity for name in layers}
        models = [
            _Model.of(layer, measured[name], energies.get(name)) for name, layer in layers.items()
        ]
        self.energy = dict(zip(layers, (model.energy for model in models), strict=True))
        middle = _solved(lambda octave: sum(m.gaussian_bits(2.0**octave) for m in models), bits)
        octaves = tuple(middle + offset for offset in _OFFSETS)
        self._waiting = {
            name: _Forecast(
                octaves=octaves,
                sizes=tuple(model.nearest_bits(2.0**octave) for octave in octaves),
                weights=layers[name].weight.numel(),
                least=model.least_bits(),
            )
            for name, model in zip(layers, models, strict=True)
        }
        self._bits, self._used = bits, 0.0
        self._foretold = self._taken = 0.0

    def octave(self) -> float:
        """Binary logarithm of the next layer's pitch; see `coded_rounding`."""
        left = (self._bits - self._used) * (1 - _MARGIN) / self._ratio
        waiting = self._waiting.values()
        return _solved(lambda octave: sum(layer.bits(octave) for layer in waiting), left)

    def foretold(self, name: str) -> float:
        """Bits that a layer is expected to take at the next pitch."""
        return self._waiting[name].bits(self.octave())

    def allows(self, name: str, bits: float, *, in_need: bool = False) -> bool:
        """Whether the others keep about their steps if a layer takes so many.

        They may be few and small, as a last layer is, and then bear a forecast that was 1 % off.

        Args:
            name: The layer.
            bits: What it would take.
            in_need: Whether it is enough that the others can still be brought down to what is left.
        """
        octave, share = self.octave(), self._ratio
        if in_need:
            share *= _LEAST_SHARE
        else:
            octave += _COARSENED
        others = [layer for other, layer in self._waiting.items() if other != name]
        kept = sum(max(layer.least, share * layer.bits(octave)) for layer in others)
        return self._used + bits + kept <= self._bits

    def take(self, name: str, bits: float) -> None:
        """A layer took so many."""
        foretold = self.foretold(name)
        del self._waiting[name]
        self._used += bits
        self._foretold += foretold
        self._taken += bits

    @property
    def _ratio(self) -> float:
        """Bits that layers take over what was foretold of them."""
        prior = _PRIOR * self._bits
        return (prior + self._taken) / (prior + self._foretold)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Model:
    """What a forecast is made of.

    Attributes:
        rows: Weights, float32 [n, K], of some rows.
        sensitivity: Of these rows, float64 [n].
        share: All rows over these.
        energy: Mean square of the inputs.
        places: Places of the kernel.
        overhead: Bits of all scales.
    """

    rows: Tensor
    sensitivity: Tensor
    share: float
    energy: float
    places: int
    overhead: int

    @classmethod
    def of(cls, layer: WeightLayer, measured: LayerSensitivity, energy: float | None) -> Self:
        weight = weight_rows(layer.module).detach().float().cpu()
        chosen = torch.arange(0, len(weight), -(-len(weight) // _ROWS))
        rows = weight[chosen]
        if energy is None:
            energy = _energy(rows, measured.uniform[chosen, _WIDEST - 1])
        return cls(
            rows=rows,
            sensitivity=measured.sensitivity[chosen],
            share=len(weight) / len(rows),
            energy=energy,
            places=math.prod(layer.weight.shape[2:]),
            overhead=SCALE_BITS * len(weight),
        )

    def _steps(self, pitch: float) -> Tensor:
        return first_steps(self.rows, self.sensitivity, self.energy, pitch)

    def gaussian_bits(self, pitch: float) -> float:
        """As if the rows were Gaussian: the entropy of their nearest codes, roughly."""
        spread = self.rows.double().square().mean(dim=1).sqrt() / self._steps(pitch)
        bits = (spread.square() * 2 * math.pi * math.e + 1).log2() / 2
        return float(bits.sum()) * self.rows.shape[1] * self.share + self.overhead

    def nearest_bits(self, pitch: float) -> float:
        """Of the nearest codes, as they would be stored."""
        levels = RowLevels(
            bits=torch.full((len(self.rows),), _WIDEST), scale=self._steps(pitch), tables=None
        )
        codes = levels.snap(self.rows).to(torch.int8)
        return coded_size(codes, self.places) * self.share + self.overhead

    def least_bits(self) -> float:
        """Were all codes zero, as with the coarsest steps."""
        rows, width = round(len(self.rows) * self.share), self.rows.shape[1]
        zeros = torch.zeros(max(rows, width), dtype=torch.int64)
        classes = CodeClasses(
            rows=zeros[:rows], channels=zeros[: width // self.places], places=zeros[: self.places]
        )
        codes = float(code_lengths()[0, TOP]) * rows * width
        return self.overhead + classes.header_bits + codes + 32 * lanes_of(rows * width)


def _energy(rows: Tensor, errors: Tensor) -> float:
    """Mean square of a layer's inputs, as errors at eight bits tell it.

    Args:
        rows: Weights that the errors are of, [n, K].
        errors: Mean squared error of each output, float64 [n].
    """
    # nearest rounding errs by a twelfth of the squared step times the energy of the inputs
    steps = rows.abs().amax(dim=1).double() / 127
    tells = (steps > MIN_SCALE) & (errors > 0)  # below that, a row's weights are zero as a whole
    noise = float(steps[tells].square().sum()) / 12 * rows.shape[1]
    return float(errors[tells].sum()) / noise if noise > 0 else _UNTOLD_ENERGY


def _solved(size: Callable[[float], float], bits: float) -> float:
    """Octave at which a size that falls with it is so many bits."""
    low, high = -COARSEST, COARSEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) > bits else (low, middle)
    return high
