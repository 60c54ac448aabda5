"""After rounding: levels fitted to the codes, codes moved to better levels, never for the worse.

Rounding once, column by column, is greedy. Two exact block minimisations of the layer's own error
`tr((W - Q) H (W - Q)^T)` improve on it: the best scale for given codes (one number a row), and the
best code of one weight with all others fixed (coordinate descent, as in QuantEase,
arXiv 2309.01885). Rows do not meet, so each row keeps what lowered its error.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mpqdm_fx.numerics.levels.grids import MIN_SCALE, max_scale
from mpqdm_fx.numerics.levels.row_levels import ColumnSnapper, RowLevels
from mpqdm_fx.numerics.solve.gptq import GPTQ_DAMPING
from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.threads import one_thread

__all__ = ["refine"]

_BLOCK = 128
_TOP = 127


def refine(
    W: Tensor,
    codes: Tensor,
    levels: RowLevels,
    gram: Gram,
    *,
    passes: int,
    damping: float = GPTQ_DAMPING,
    refit: bool = True,
) -> tuple[Tensor, RowLevels]:
    """Alternate scale refits and coordinate descent over all weights.

    Args:
        W: Target rows, float32 [O, K].
        codes: int8 [O, K], each one of its row's levels.
        levels: Level sets; codebook tables stay, scales may move.
        gram: Second moments of the rows' inputs.
        passes: Rounds over all columns; 0 returns what came in.
        damping: Ridge in units of the average diagonal of H, as for `gptq`, positive.
        refit: Whether scales may move.

    Returns:
        Codes and levels; no row's damped error is above what it was.
    """
    if not passes:
        return codes, levels
    moments = _Moments(gram, damping)
    target = W.to(gram.dtype)
    image = moments.image(target)
    state = _State.of(target, codes.to(gram.dtype), levels, moments)
    best, best_scale, best_error = codes.clone(), levels.scale.clone(), state.error()
    active = torch.arange(len(W), device=W.device)
    for _ in range(passes):
        if refit:
            state = state.refitted(target, image)
        state.descend()
        error = state.error()
        # A row that did not improve would start from the same place again.
        better = (error < best_error).nonzero()[:, 0]
        if not len(better):
            break
        active, best_error = active[better], error[better]
        target, image, state = target[better], image[better], state.take(better)
        best[active] = state.codes.to(torch.int8)
        best_scale[active.to(best_scale.device)] = state.levels.scale
    return best, replace(levels, scale=best_scale)


class _Moments:
    """Products with `H + ridge I`, in the precision of factors.

    A matrix E [O, K] has an image that all of them follow from: in the primal form
    `E (H + ridge I)` [O, K], in the dual form `E X^T / sqrt(N)` [O, N].
    """

    def __init__(self, gram: Gram, damping: float) -> None:
        self.ridge = gram.ridge(damping)
        self.dtype = gram.dtype
        self._matrix: Tensor | None = None
        self._rows: Tensor | None = None
        if gram.matrix is not None:
            self._matrix = gram.matrix.to(gram.dtype, copy=True)
            self._matrix.diagonal().add_(self.ridge)
        else:
            assert gram.rows is not None
            self._rows = gram.rows.to(gram.dtype) / gram.count**0.5

    def image(self, left: Tensor, columns: slice = slice(None)) -> Tensor:
        """Image of a matrix, or of one that has these columns alone."""
        if self._matrix is not None:
            return left @ self._matrix[columns]
        assert self._rows is not None
        return left @ self._rows[:, columns].T

    def inner(self, left: Tensor, left_image: Tensor, right: Tensor, right_image: Tensor) -> Tensor:
        """`diag(left (H + ridge I) right^T)`, float64 [O]."""
        if self._matrix is not None:
            return (left_image * right).sum(dim=1, dtype=torch.float64)
        shared = (left_image * right_image).sum(dim=1, dtype=torch.float64)
        return shared + self.ridge * (left * right).sum(dim=1, dtype=torch.float64)

    def gradient(self, left: Tensor, image: Tensor, columns: slice) -> Tensor:
        """`left (H + ridge I)` at some columns, [O, b]."""
        if self._matrix is not None:
            return image[:, columns]
        assert self._rows is not None
        return image @ self._rows[:, columns] + self.ridge * left[:, columns]

    def among(self, columns: slice) -> Tensor:
        """`H + ridge I` among some columns, [b, b]."""
        if self._matrix is not None:
            return self._matrix[columns, columns]
        assert self._rows is not None
        block = self._rows[:, columns].T @ self._rows[:, columns]
        block.diagonal().add_(self.ridge)
        return block


@dataclass(frozen=True, kw_only=True)
class _State:
    """Codes on their way, in units of each row's scale, in which all rows have integer levels.

    Attributes:
        moments: Of the rows' inputs.
        levels: Level sets.
        codes: Float [O, K].
        errors: `W / scale - codes`.
        image: Image of the errors.
    """

    moments: _Moments
    levels: RowLevels
    codes: Tensor
    errors: Tensor
    image: Tensor

    @classmethod
    def of(cls, W: Tensor, codes: Tensor, levels: RowLevels, moments: _Moments) -> Self:
        errors = W / levels.scale.to(W)[:, None] - codes
        return cls(
            moments=moments,
            levels=levels,
            codes=codes,
            errors=errors,
            image=moments.image(errors),
        )

    @property
    def _scale(self) -> Tensor:
        return self.levels.scale.to(self.codes)[:, None]

    def error(self) -> Tensor:
        """Damped error of each row in the units of the weights, float64 [O]."""
        units = self.moments.inner(self.errors, self.image, self.errors, self.image)
        return units * self._scale[:, 0].to(torch.float64).square()

    def take(self, rows: Tensor) -> "_State":
        """Some of the rows."""
        return _State(
            moments=self.moments,
            levels=self.levels.take(rows),
            codes=self.codes[rows],
            errors=self.errors[rows],
            image=self.image[rows],
        )

    def refitted(self, W: Tensor, image: Tensor) -> "_State":
        """The same codes with the least-squares scale, where that is a positive number.

        Args:
            W: Target rows [O, K].
            image: Their image.
        """
        code_image = image / self._scale - self.image
        cross = self.moments.inner(self.codes, code_image, W, image)
        power = self.moments.inner(self.codes, code_image, self.codes, code_image)
        scale = (cross / power.clamp_min(1e-300)).to(self.levels.scale.device)
        # `max_scale`: any int8 level that the descent may move to stays a finite float32.
        usable = torch.isfinite(scale) & (scale > MIN_SCALE) & (scale < max_scale(_TOP))
        levels = self.levels.with_scale(torch.where(usable, scale.float(), self.levels.scale))
        if self.moments.dtype != torch.float64:
            return _State.of(W, self.codes.clone(), levels, self.moments)
        step = levels.scale.to(W)[:, None]  # what cancels here leaves enough digits of a double
        return _State(
            moments=self.moments,
            levels=levels,
            codes=self.codes.clone(),
            errors=W / step - self.codes,
            image=image / step - code_image,
        )

    def descend(self) -> None:
        """One round of coordinate descent: each weight to the level nearest to its best, in place.

        A weight's best is conditional: all others are fixed.
        """
        snapper, width = self.levels.snapper(self.codes), self.codes.shape[1]
        for start in range(0, width, _BLOCK):
            columns = slice(start, min(start + _BLOCK, width))
            gradient = self.moments.gradient(self.errors, self.image, columns)
            changes = _descend_block(
                self.codes[:, columns], gradient, self.moments.among(columns), snapper
            )
            self.codes[:, columns] -= changes
            self.errors[:, columns] += changes
            self.image.add_(self.moments.image(changes, columns))


def _descend_block(
    codes: Tensor, gradient: Tensor, block: Tensor, snapper: ColumnSnapper
) -> Tensor:
    """What one block's codes [O, b] give up: old minus new, column after column.

    Args:
        codes: Codes before.
        gradient: `E (H + ridge I)` at the block's columns, [O, b].
        block: `H + ridge I` among them, [b, b].
        snapper: The rows' levels.
    """
    # A column is a row here: contiguous. In the snapper's units, of two levels' distance.
    before, slopes = codes.T.contiguous() / 2, gradient.T.contiguous() / 2
    steps, couplings = (1 / block.diagonal()).unbind(), block.contiguous().unbind()
    changes = torch.empty_like(before)
    moves = changes.T
    columns = zip(before.unbind(), slopes.unbind(), changes.unbind(), strict=True)
    with one_thread():
        for index, (code, slope, change) in enumerate(columns):
            if index:
                slope = torch.addmv(slope, moves[:, :index], couplings[index][:index])
            snapper(torch.addcmul(code, slope, steps[index]), change)
            torch.sub(code, change, out=change)
    return 2 * changes.T
