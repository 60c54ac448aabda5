"""Rounding to whole numbers that an entropy coder stores: the step is all that is chosen.

At a step d an error of d^2 / 12 costs about log2(spread / d) bits a weight. The least error of the
model's output for the bits of all rows together is where a bit brings equally much everywhere:
the squared step of each row inversely as what it does to the output (Gish and Pierce 1968),

    d_i^2 = pitch / (s_i E x^2),

with s_i what an error of row i's output does to the model's output, and one pitch for the model.
Codes are found with error feedback and descent as of fixed widths (`gptq`, `refine`), on second
moments that are shrunk towards the diagonal, and as they are; held-out rows choose. Feedback that
leans on correlations of some thousand rows may not hold on others: on `digits` at two bits, with
moments as they are, it is worse than none by 3 to 5 dB. Where it holds it gains 3 dB. (With a price
for each code's bits in the search for codes nothing is gained.)
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from mpqdm_fx.numerics.levels.entropy_code import CodeClasses
from mpqdm_fx.numerics.levels.grids import MAX_BITS, MIN_SCALE, round_scale
from mpqdm_fx.numerics.levels.rans import TOP
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.gptq import gptq
from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.refine import refine

__all__ = ["SHRINKAGES", "bit_price", "coded_size", "first_steps", "round_coded", "shrunk"]

SHRINKAGES = (5.0, 0.0)
"""Off the diagonal the second moments are divided by 1 + these; held-out rows choose."""

_HEADROOM = 2  # codes that feedback may go beyond a row's largest weight


def first_steps(W: Tensor, sensitivity: Tensor, energy: float, pitch: float) -> Tensor:
    """Steps of rows.

    Args:
        W: Rows [O, K].
        sensitivity: What an error of a row's output does to the model's output, float64 [O].
        energy: Mean square of the inputs.
        pitch: Of the whole model.

    Returns:
        Positive bfloat16 values, float32 [O]: as above, but no weight leaves int8, and the step is
        at most four times the largest weight.
    """
    largest = W.abs().amax(dim=1).double()
    steps = (pitch / (sensitivity.clamp_min(1e-30) * max(energy, 1e-30))).sqrt()
    steps = steps.to(largest).clamp(min=largest / (TOP - _HEADROOM), max=4 * largest)
    return round_scale(steps.clamp_min(2 * MIN_SCALE).float())


def bit_price(pitch: float) -> float:
    """Squared error of the output that a bit is worth at high rates: `-dD/dR` of `d^2 / 12`."""
    return pitch * math.log(2) / 6


def shrunk(gram: Gram, rows: Tensor, shrinkage: float) -> Gram:
    """Second moments nearer to their diagonal, which stays.

    Args:
        gram: Second moments.
        rows: The rows that they are of, [N, K], for a matrix where `gram` has none.
        shrinkage: All others are divided by one more than this; 0 leaves them.
    """
    if not shrinkage:
        return gram
    matrix = gram.matrix
    if matrix is None:
        matrix = Gram.of(rows, form="primal").matrix
        assert matrix is not None
    near = matrix / (1 + shrinkage)
    near.diagonal().copy_(matrix.diagonal())
    return replace(gram, matrix=near, rows=None)


def round_coded(W: Tensor, steps: Tensor, gram: Gram, *, passes: int) -> tuple[Tensor, RowLevels]:
    """Round rows to whole numbers within int8.

    Args:
        W: Target rows, float32 [O, K].
        steps: Steps, float32 [O]; they stay, since a step that is refitted takes other bits.
        gram: From `shrunk`.
        passes: Rounds of descent; see `refine`.

    Returns:
        int8 codes [O, K], and levels of 8 bits whose scales are the steps.

    Raises:
        CalibrationError: The moments have no factor.
    """
    bits = torch.full((len(W),), MAX_BITS)
    levels = RowLevels(bits=bits, scale=steps, tables=None)
    return refine(W, gptq(W, levels, gram), levels, gram, passes=passes, refit=False)


def coded_size(codes: Tensor, places: int) -> float:
    """Bits that codes [O, K] take, without scales.

    Args:
        codes: int8 [O, K].
        places: Places of the kernel, of which K is a multiple.
    """
    classes = CodeClasses.of(codes.cpu(), places)
    return float(classes.bits(codes.cpu()).sum()) + classes.header_bits
