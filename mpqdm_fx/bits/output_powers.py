"""Errors at the model's output by group of noise levels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpqdm_fx.bits.noise_groups import NoiseGroups

__all__ = ["output_powers"]


def output_powers(
    groups: NoiseGroups, call: Mapping[str, Any], reference: Any, output: Any
) -> Tensor:
    """Energy of the output, and of its error, by group of noise levels.

    Args:
        groups: The groups.
        call: Inputs of the call, by placeholder.
        reference: What the float model returns.
        output: What the other one does.

    Returns:
        float64 [G, 2].
    """
    group = groups.of_samples(call)
    sums = torch.zeros(groups.count, 2, dtype=torch.float64)
    pairs = zip(pytree.tree_leaves(reference), pytree.tree_leaves(output), strict=True)
    for expected, actual in pairs:
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        exact = expected.double().cpu()
        powers = torch.stack([exact, exact - actual.double().cpu()]).square()
        rows = len(group) if expected.dim() and len(expected) % len(group) == 0 else 1
        sums.index_add_(0, group[:rows], powers.reshape(2, rows, -1).sum(dim=2).T)
    return sums
