"""Rounding to whole numbers of any size at a price: least error plus what the code takes.

For a row w with step d and second moments H, the codes q minimise

    s (w - d q) H (w - d q)^T + price * bits(q)

where s is what the row's error does to the model's output. Two searches that `gptq` and `refine`
have without a price: one column after the other with error feedback (LDLQ, QuIP, arXiv 2307.13304),
then one weight at a time with all others fixed. A weight may go to the numbers beside its best, to
those nearer to zero, and to zero: the choice of rate-distortion quantization in video coders.

Steps are equal in what they cost: d^2 proportional to price / s, as at high rates the slope of
error over bits is (Gish and Pierce 1968). H is shrunk towards its diagonal: a price lets errors be
large, and feedback that leans on correlations of few rows does not hold on others.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.numerics.levels.entropy_code import TOP, CodeClasses, code_lengths
from mpqdm_fx.numerics.levels.grids import MIN_SCALE, round_scale
from mpqdm_fx.numerics.threads import one_thread

__all__ = ["CodedRows", "first_steps", "round_with_rate", "shrunk_moments"]

SHRINKAGE = 5.0
"""Multiple of the diagonal that is added to the second moments."""

FINENESS = 0.006
"""price / (s d^2 E x^2): smaller is a coarser step, and fewer weights at a price's best.

