"""The PT2E flavour of the weight observer; apart, since torchao takes seconds to import."""

from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.backends import ao
from mpqdm_fx.backends.observers import WeightGrid

__all__ = ["PT2EGridWeightObserver"]


class PT2EGridWeightObserver(ao.PT2EObserverBase):  # type: ignore[misc]  # torchao is untyped
    """Weight observer for `prepare_pt2e`: the grid's scales, zero point 0, and a check.

    Args:
        grid: Grid of the layer that uses this observer.
        dtype: Always `torch.int8`; torchao passes it again.
        **kwargs: What torchao passes to every observer, unused.
    """

    ch_axis = 0
    qscheme = torch.per_channel_symmetric

    def __init__(self, grid: WeightGrid, dtype: torch.dtype = torch.int8, **kwargs: Any) -> None:
        super().__init__(dtype=dtype)
        self.grid = grid
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max

    def forward(self, x: Tensor) -> Tensor:
        """Check that `x` lies on the grid and return it.

        Raises:
            ConfigError: It does not.
        """
        self.grid.codes(x)
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scales, float32 [out_channels], and zero points, int64 [out_channels], all 0."""
        return self.grid.scale, torch.zeros(self.grid.scale.shape, dtype=torch.int64)
