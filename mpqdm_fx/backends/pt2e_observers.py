"""The PT2E flavour of the weight observer; apart, since torchao takes seconds to import."""

from typing import Any

import torch

from mpqdm_fx.backends import ao
from mpqdm_fx.backends.observers import GridObserver, WeightGrid

__all__ = ["PT2EGridWeightObserver"]


class PT2EGridWeightObserver(
    GridObserver,
    ao.PT2EObserverBase,  # type: ignore[misc]  # torchao is untyped
):
    """Weight observer for `prepare_pt2e`: the grid's scales, zero point 0, and a check.

    Args:
        grid: Grid of the layer that uses this observer.
        dtype: Always `torch.int8`; torchao passes it again.
        **kwargs: What torchao passes to every observer, unused.
    """

    def __init__(self, grid: WeightGrid, dtype: torch.dtype = torch.int8, **kwargs: Any) -> None:
        super().__init__(dtype=dtype)
        self.grid = grid
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max
