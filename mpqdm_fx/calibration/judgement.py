"""The whole recipe against plain rounding at the same bits, at the model's output."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpqdm_fx.calibration.noise_groups import NoiseGroups
from mpqdm_fx.numerics.metrics import ratio_db

__all__ = ["Judgement", "output_powers"]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How one way to round the model does at its output, on held-out calls.

    Attributes:
        recipe: What was done.
        sqnr_db: Signal-to-noise ratio in dB by group of noise levels, ascending; None where it is
            exact or there was no call.
        error: Mean over these groups of the error's energy over the output's.
        chosen: Whether this is the result.
    """

    recipe: str
    sqnr_db: tuple[float | None, ...]
    error: float
    chosen: bool

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`."""
        return cls(**{**data, "sqnr_db": tuple(data["sqnr_db"])})

    @property
    def decibels(self) -> float:
        """The error in dB below the output."""
        return -10 * math.log10(self.error) if 0 < self.error < math.inf else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def of(cls, recipe: str, powers: Tensor) -> Self:
        """Judge by what `output_powers` gave.

        Args:
            recipe: What was done.
            powers: Sums over calls, float64 [G, 2].
        """
        seen = [(signal, noise) for signal, noise in powers.tolist() if signal or noise]
        ratios = [noise / signal if signal else math.inf for signal, noise in seen]
        error = sum(ratios) / len(ratios) if ratios else 0.0
        return cls(
            recipe=recipe,
            sqnr_db=tuple(_decibels(*row) for row in powers.tolist()),
            error=error if math.isfinite(error) else math.inf,
            chosen=False,
        )


def _decibels(signal: float, noise: float) -> float | None:
    ratio = ratio_db(signal, noise)
    return ratio if math.isfinite(ratio) else None


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
    own = groups.of_samples(call)
    sums = torch.zeros(groups.count, 2, dtype=torch.float64)
    pairs = zip(pytree.tree_leaves(reference), pytree.tree_leaves(output), strict=True)
    for want, got in pairs:
        if not isinstance(want, Tensor) or not want.is_floating_point():
            continue
        exact = want.double().cpu()
        both = torch.stack([exact, exact - got.double().cpu()]).square()
        rows = len(own) if want.dim() and len(want) % len(own) == 0 else 1
        sums.index_add_(0, own[:rows], both.reshape(2, rows, -1).sum(dim=2).T)
    return sums
