"""The work of solving one layer, counted without doing it."""

import math
from dataclasses import dataclass

from mpqdm_fx.graph.layers import WeightLayer
from mpqdm_fx.numerics.solve.gram import kept_rows
from mpqdm_fx.numerics.solve.propagation import DAMPINGS
from mpqdm_fx.records.config import MPQConfig

__all__ = ["LayerWork", "candidates", "layer_work"]

_FIT = 60  # times that fitting levels to a layer goes over its weights
# What a core computes in the time of one column, and while it goes over one number: for a progress
# bar, where only the proportions count.
_COLUMN_PRODUCTS = 2_000_000
_NUMBER_PRODUCTS = 20


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What solving a layer takes.

    Attributes:
        products: Multiply-adds of matrix products and factorisations.
        columns: Columns that are rounded one after the other.
        numbers: Numbers that element by element passes go over.
        bytes: Memory at the peak, the layer's rows included.
    """

    products: int
    columns: int
    numbers: int
    bytes: int

    @property
    def weight(self) -> int:
        """All of it as multiply-adds that take about as long."""
        return self.products + self.columns * _COLUMN_PRODUCTS + self.numbers * _NUMBER_PRODUCTS


def candidates(settings: MPQConfig) -> int:
    """How many corrections are rounded and judged: none, the automatic one, the paper's."""
    return 3 if settings.propagation == "auto" else 1


def layer_work(layer: WeightLayer, positions: int, settings: MPQConfig) -> LayerWork:
    """Count the work of one layer.

    Args:
        layer: The layer.
        positions: Output positions in all calibration calls together.
        settings: The run's settings.
    """
    channels = layer.weight.shape[0]
    width = layer.weight.numel() // channels
    groups = int(getattr(layer.module, "groups", 1))
    rows = max(1, kept_rows(width, positions, settings.max_rows))
    rounds = candidates(settings)
    rounds += settings.refinements if settings.rounding == "gptq" else 0
    solves = len(DAMPINGS) if settings.propagation == "auto" else 1
    side = min(width, rows)
    if width <= rows:
        moments = rows * width**2 + (1 + solves) * side**3 // 3
        per_rounding = channels // groups * width**2
        size = 4 * 8 * width**2
    else:
        blocks = math.ceil(width / max(128, rows // 4))
        moments = rows**2 * width * (1 + solves) + solves * side**3 // 3
        per_rounding = channels // groups * width * rows * 2 + blocks * side**3 // 3
        size = 3 * 8 * rows**2 + 3 * 8 * rows * width
    return LayerWork(
        products=groups * (moments + rounds * per_rounding) + 3 * rows * width * channels * solves,
        columns=groups * width * rounds if settings.rounding == "gptq" else 0,
        numbers=layer.weight.numel() * _FIT * candidates(settings),
        bytes=size + 3 * 4 * rows * width * groups + 6 * 8 * channels * width,
    )
