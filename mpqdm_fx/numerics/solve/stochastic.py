"""Stochastic rounding: codes drawn from the two levels around a weight, the weight their mean.

Gupta et al., arXiv 1502.02551, section 3.1. The draws are given, so that a pass that is computed
again finds the same codes.
"""

import torch
from torch import Tensor

from mpqdm_fx.numerics.levels.grids import MAX_BITS, snap

__all__ = ["stochastic_codes", "stochastic_places"]


def stochastic_codes(weight: Tensor, scale: Tensor, bits: Tensor, draws: Tensor) -> Tensor:
    """Codes on the uniform levels.

    Args:
        weight: Finite weight rows [O, K], float32.
        scale: Step of each row [O], float32.
        bits: Width of each row, int64 [O].
        draws: Uniform on [0, 1), [O, K].

    Returns:
        int8 [O, K]. Over the draws a weight inside the range has itself as its mean value; one
        outside has the outermost level.

    Raises:
        ConfigError: A width outside 1..8, or of the wrong shape.
    """
    spacing = torch.where(bits == MAX_BITS, 1.0, 2.0).to(scale) * scale
    # the nearest level of a weight that was moved by up to half a spacing
    return snap(weight + (draws - 0.5) * spacing[:, None], scale, bits)


def stochastic_places(ratio: Tensor, table: Tensor, draws: Tensor) -> Tensor:
    """Places of levels in tables.

    Args:
        ratio: Weights over their row's scale [O, K].
        table: Levels of each row [O, L], ascending; they may repeat.
        draws: Uniform on [0, 1), [O, K].

    Returns:
        int64 [O, K] into each row of `table`, with the means of `stochastic_codes`.
    """
    below = (torch.searchsorted(table, ratio, right=True) - 1).clamp(0, table.shape[1] - 1)
    above = (below + 1).clamp_max(table.shape[1] - 1)
    low, high = table.gather(1, below), table.gather(1, above)
    return torch.where(ratio > low + draws * (high - low), above, below)
