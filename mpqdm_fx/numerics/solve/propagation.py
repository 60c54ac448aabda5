"""Quantization error propagation: a layer's weights make up for the error that reaches its input.

QEP (arXiv 2504.09629): with inputs X in the float model and X_hat in the model whose earlier layers
are quantized, the target `|X W^T - X_hat Q^T|^2` has the relaxed optimum
`W* = W + alpha W C (H + ridge I)^-1`, C = (X - X_hat)^T X_hat, H = X_hat^T X_hat (equations 3 and
6, proposition 5.1); Q is any rounding of W* under H. Here C is never formed: the correction is the
ridge regression of `(X - X_hat) W^T` on X_hat, which is cheaper and also takes targets that are no
function of the input, such as the error of a residual that the output is added to (LoaQ,
arXiv 2509.06297).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mpqdm_fx.numerics.solve.gram import Gram, Regression
from mpqdm_fx.numerics.solve.layer_rows import LayerRows, in_parts

__all__ = [
    "DAMPINGS",
    "PAPER_DAMPING",
    "Correction",
    "SourceRegressions",
    "choose_correction",
    "fixed_correction",
    "output_error",
]

DAMPINGS = (0.01, 0.1, 1.0, 10.0)
"""Candidates of the ridge in units of H's average diagonal, for the automatic strength."""

PAPER_DAMPING = 1.0
"""The ridge of the paper's released code, for a strength that is given."""

