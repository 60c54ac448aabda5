"""The price of a bit, which a budget decides as the sweep goes on.

One price of a bit holds for the whole model: where it is the same everywhere, no bit would do more
elsewhere. What the layers will take at a price is foretold from their weights, and the price of the
next one follows from what is left and from how the forecast did so far.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mpqdm_fx.bits.sensitivity_table import LayerSensitivity, SensitivityTable
from mpqdm_fx.graph.layers import WeightLayer, weight_rows
from mpqdm_fx.numerics.levels.entropy_code import code_lengths
from mpqdm_fx.numerics.levels.packing import SCALE_BITS
from mpqdm_fx.numerics.solve.rate_rounding import first_steps
from mpqdm_fx.records.plan import LayerPlan

__all__ = ["CodedBudget", "coded_plan"]

_MARGIN = 0.002  # of the budget, which the forecast of the last layers may miss
_PRIOR = 0.05  # of all bits: how much the first guess of the forecast's error counts
_GUESS = 0.9  # bits that a layer takes over what is foretold
_LEAST_SHARE = 0.3  # of its forecast, which a layer can be brought down to in need
_WIDEST = 8


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
    """What a layer will take at a price.

    Attributes:
        spread: Root mean square of each row, float64 [O].
        weight: Rows, for the largest of each [O, 1].
        sensitivity: float64 [O].
        energy: Mean square of its inputs.
        width: Weights of a row.
        overhead: Bits of scales and classes.
    """

    spread: Tensor
    weight: Tensor
    sensitivity: Tensor
    energy: float
    width: int
    overhead: float

    def bits(self, price: float) -> float:
        """Entropy of the rows' nearest codes, as Gaussians, and what goes with them."""
        steps = first_steps(self.weight, self.sensitivity, self.energy, price)
        place = ((self.spread / steps).clamp_min(1e-9).log2() + 4) * 3
        curve = _entropies()
        place = place.clamp(0, len(curve) - 1.001)
        low = place.floor().long()
        share = place - low
        rows = curve[low] * (1 - share) + curve[low + 1] * share
        return float(rows.sum()) * self.width + self.overhead


def _entropies() -> Tensor:
    """Bits of a code of each class, float64 [CLASSES]."""
    lengths = code_lengths().double()
    return (2**-lengths * lengths).sum(dim=1)


class CodedBudget:
    """Bits that are left, and the price of a bit at which the rest will take them.

    Args:
        layers: Layers without fixed widths, in running order.
        table: Sensitivities of all layers.
        bits: What these layers may take in all.
    """

    def __init__(
        self, layers: Mapping[str, WeightLayer], table: SensitivityTable, bits: int
    ) -> None:
        measured = {layer.name: layer for layer in table.layers}
        self.sensitivity = {name: measured[name].sensitivity for name in layers}
        self._waiting = {name: _forecast(layer, measured[name]) for name, layer in layers.items()}
        self._bits, self._used = bits, 0.0
        self._foretold = self._taken = 0.0

    def price(self) -> float:
        """Squared error of the output that a bit of the next layer may cost."""
        left = (self._bits * (1 - _MARGIN) - self._used) / self._ratio
        low, high = -120.0, 60.0  # binary logarithms: nothing is foretold to fit, and everything
        for _ in range(60):
            middle = (low + high) / 2
            if sum(layer.bits(2.0**middle) for layer in self._waiting.values()) > left:
                low = middle
            else:
                high = middle
        return float(2.0**high)

    def allows(self, name: str, bits: float) -> bool:
        """Whether the others can still be brought down to what is left if a layer takes so many."""
        price = self.price()
        least = sum(
            _LEAST_SHARE * layer.bits(price)
            for other, layer in self._waiting.items()
            if other != name
        )
        return self._used + bits + self._ratio * least <= self._bits

    def take(self, name: str, bits: float) -> None:
        """A layer took so many."""
        price = self.price()
        forecast = self._waiting.pop(name)
        self._used += bits
        self._foretold += forecast.bits(price)
        self._taken += bits

    @property
    def _ratio(self) -> float:
        prior = _PRIOR * self._bits
        return (_GUESS * prior + self._taken) / (prior + self._foretold)


def _forecast(layer: WeightLayer, measured: LayerSensitivity) -> _Forecast:
    rows = weight_rows(layer.module).double()
    largest = rows.abs().amax(dim=1)
    # nearest rounding at eight bits errs by a twelfth of the squared step times the inputs' energy
    step = largest.clamp_min(1e-30) / 127
    noise = float((step.square() / 12).sum()) * rows.shape[1]
    energy = float(measured.uniform[:, _WIDEST - 1].sum()) / noise
    classes = 6 * len(rows) + 4 * (layer.weight.shape[1] + math.prod(layer.weight.shape[2:]))
    return _Forecast(
        spread=rows.square().mean(dim=1).sqrt(),
        weight=largest[:, None],
        sensitivity=measured.sensitivity,
        energy=energy,
        width=rows.shape[1],
        overhead=SCALE_BITS * len(rows) + classes,
    )
