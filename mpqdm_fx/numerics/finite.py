"""Whether all numbers of a tensor are finite, in one pass over it."""

import torch
from torch import Tensor

__all__ = ["all_finite"]


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite.

    A sum is finite where all numbers are, unless it overflows; only then is each number looked at,
    which takes five passes and two copies.

    Args:
        values: Any shape and dtype.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
