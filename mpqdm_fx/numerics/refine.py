"""After rounding: levels fitted to the codes, codes moved to better levels, never for the worse.

Rounding once, column by column, is greedy. Two exact block minimisations of the layer's own error
`tr((W - Q) H (W - Q)^T)` improve on it: the best scale for given codes (one number a row), and the
best code of one weight with all others fixed (coordinate descent, as in QuantEase,
arXiv 2309.01885). Rows do not meet, so each row keeps what lowered its error.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mpqdm_fx.numerics.gptq import GPTQ_DAMPING
from mpqdm_fx.numerics.gram import Gram
from mpqdm_fx.numerics.grids import MIN_SCALE, max_scale
from mpqdm_fx.numerics.levels import ColumnSnapper, RowLevels
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
) -> tuple[Tensor, RowLevels]:
    """Alternate scale refits and coordinate descent over all weights.

    Args:
        W: Target rows, float32 [O, K].
        codes: int8 [O, K], each one of its row's levels.
        levels: Level sets; codebook tables stay, scales may move.
        gram: Second moments of the rows' inputs.
        passes: Rounds over all columns; 0 returns what came in.
        damping: Ridge in units of the average diagonal of H, as for `gptq`, positive.

    Returns:
        Codes and levels; no row's damped error is above what it was.
    """
    best, best_levels = codes, levels
    best_error = _errors(W, codes, levels, gram, damping)
    current, current_levels = codes, levels
    for _ in range(passes):
        current_levels = _refit_scale(W, current, current_levels, gram, damping)
        current = _descend(W, current, current_levels, gram, damping)
        error = _errors(W, current, current_levels, gram, damping)
        better = error < best_error
        if not bool(better.any()):
            break
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[:, None], current, best)
        scale = torch.where(better.to(levels.scale.device), current_levels.scale, best_levels.scale)
        best_levels = replace(best_levels, scale=scale)
        current, current_levels = best, best_levels
    return best, best_levels


def _errors(W: Tensor, codes: Tensor, levels: RowLevels, gram: Gram, damping: float) -> Tensor:
    difference = W.to(gram.dtype) - codes.to(gram.dtype) * levels.scale.to(gram.dtype)[:, None]
    penalty = gram.ridge(damping) * difference.square().sum(dim=1).to(torch.float64)
    return gram.quadratic(difference) + penalty


def _refit_scale(
    W: Tensor, codes: Tensor, levels: RowLevels, gram: Gram, damping: float
) -> RowLevels:
    """Least-squares scale of each row for its codes; kept where it is a positive number."""
    q = codes.to(gram.dtype)
    ridge = gram.ridge(damping)
    moved = gram.multiply(q) + ridge * q.to(torch.float64)
    cross = (moved * W.to(torch.float64)).sum(dim=1)
    power = (moved * q.to(torch.float64)).sum(dim=1)
    scale = (cross / power.clamp_min(1e-300)).to(levels.scale.device)
    # `max_scale`: any int8 level that the descent may move to stays a finite float32.
    usable = torch.isfinite(scale) & (scale > MIN_SCALE) & (scale < max_scale(_TOP))
    return levels.with_scale(torch.where(usable, scale.float(), levels.scale))


def _descend(W: Tensor, codes: Tensor, levels: RowLevels, gram: Gram, damping: float) -> Tensor:
    """One round of coordinate descent: each weight to the level nearest to its conditional best."""
    # In units of each row's scale, in which all rows have integer levels.
    target = W.to(gram.dtype)
    target = target / levels.scale.to(target)[:, None]
    result = codes.to(gram.dtype)
    ridge = gram.ridge(damping)
    errors = target - result
    state = _Gradient(gram, errors)
    snapper = levels.snapper(target)
    for start in range(0, gram.width, _BLOCK):
        columns = slice(start, min(start + _BLOCK, gram.width))
        own = state.moments(columns)
        own.diagonal().add_(ridge)
        gradient = state.gradient(columns) + ridge * errors[:, columns]
        changes = _descend_block(result[:, columns], gradient, own, snapper)
        result[:, columns] -= changes
        errors[:, columns] += changes
        state.commit(columns, changes)
    return result.to(torch.int8)


def _descend_block(codes: Tensor, gradient: Tensor, own: Tensor, snapper: ColumnSnapper) -> Tensor:
    """What one block's codes [O, b] give up: old minus new, column after column.

    Args:
        codes: Codes before.
        gradient: `E (H + ridge I)` at the block's columns, [O, b].
        own: `H + ridge I` among them, [b, b].
        snapper: The rows' levels.
    """
    before, slopes = codes.T.contiguous(), gradient.T.contiguous()  # a column is a row here
    step = 1 / own.diagonal()
    changes = torch.empty_like(before)
    with one_thread():
        for index in range(len(before)):
            slope = slopes[index]
            if index:
                slope = torch.addmv(slope, changes[:index].T, own[index, :index])
            wanted = torch.addcmul(before[index], slope, step[index])
            torch.sub(before[index], snapper(wanted), out=changes[index])
    return changes.T


class _Gradient:
    """`E H`, block by block, kept up to date while E changes."""

    def __init__(self, gram: Gram, errors: Tensor) -> None:
        self._gram = gram
        self._matrix = None if gram.matrix is None else gram.matrix.to(errors)
        self._x = None if gram.rows is None else gram.rows.to(errors)
        if self._matrix is not None:
            self._state = errors @ self._matrix  # E H
        else:
            assert self._x is not None
            self._state = errors @ self._x.T  # the output error, [O, N]

    def moments(self, columns: slice) -> Tensor:
        if self._matrix is not None:
            return self._matrix[columns, columns].clone()
        assert self._x is not None
        x = self._x[:, columns]
        return x.T @ x / self._gram.count

    def gradient(self, columns: slice) -> Tensor:
        if self._matrix is not None:
            return self._state[:, columns].clone()
        assert self._x is not None
        return self._state @ self._x[:, columns] / self._gram.count

    def commit(self, columns: slice, change: Tensor) -> None:
        if self._matrix is not None:
            self._state += change @ self._matrix[columns]
        else:
            assert self._x is not None
            self._state += change @ self._x[:, columns].T