Measured on `digits`: 0.006 is best of 0.001 to 0.12 at two bits, and flat around."""

_RIDGE = 1e-4  # of the mean diagonal
_BLOCK = 128
_ROUNDS, _PASSES = 3, 3
_WIDE = 2 * TOP + 1


def shrunk_moments(matrix: Tensor) -> Tensor:
    """H nearer to its diagonal: off it, 1 / (1 + SHRINKAGE) of it; float64 [K, K].

    Args:
        matrix: Second moments, [K, K].
    """
    moments = matrix.double() / (1 + SHRINKAGE)
    diagonal = matrix.diagonal().double()
    moments.diagonal().copy_(diagonal + _RIDGE * diagonal.mean() + 1e-30)
    return moments


def first_steps(W: Tensor, sensitivity: Tensor, energy: float, price: float) -> Tensor:
    """Steps of rows at a price, bfloat16 values, float64 [O].

    Args:
        W: Rows [O, K].
        sensitivity: What a row's error does to the model's output, float64 [O].
        energy: Mean square of the inputs.
        price: Squared error of the output that a bit may cost.
    """
    largest = W.abs().amax(dim=1).double()
    steps = (price / (FINENESS * sensitivity.clamp_min(1e-30) * max(energy, 1e-30))).sqrt()
    steps = steps.clamp(min=largest / (TOP - 7), max=4 * largest)
    return round_scale(steps.clamp_min(MIN_SCALE).float()).double()


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedRows:
    """Rows on their way.

    Attributes:
        codes: Whole numbers, float64 [O, K].
        steps: bfloat16 values, float64 [O].
        classes: How the codes are stored.
    """

    codes: Tensor
    steps: Tensor
    classes: CodeClasses

    @property
    def bits(self) -> float:
        """What the codes and their classes take."""
        return float(self.classes.bits(self.codes).sum()) + self.classes.header_bits

    def fitted(self) -> Self:
        """The same codes with classes that fit them."""
        return replace(self, classes=self.classes.fitted(self.codes))


def round_with_rate(
    W: Tensor, moments: Tensor, sensitivity: Tensor, steps: Tensor, price: float, places: int
) -> CodedRows:
    """Codes of rows at a price.

    Args:
        W: Target rows [O, K].
        moments: From `shrunk_moments`, float64 [K, K].
        sensitivity: What a row's error does to the model's output, float64 [O].
        steps: First steps, float64 [O]; see `first_steps`.
        price: Squared error of the output that a bit may cost.
        places: Places of the kernel, of which K is a multiple.

    Returns:
        No row's objective is above what it was after the rounding with feedback.

    Raises:
        CalibrationError: The moments have no factor.
    """
    target = W.double()
    nearest = (target / steps[:, None]).round().clamp(-TOP, TOP)
    rows = CodedRows(codes=nearest, steps=steps, classes=CodeClasses.of(nearest, places))
    feedback = _Feedback.of(moments)
    for _ in range(2):
        picker = _Picker.of(rows, sensitivity, price)
        rows = replace(rows, codes=feedback.round(target / steps[:, None], picker)).fitted()
    for _ in range(_ROUNDS):
        rows = _refitted(rows, target, moments)
        picker = _Picker.of(rows, sensitivity, price)
        codes = _descend(target / rows.steps[:, None], rows.codes, moments, picker)
        rows = replace(rows, codes=codes).fitted()
    return rows


def _refitted(rows: CodedRows, target: Tensor, moments: Tensor) -> CodedRows:
    """The same codes with the steps of least error, where those are positive numbers."""
    image = rows.codes @ moments
    cross, power = (image * target).sum(dim=1), (image * rows.codes).sum(dim=1)
    steps = cross / power.clamp_min(1e-300)
    usable = (power > 0) & (steps > MIN_SCALE) & torch.isfinite(steps)
    fitted = round_scale(torch.where(usable, steps, rows.steps).float()).double()
    return replace(rows, steps=fitted)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Picker:
    """The number of least error and price for weights of one column.

    Attributes:
        prices: Price of a bit in squared steps of each row, over its sensitivity [O].
        starts: Where a weight's class begins among all code lengths, int64 [K, O].
        lengths: Bits of every code in every class, flat.
    """

    prices: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: CodedRows, sensitivity: Tensor, price: float) -> Self:
        prices = price / (sensitivity.clamp_min(1e-30) * rows.steps.square())
        starts = rows.classes.of_weights() * _WIDE + TOP
        return cls(
            prices=prices,
            starts=starts.T.contiguous(),
            lengths=code_lengths().double().flatten(),
        )

    def __call__(self, values: Tensor, weight: Tensor, column: int) -> Tensor:
        """Codes of one column.

        Args:
            values: Where its errors are zero, in steps [O].
            weight: What squared errors count, a number.
            column: Which one.
        """
        near = values.round().clamp_(-TOP, TOP)
        inward = torch.sign(near)
        outward = torch.where(values >= near, 1.0, -1.0)
        one = near - inward
        tried = torch.stack(
            [near, one, one - torch.sign(one), torch.zeros_like(near), near + outward]
        ).clamp_(-TOP, TOP)
        lengths = self.lengths[self.starts[column] + tried.long()]
        costs = (values - tried).square_().mul_(weight).addcmul_(lengths, self.prices)
        return tried.gather(0, costs.argmin(dim=0, keepdim=True))[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Feedback:
    """H = U D U^T with columns of large energy first: how errors of columns reach later ones.

    Attributes:
        order: Columns in running order, int64 [K].
        upper: U, unit upper triangular, float64 [K, K], in that order.
        weights: D, float64 [K].
    """

    order: Tensor
    upper: Tensor
    weights: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Self:
        order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        lower, info = torch.linalg.cholesky_ex(moments[order][:, order].flip(0, 1))
        if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
            raise CalibrationError(
                f"second moments of shape {tuple(moments.shape)} have no Cholesky factor; the "
                "calibration data is degenerate or holds NaN"
            )
        upper = lower.flip(0, 1)
        diagonal = upper.diagonal().clone()
        return cls(order=order, upper=upper / diagonal, weights=diagonal.square())

    def round(self, target: Tensor, picker: _Picker) -> Tensor:
        """Codes of targets [O, K] in steps, column after column."""
        ordered = target[:, self.order].T.contiguous()
        codes, errors = torch.empty_like(ordered), torch.empty_like(ordered)
        columns = self.order.tolist()
        for start in range(0, len(columns), _BLOCK):
            stop = min(start + _BLOCK, len(columns))
            shifted = ordered[start:stop] + self.upper[:start, start:stop].T @ errors[:start]
            with one_thread():
                for place in range(start, stop):
                    value = shifted[place - start]
                    if place > start:
                        coupling = self.upper[start:place, place]
                        value = torch.addmv(value, errors[start:place].T, coupling)
                    codes[place] = picker(value, self.weights[place], columns[place])
                    torch.sub(ordered[place], codes[place], out=errors[place])
        result = torch.empty_like(target)
        result[:, self.order] = codes.T
        return result


def _descend(target: Tensor, codes: Tensor, moments: Tensor, picker: _Picker) -> Tensor:
    """Rounds over all columns: each weight to its best number with all others fixed.

    Args:
        target: In steps [O, K].
        codes: [O, K].
        moments: H [K, K].
        picker: Prices and classes.
    """
    codes = codes.T.contiguous()
    slopes = moments @ (target.T - codes)  # [K, O]
    diagonal = moments.diagonal()
    for _ in range(_PASSES):
        moved = False
        for start in range(0, len(codes), _BLOCK):
            stop = min(start + _BLOCK, len(codes))
            block, among = codes[start:stop], moments[start:stop, start:stop]
            before, local = block.clone(), slopes[start:stop].clone()
            with one_thread():
                for place in range(stop - start):
                    weight = diagonal[start + place]
                    value = block[place] + local[place] / weight
                    best = picker(value, weight, start + place)
                    change = block[place] - best
                    block[place] = best
                    local.addr_(among[:, place], change)
            changes = before - block
            if bool(changes.any()):
                moved = True
                slopes += moments[:, start:stop] @ changes
        if not moved:
            break
    return codes.T.contiguous()
