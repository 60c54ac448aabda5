"""How many rows of each sample a layer's statistics use: more where errors count more.

Where a sample's errors count a hundred times as much as another's, as many rows of both would leave
the statistics to a hundredth of the rows. So rows are drawn about in proportion to what they count,
and each stands for as many rows of its sample as were left out for it (Horvitz and Thompson 1952):
means are those over all rows, from more of what they are made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["RowDraw"]

_EVEN = 0.25  # of the rows are shared out evenly: no row counts more than 4/3 of what it should


@dataclass(frozen=True, kw_only=True)
class RowDraw:
    """How many rows are drawn from each sample of each call.

    Attributes:
        expected: Rows of each sample before rounding, float64 [B] per call.
        counts: Rows of each sample, int64 [B] per call.
    """

    expected: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]

    @classmethod
    def of(cls, weights: Sequence[Tensor], each: int, total: int) -> Self:
        """Share rows out.

        Args:
            weights: How much each sample counts, positive, [B] per call.
            each: Rows that each sample has.
            total: Rows that are drawn in all; all there are, if they are fewer.
        """
        weight = torch.cat(list(weights)).double()
        share = _EVEN / len(weight) + (1 - _EVEN) * weight / weight.sum()
        expected = _filled(share, float(each), float(min(total, each * len(weight))))
        ends = expected.cumsum(dim=0).round().long()
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).clamp(max=each)
        sizes = [len(part) for part in weights]
        return cls(expected=torch.split(expected, sizes), counts=torch.split(counts, sizes))

    def positions(self, index: int, total: int, generator: torch.Generator) -> Tensor:
        """Flat positions of the rows of one call, ascending int64.

        Args:
            index: The call.
            total: Rows that the call has, samples one after the other.
            generator: Of the draw.
        """
        counts = self.counts[index]
        each = total // len(counts)
        if each * len(counts) != total:  # a value that all samples share
            count = int(counts.sum())
            return torch.randperm(total, generator=generator)[:count].sort().values
        parts = [
            torch.randperm(each, generator=generator)[:count].sort().values + each * sample
            for sample, count in enumerate(counts.tolist())
        ]
        return torch.cat(parts)

    def stands_for(self, index: int, positions: Tensor, total: int) -> Tensor:
        """How many rows of its sample each row of a call stands for, float32 [P].

        Args:
            index: The call.
            positions: Of its rows, from `positions`.
            total: Rows that the call has.
        """
        expected = self.expected[index]
        each = total // len(expected)
        if each * len(expected) != total:
            return torch.full((len(positions),), total / max(1, len(positions)))
        return (each / expected.clamp_min(1e-300))[positions // each].float()


def _filled(share: Tensor, most: float, total: float) -> Tensor:
    """Numbers in proportion to shares with a given sum, none over `most`; float64 [N]."""
    numbers, free = torch.zeros_like(share), torch.ones_like(share, dtype=torch.bool)
    left = total
    while bool(free.any()):
        numbers[free] = share[free] * (left / share[free].sum())
        over = free & (numbers > most)
        if not bool(over.any()):
            break
        numbers[over] = most
        left -= most * int(over.sum())
        free &= ~over
    return numbers
