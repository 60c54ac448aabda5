"""What one layer reads in both lanes, row by row, and how much each row counts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

__all__ = ["LayerRows", "RowMeans", "in_parts"]

_PART = 2**16  # numbers that are computed with in float64 at once: they stay in the cache


def in_parts(rows: Tensor, numbers: int = 0) -> Sequence[Tensor]:
    """Split rows into few enough for work in float64: new pages of memory cost more than the work.

    Args:
        rows: [N, ...].
        numbers: What a row is made into; by default as many numbers as it has.
    """
    each = numbers or rows.numel() // max(1, len(rows))
    return torch.split(rows, max(1, _PART // max(1, each)))


@dataclass(frozen=True, kw_only=True)
class RowMeans:
    """Mean row of each part of a layer's rows, each row counted by its weight; float64.

    Attributes:
        inputs: [K].
        shift: [K], or None where there is none.
        residual: [O], or None where there is none.
    """

    inputs: Tensor
    shift: Tensor | None
    residual: Tensor | None

    def bias(self, W: Tensor, Q: Tensor) -> Tensor:
        """What a bias has to gain so that the mean output is that of the float lane.

        Args:
            W: Float weight rows [O, K].
            Q: Rounded rows [O, K].

        Returns:
            float64 [O].
        """
        W = W.to(torch.float64)
        gained = (W - Q.to(torch.float64)) @ self.inputs
        if self.shift is not None:
            gained = gained + W @ self.shift
        return gained if self.residual is None else gained + self.residual


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """What one layer read in both lanes, at the same positions of the same calls.

    Attributes:
        inputs: Rows X_hat of the quantized lane, float32 [N, K].
        shift: X - X_hat, float32 [N, K]; None where both lanes are the same value.
        residual: Float minus quantized lane of what the output is added to, float32 [N, O]; None
            where there is none or it has no error.
        weights: How much an error in each row counts, float32 [N], positive; None for all alike.
    """

    inputs: Tensor
    shift: Tensor | None
    residual: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Rows of several calls, one after the other; a part that one lacks all have to lack."""

        def joined(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if any(tensor is None for tensor in tensors) else torch.cat(tensors)

        inputs = joined("inputs")
        assert inputs is not None
        return cls(
            inputs=inputs,
            shift=joined("shift"),
            residual=joined("residual"),
            weights=joined("weights"),
        )

    def take(self, index: Tensor | slice) -> Self:
        """Some of the rows."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return replace(
            self,
            inputs=self.inputs[index],
            shift=pick(self.shift),
            residual=pick(self.residual),
            weights=pick(self.weights),
        )

    def group(self, index: int, channels: int) -> Self:
        """One group of a grouped layer, whose inputs and shift are [N, G, K].

        Args:
            index: The group.
            channels: Output channels of a group.

        Returns:
            Inputs and shift [N, K], and the residual of the group's own channels.
        """
        outputs = slice(index * channels, (index + 1) * channels)
        return replace(
            self,
            inputs=self.inputs[:, index],
            shift=None if self.shift is None else self.shift[:, index],
            residual=None if self.residual is None else self.residual[:, outputs],
        )

    def means(self) -> RowMeans:
        """Mean rows, each row counted by its weight; there has to be a row."""
        if self.weights is None:

            def mean(rows: Tensor) -> Tensor:
                return rows.mean(dim=0, dtype=torch.float64)

        else:
            share = self.weights.to(torch.float64)
            share = share / share.sum()

            def mean(rows: Tensor) -> Tensor:
                parts = in_parts(rows)
                shares = torch.split(share, len(parts[0]))
                pairs = zip(shares, parts, strict=True)
                # flat: those of a grouped layer are [N, G, K]
                sums = [some @ part.to(torch.float64).flatten(1) for some, part in pairs]
                return torch.stack(sums).sum(dim=0).reshape(rows.shape[1:])

        return RowMeans(
            inputs=mean(self.inputs),
            shift=None if self.shift is None else mean(self.shift),
            residual=None if self.residual is None else mean(self.residual),
        )

    def fitted(self, means: RowMeans | None) -> Self:
        """Rows whose plain sums of squares are the weighted ones, less what a bias takes up.

        Args:
            means: Mean rows that are subtracted: of the rows that the bias is fitted to. None for a
                layer whose bias stays as it is.

        Returns:
            `sqrt(w) (row - mean)` for each row, with `w` scaled to a mean of 1; without weights.
        """
        root = None
        if self.weights is not None and len(self.weights):
            root = (self.weights / self.weights.mean()).sqrt()

        def part(rows: Tensor | None, mean: Tensor | None) -> Tensor | None:
            if rows is None:
                return None
            if mean is None and root is None:
                return rows
            result = torch.empty_like(rows)
            if mean is None:
                result.copy_(rows)
            else:
                for some, part in zip(in_parts(result), in_parts(rows), strict=True):
                    some.copy_(part.to(torch.float64).sub_(mean))
            if root is not None:
                result *= root.view(-1, *[1] * (rows.dim() - 1))
            return result

        inputs = part(self.inputs, None if means is None else means.inputs)
        assert inputs is not None
        return replace(
            self,
            inputs=inputs,
            shift=part(self.shift, None if means is None else means.shift),
            residual=part(self.residual, None if means is None else means.residual),
            weights=None,
        )

    def targets(self, W: Tensor) -> list[Tensor]:
        """What the output should gain over `X_hat W^T`, by source: the shift, then the residual.

        Args:
            W: Float weight rows [O, K].

        Returns:
            float64 [N, O] for each source that there is.
        """
        targets = []
        if self.shift is not None:
            targets.append((self.shift @ W.float().T).to(torch.float64))
        if self.residual is not None:
            targets.append(self.residual.to(torch.float64))
        return targets
