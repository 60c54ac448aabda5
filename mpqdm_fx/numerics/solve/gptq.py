"""Rounding with error feedback: what a column's rounding did is made up for by later columns.

GPTQ (arXiv 2210.17323) rounds the columns of W one after the other and moves the rest to the
conditional minimum of `tr(E H E^T)`, E = W - Q. With `H = U D U^T`, U unit upper triangular, that
is `q_j = nearest(w_j + E_{<j} U_{<j,j})` (LDLQ, QuIP, arXiv 2307.13304, theorem 6): one factor
instead of an inverse and two factors, and the loss is `sum_j D_j e_j^2` with e_j the distance of
column j to its level. Rows do not meet, so rows of all widths go through together, with one factor.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from mpqdm_fx.numerics.levels.row_levels import ColumnSnapper, RowLevels
from mpqdm_fx.numerics.solve.gram import DOUBLE_WIDTH, Gram, cholesky, second_moments
from mpqdm_fx.numerics.threads import one_thread

__all__ = ["GPTQ_DAMPING", "gptq"]

GPTQ_DAMPING = 0.01
"""Ridge in units of the average diagonal, the usual one."""

_BLOCK = 128

_NARROW = 3
"""N rows of at most so many times N numbers are rounded by their matrix: its one factor costs
K^3 / 3, the factors and products of the dual form about 8 N^2 K."""


def gptq(
    W: Tensor,
    levels: RowLevels,
    gram: Gram,
    *,
    damping: float = GPTQ_DAMPING,
    act_order: bool = True,
    block_size: int | None = None,
) -> Tensor:
    """Round weight rows onto their levels with error feedback.

    Args:
        W: Target rows, float32 [O, K].
        levels: Level set of each row, of any widths.
        gram: Second moments of the rows' inputs.
        damping: Ridge in units of the average diagonal of H, positive.
        act_order: Round the columns of largest energy first.
        block_size: Columns whose feedback is applied at once; changes nothing but speed. By
            default 128, and more in the dual form, which factors once a block.

    Returns:
        int8 codes [O, K].

    Raises:
        CalibrationError: The moments have no factor.
    """
    order = torch.arange(gram.width, device=W.device)
    if act_order:
        order = torch.argsort(gram.diagonal, descending=True, stable=True)
    # In float64 where the factor is: a code that flips in the last digit moves all after it.
    # In units of each row's scale, in which all rows have integer levels.
    target = W.to(gram.dtype)[:, order]
    target = target / levels.scale.to(target)[:, None]
    codes = torch.empty_like(target)
    feedback = _feedback(gram, order, damping, len(W))
    snapper = levels.snapper(target)
    for block in _blocks(gram.width, block_size or feedback.block_size):
        upper, shift = feedback.block(block)
        codes[:, block] = _round_block(target[:, block] + shift, snapper, upper)
        feedback.commit(block, target[:, block] - codes[:, block])
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result.to(torch.int8)


def _blocks(width: int, size: int) -> Iterator[slice]:
    for start in range(0, width, size):
        yield slice(start, min(start + size, width))


def _round_block(target: Tensor, snapper: ColumnSnapper, upper: Tensor) -> Tensor:
    """Codes of one block [O, b]; `upper` is its unit upper factor [b, b]."""
    # A column is a row here: contiguous. In the snapper's units, of two levels' distance.
    columns = target.T.contiguous() / 2
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    row_errors, couplings = errors.T, upper.T.contiguous().unbind()
    parts = zip(columns.unbind(), codes.unbind(), errors.unbind(), strict=True)
    with one_thread():
        for index, (column, code, error) in enumerate(parts):
            value = column
            if index:
                value = torch.addmv(column, row_errors[:, :index], couplings[index][:index])
            snapper(value, code)
            torch.sub(column, code, out=error)
    return 2 * codes.T


class _Feedback(Protocol):
    """What the rounding of earlier blocks asks of a block, and how its own columns are coupled.

    The shift is the block's conditional minimum given the errors before it, all later columns free;
    inside the block, errors count from there. `block` is called for one block after the other, each
    followed by its `commit`. `block_size` is how many columns are best taken at once.
    """

    block_size: int

    def block(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Unit upper factor [b, b] of the columns, and their shift [O, b]."""

    def commit(self, columns: slice, errors: Tensor) -> None:
        """Take the final errors W - Q [O, b] of the columns."""