_TRUST = 0.3  # |correction of a row| / |row| at most
_RANGE_GROWTH = 1.25  # of a row of at most 4 bits: a wider range is a coarser grid
_NARROW = 4


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A correction of a layer's weights and how it was chosen.

    Attributes:
        weight: What is added to W, float32 [O, K]; None for nothing.
        alpha: Strength for the input's error, 0 to 1.
        beta: Strength for the residual's error, 0 to 1.
        damping: Ridge in units of H's average diagonal.
        explained: Share of the mismatch on validation rows that the correction removes, before its
            rows are limited and anything is rounded; 0 for a given strength.
    """

    weight: Tensor | None = None
    alpha: float = 0.0
    beta: float = 0.0
    damping: float = 0.0
    explained: float = 0.0


class SourceRegressions:
    """What the rows explain of each source of error, by ridge; each ridge is solved once.

    Args:
        W: Float weight rows [O, K].
        rows: Rows of the layer.
        gram: Moments of `rows.inputs`.
    """

    def __init__(self, W: Tensor, rows: LayerRows, gram: Gram) -> None:
        self._W, self._rows, self._gram = W, rows, gram
        self._solved: dict[float, tuple[Tensor, ...]] = {}

    @cached_property
    def _regression(self) -> Regression | None:
        """Of all sources at once: they share the factor of each ridge."""
        targets = self._rows.targets(self._W)
        if not targets:
            return None
        return self._gram.regression(self._rows.inputs, torch.cat(targets, dim=1))

    def solve(self, damping: float) -> tuple[Tensor, ...]:
        """Weights for each source of `LayerRows.targets`, float32 [O, K] each.

        Args:
            damping: Ridge in units of H's average diagonal.

        Raises:
            CalibrationError: The moments are degenerate.
        """
        if self._regression is None:
            return ()
        if damping not in self._solved:
            solved = self._regression.solve(damping)
            self._solved[damping] = torch.split(solved, len(self._W))
        return self._solved[damping]


def fixed_correction(
    W: Tensor,
    rows: LayerRows,
    gram: Gram,
    alpha: float,
    *,
    damping: float = PAPER_DAMPING,
    regressions: SourceRegressions | None = None,
) -> Correction:
    """The correction of a given strength: the paper's mode (equation 6).

    Args:
        W: Float weight rows [O, K].
        rows: Rows of the layer.
        gram: Moments of `rows.inputs`.
        alpha: Propagation strength, 0 to 1.
        damping: Ridge in units of H's average diagonal.
        regressions: Those of these weights and rows, where they are there already.

    Returns:
        The correction; without weight if the lanes are the same value or the strength is 0.

    Raises:
        CalibrationError: The moments are degenerate.
    """
    if rows.shift is None or alpha == 0:
        return Correction()
    if regressions is None:
        regressions = SourceRegressions(W, replace(rows, residual=None), gram)
    weight = alpha * regressions.solve(damping)[0]
    return Correction(weight=weight, alpha=alpha, damping=damping)


def choose_correction(
    W: Tensor,
    train: LayerRows,
    gram: Gram,
    validation: LayerRows,
    *,
    bits: Tensor | None = None,
    dampings: Sequence[float] = DAMPINGS,
    regressions: SourceRegressions | None = None,
    targets: Sequence[Tensor] | None = None,
) -> Correction:
    """Choose (alpha, damping[, beta]) in closed form on held-out rows.

    For each damping the regressions of the sources on the training rows are combined by the
    strengths in 0..1 that minimise the validation error, a quadratic of one or two numbers; the
    damping of least validation error wins. Rows of the result are scaled down to the trust region
    and, at 4 bits or less, to a bounded growth of the row's range.

    Args:
        W: Float weight rows [O, K].
        train: Rows that the regression sees; `gram` are the moments of its inputs.
        gram: Moments of the training inputs.
        validation: Rows of other trajectories.
        bits: Width of each row, int64 [O]; None leaves the range unguarded.
        dampings: Candidates.
        regressions: Those of the training rows, where they are there already.
        targets: `validation.targets(W)`, where they are there already.

    Returns:
        The correction; without weight if nothing helps on the validation rows.

    Raises:
        CalibrationError: The moments are degenerate.
    """
    if (train.shift is None and train.residual is None) or not len(validation):
        return Correction()
    regressions = regressions or SourceRegressions(W, train, gram)
    total = torch.stack([*(targets or validation.targets(W))]).sum(dim=0)
    energy = float(total.square().sum())
    best, best_gain = Correction(), 0.0
    for damping in dampings:
        weights = regressions.solve(damping)
        outputs = [(validation.inputs @ weight.T).to(torch.float64) for weight in weights]
        strengths, gain = _best_strengths(total, outputs)
        if gain > best_gain:
            best_gain = gain
            best = Correction(
                weight=torch.stack([s * w for s, w in zip(strengths, weights, strict=True)]).sum(0),
                alpha=0.0 if train.shift is None else strengths[0],
                beta=0.0 if train.residual is None else strengths[-1],
                damping=damping,
                explained=gain / energy,
            )
    return best if best.weight is None else replace(best, weight=_limit(W, best.weight, bits))


def _best_strengths(total: Tensor, outputs: list[Tensor]) -> tuple[list[float], float]:
    """Strengths in [0, 1] of one or two outputs that best explain `total`, and the gain."""
    flat = torch.stack(outputs).flatten(1)
    p, q = (flat @ total.flatten()).cpu(), (flat @ flat.T).cpu()

    def gain(s: Tensor) -> float:
        return float(2 * s @ p - s @ q @ s)

    candidates = []
    if len(outputs) == 1:
        candidates.append(torch.stack([_ratio(p[0], q[0, 0])]))
    else:
        free, info = torch.linalg.solve_ex(q, p)
        if int(info) == 0 and bool(((free >= 0) & (free <= 1)).all()):
            candidates.append(free)
        for axis in (0, 1):
            for edge in (0.0, 1.0):  # the optimum on each side of the square, corners included
                s = torch.full((2,), edge, dtype=torch.float64)
                s[axis] = _ratio(p[axis] - edge * q[axis, 1 - axis], q[axis, axis])
                candidates.append(s)
    best = max(candidates, key=gain)
    value = gain(best)
    return best.tolist(), value if math.isfinite(value) else 0.0


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    if float(denominator) <= 0:
        return torch.zeros((), dtype=torch.float64)
    return (numerator / denominator).clamp(0, 1)


def _limit(W: Tensor, weight: Tensor, bits: Tensor | None) -> Tensor:
    """Scale rows of a correction down to the trust region and the bounded range."""
    norm, reach = W.float().norm(dim=1), W.float().abs().amax(dim=1)
    factor: Tensor = (_TRUST * norm / weight.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)
    if bits is not None:
        room = (_RANGE_GROWTH - 1) * reach / weight.abs().amax(dim=1).clamp_min(1e-30)
        grown = (W.float() + factor[:, None] * weight).abs().amax(dim=1) > _RANGE_GROWTH * reach
        narrow = (bits.to(W.device) <= _NARROW) & grown
        factor = torch.where(narrow, torch.minimum(factor, room), factor)
    return factor[:, None] * weight


def output_error(difference: Tensor, inputs: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Mean squared error of each output channel against the float lane.

    `|X W^T + R - (X_hat Q^T + R_hat)|^2 / N`. What a bias takes up is subtracted from the rows, and
    what rows count is multiplied in, before: see `LayerRows.fitted`.

    Args:
        difference: Float less rounded weight rows W - Q, [O, K].
        inputs: Rows X_hat to measure on, float32 [N, K].
        targets: `LayerRows.targets` of these rows and W.

    Returns:
        float64 [O].
    """
    weight = difference.float().T
    parts = in_parts(inputs, len(difference))
    total = torch.zeros(len(difference), dtype=torch.float64, device=inputs.device)
    aims = [torch.split(target, len(parts[0])) for target in targets]
    for index, part in enumerate(parts):
        error = (part @ weight).to(torch.float64)
        for aim in aims:
            error += aim[index]
        total += error.square_().sum(dim=0)
    return total / len(inputs)
