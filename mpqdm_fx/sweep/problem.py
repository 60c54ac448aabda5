"""What rounding a layer is: its weights, its rows, and what judges the result."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.layer_rows import LayerRows, RowMeans
from mpqdm_fx.numerics.solve.propagation import output_error

__all__ = ["LayerData", "Problem"]


@dataclass(frozen=True, kw_only=True)
class LayerData:
    """Rows of one layer in both lanes, [N, G, K] for grouped layers.

    Attributes:
        train: Rows that corrections and roundings are fitted to.
        validation: Rows of held-out calls; may be empty.
    """

    train: LayerRows
    validation: LayerRows

    def groups(self, channels: int) -> list["LayerData"]:
        """Rows of each group of a layer with so many output channels; one, if it has no groups."""
        inputs = self.train.inputs
        if inputs.dim() == 2:
            return [self]
        each = channels // inputs.shape[1]
        return [
            LayerData(
                train=self.train.group(index, each), validation=self.validation.group(index, each)
            )
            for index in range(inputs.shape[1])
        ]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One group of a layer: rows less what a bias takes up, each as often as it counts.

    What only a rounding needs is made when it is asked for: to judge takes less.

    Attributes:
        W: Float weight rows [O, K].
        data: Its rows as they were collected.
        means: Means of the training rows that a refitted bias takes up; None if it stays.
    """

    W: Tensor
    data: LayerData
    means: RowMeans | None

    @classmethod
    def of(cls, W: Tensor, data: LayerData, *, refit: bool) -> Self:
        """A problem whose bias is refitted, or stays."""
        return cls(W=W, data=data, means=data.train.means() if refit else None)

    @cached_property
    def train(self) -> LayerRows:
        """Rows that corrections and roundings are fitted to."""
        return self.data.train.fitted(self.means)

    @cached_property
    def judge(self) -> LayerRows:
        """Held-out rows, or the same where there are none."""
        held_out = self.data.validation
        return held_out.fitted(self.means) if len(held_out) else self.train

    @cached_property
    def targets(self) -> list[Tensor]:
        """What the output should gain on the rows that judge."""
        return self.judge.targets(self.W)

    @cached_property
    def gram(self) -> Gram:
        """Moments of the training inputs."""
        return Gram.of(self.train.inputs)

    def error(self, Q: Tensor) -> Tensor:
        """Error of each channel of the rounded rows on the rows that judge, float64 [O]."""
        return output_error(self.W - Q, self.judge.inputs, self.targets)

    @property
    def signal(self) -> float:
        """Energy of the output on the rows that judge."""
        return float((self.judge.inputs @ self.W.T).square().mean(dim=0, dtype=torch.float64).sum())

    @property
    def mismatch(self) -> float:
        """Energy of the target's error that reaches the layer."""
        return sum(float(target.square().mean(dim=0).sum()) for target in self.targets)