def _feedback(gram: Gram, order: Tensor, damping: float, rows: int) -> _Feedback:
    matrix = gram.matrix
    if matrix is None and gram.width <= min(_NARROW * gram.count, DOUBLE_WIDTH):
        assert gram.rows is not None
        matrix = second_moments(gram.rows)
    if matrix is None:
        return _DualFeedback(gram, order, damping, rows)
    return _PrimalFeedback(matrix.to(gram.dtype), order, gram.ridge(damping), rows)


def _unit_upper(matrix: Tensor, ridge: float) -> Tensor:
    """U of `matrix + ridge I = U D U^T`, unit upper triangular.

    The lower factor of the matrix with both axes reversed, reversed again.
    """
    lower, _ = cholesky(matrix.flip(0, 1), ridge)
    upper = lower.flip(0, 1)
    return upper / upper.diagonal()


class _PrimalFeedback:
    block_size = _BLOCK

    def __init__(self, matrix: Tensor, order: Tensor, ridge: float, rows: int) -> None:
        # rows are gathered twice: a row lies together, a column does not
        self._upper = _unit_upper(matrix[order].T.contiguous()[order].T, ridge)
        self._errors = self._upper.new_zeros(rows, len(order))

    def block(self, columns: slice) -> tuple[Tensor, Tensor]:
        before = slice(0, columns.start)
        upper = self._upper[columns, columns]
        rhs = self._errors[:, before] @ self._upper[before, columns]
        return upper, torch.linalg.solve_triangular(
            upper, rhs, upper=True, left=False, unitriangular=True
        )

    def commit(self, columns: slice, errors: Tensor) -> None:
        self._errors[:, columns] = errors


class _DualFeedback:
    """The same numbers from the rows X [N, K], N < K, without a K x K matrix.

    With R = E X^T (the output error so far, [O, N]), c = N * ridge, and for a block B followed by
    the columns T: `M_S = X_S X_S^T + c I` over the columns S, N x N. Then the shift of the block is
    `R M_{B+T}^-1 X_B`, and its columns are coupled by `c (I + X_B^T M_T^-1 X_B)`, the Schur
    complement of T in N (H + ridge I) (push-through identity). Here all of it is divided by N.
    """

    def __init__(self, gram: Gram, order: Tensor, damping: float, rows: int) -> None:
        assert gram.rows is not None
        self._x = gram.rows[:, order]
        self._ridge = gram.ridge(damping)
        self._dtype = gram.dtype
        self._count = gram.count
        self.block_size = max(_BLOCK, gram.count // 4)
        kernel = self._kernel(slice(0, gram.width))
        self._factor, self._ridge = cholesky(kernel, self._ridge)
        self._remaining = kernel
        self._output = kernel.new_zeros(rows, gram.count)

    def _kernel(self, columns: slice) -> Tensor:
        total = torch.zeros(self._count, self._count, dtype=self._dtype, device=self._x.device)
        for part in torch.split(self._x[:, columns], 1024, dim=1):
            wide = part.to(self._dtype)
            total += wide @ wide.T
        return total / self._count

    def block(self, columns: slice) -> tuple[Tensor, Tensor]:
        x = self._x[:, columns]
        solved = torch.cholesky_solve(x.to(self._dtype), self._factor)
        shift = self._output @ solved / self._count
        return self._coupling(columns), shift

    def _coupling(self, columns: slice) -> Tensor:
        """Advance past the block: the unit upper factor of its conditional moments."""
        self._remaining = self._remaining - self._kernel(columns)
        self._factor, _ = cholesky(self._remaining, self._ridge)
        x = self._x[:, columns].to(self._dtype)
        half = torch.linalg.solve_triangular(self._factor, x, upper=False)
        schur = self._ridge / self._count * (half.T @ half)
        return _unit_upper(schur, self._ridge)

    def commit(self, columns: slice, errors: Tensor) -> None:
        self._output += errors @ self._x[:, columns].T.to(errors)
