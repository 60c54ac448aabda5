"""One layer: correct its weights for the error that reaches it, round them, refit its bias."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import weight_rows
from mpqdm_fx.numerics.halves import fits_half
from mpqdm_fx.numerics.lazy_tensor import row_blocks
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.gptq import gptq
from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.propagation import (
    Correction,
    SourceRegressions,
    choose_correction,
    fixed_correction,
)
from mpqdm_fx.numerics.solve.refine import refine
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.sweep.problem import LayerData, Problem

PAPER_STRENGTH = 0.5
"""Propagation strength of QEP's main results (arXiv 2504.09629)."""

_TABLE_NUMBERS = 1 << 22  # of an embedding table, rounded at once
_WIDE = 6  # bits from which rows rounded with feedback may do without clipping

logger = logging.getLogger(__name__)

__all__ = [
    "Candidate",
    "GroupResult",
    "LayerSolution",
    "join_groups",
    "solve_group",
    "solve_layer",
    "solve_table",
]


@dataclass(frozen=True, kw_only=True)
class LayerSolution:
    """What the sweep installs for one layer, and how it came about.

    Attributes:
        plan: Bits and levels.
        codes: int8, the weight's shape.
        scale: float32 [O], bfloat16 values.
        bias: New bias [O], or None for a layer without one (or without correction).
        alpha: Propagation strength for the input's error.
        beta: Strength for the residual's error.
        damping: Ridge of the correction in units of the average diagonal.
        mismatch: Energy of the target's error that reaches the layer over the output's energy.
        base_error: Validation error of the layer without correction, over the output's energy.
        error: Validation error of what was installed, over the output's energy.
        rows: Rows it was fitted to.
        seconds: Wall time.
    """

    plan: LayerPlan
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    alpha: float = 0.0
    beta: float = 0.0
    damping: float = 0.0
    mismatch: float = 0.0
    base_error: float = 0.0
    error: float = 0.0
    rows: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One rounding of a group.

    Attributes:
        codes: int8 [O, K].
        levels: Their levels.
        correction: What the target was corrected by.
        error: Of each channel on the rows that judge, float64 [O].
    """

    codes: Tensor
    levels: RowLevels
    correction: Correction
    error: Tensor

    @property
    def weight(self) -> Tensor:
        """Rounded rows, float32 [O, K]."""
        return _dequantized(self.codes, self.levels)

    @property
    def total(self) -> float:
        """Error of all channels."""
        return float(self.error.sum())


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What is installed for one group of a layer.

    Attributes:
        best: The rounding.
        bias: What the bias gains, float64 [O], or None if it stays.
        energies: Signal, mismatch, base error, error, float64 [4].
    """

    best: Candidate
    bias: Tensor | None
    energies: Tensor


def solve_layer(
    module: nn.Module, plan: LayerPlan, data: LayerData, settings: MPQConfig
) -> LayerSolution:
    """Correct and round one convolution or linear layer.

    Every correction has to lower the error on held-out rows, each row counted by what errors in it
    do to the model's output. With `propagation="auto"` the layer is rounded without correction,
    with the one that the held-out rows chose and with the paper's, in one run, and the one of least
    error is kept; so is its refinement, and the refit of its bias. No layer is worse than its base
    there.

    Args:
        module: The float layer; it is not changed.
        plan: Bits and levels of its channels.
        data: Its rows in both lanes.
        settings: Rounding, propagation, refinement.

    Raises:
        CalibrationError: The rows hold NaN or infinity, or their moments have no factor.
    """
    start = time.perf_counter()
    rows = weight_rows(module).float().to(data.train.inputs.device)
    bias = module.bias
    refit = isinstance(bias, Tensor) and settings.bias_correction
    parts = data.groups(len(rows))
    channels = len(rows) // len(parts)
    group_plans = [
        replace(plan, bits=plan.bits[first : first + channels], shape=(channels, *plan.shape[1:]))
        for first in range(0, len(rows), channels)
    ]
    results = [
        _solve_rows(W, group_plan, part, settings, refit=refit)
        for W, group_plan, part in zip(torch.split(rows, channels), group_plans, parts, strict=True)
    ]
    solution = join_groups(module, plan, results, len(data.train))
    return replace(solution, seconds=time.perf_counter() - start)


def solve_table(weight: Tensor, plan: LayerPlan) -> LayerSolution:
    """Round an embedding table, which has no input rows to weigh its columns: nearest levels.

    Args:
        weight: Float table, [rows, columns]; read in blocks of rows.
        plan: Bits and levels of its rows.
    """
    codes, scales, first, widths = [], [], 0, plan.bits_tensor()
    for rows in row_blocks(weight.detach(), _TABLE_NUMBERS):  # a table can be a large model's
        bits = widths[first : first + len(rows)]
        levels = RowLevels.fit(rows.float(), bits, plan.levels)
        codes.append(levels.snap(rows.float()).to(torch.int8))
        scales.append(levels.scale)
        first += len(rows)
    whole = torch.cat(codes).reshape(plan.shape)
    return LayerSolution(plan=plan, codes=whole, scale=torch.cat(scales), bias=None)


def join_groups(
    module: nn.Module, plan: LayerPlan, groups: Sequence[GroupResult], rows: int
) -> LayerSolution:
    """What is installed for a layer.

    Args:
        module: The float layer.
        plan: Its plan.
        groups: What was found for its groups, in order.
        rows: Rows it was fitted to.
    """
    bias, new_bias = module.bias, None
    if any(group.bias is not None for group in groups):
        assert isinstance(bias, Tensor)
        gained = [
            group.best.error.new_zeros(len(group.best.codes)) if group.bias is None else group.bias
            for group in groups
        ]
        new_bias = _stored(bias.detach() + torch.cat(gained).to(bias), bias.detach())
    energies = torch.stack([group.energies for group in groups]).sum(dim=0)
    signal, mismatch, base, error = energies.tolist()
    signal = signal or 1.0
    first = groups[0].best.correction
    return LayerSolution(
        plan=plan,
        codes=torch.cat([group.best.codes for group in groups]).reshape(plan.shape).cpu(),
        scale=torch.cat([group.best.levels.scale for group in groups]).cpu(),
        bias=new_bias,
        alpha=first.alpha,
        beta=first.beta,
        damping=first.damping,
        mismatch=mismatch / signal,
        base_error=base / signal,
        error=error / signal,
        rows=rows,
    )


def _stored(bias: Tensor, old: Tensor) -> Tensor:
    """A bias as precise as the one it replaces: half precision stays half precision on disk."""
    if old.dtype == torch.float32 and fits_half(old.detach()):
        half = bias.half().float()
        return half if bool(torch.isfinite(half).all()) else bias
    return bias


def _solve_rows(
    W: Tensor, plan: LayerPlan, data: LayerData, settings: MPQConfig, *, refit: bool
) -> GroupResult:
    """Round one group of a layer."""
    return solve_group(
        W,
        data,
        lambda problem: _rounded(plan, problem, settings),
        lambda candidate: candidate.total,
        refit=refit,
    )


def solve_group(
    W: Tensor,
    data: LayerData,
    rounded: Callable[[Problem], tuple[Candidate, Candidate]],
    cost: Callable[[Candidate], float],
    *,
    refit: bool,
) -> GroupResult:
    """Round one group of a layer, with its bias refitted or left, whichever costs less.

    Args:
        W: Float weight rows [O, K].
        data: The group's rows.
        rounded: Makes the rounding without correction, and the best one.
        cost: What a rounding costs.
        refit: Whether there is a bias that may be refitted.

    Raises:
        CalibrationError: The statistics are not finite.
    """
    problem = Problem.of(W, data, refit=refit)
    base, best = rounded(problem)
    if refit:
        plain = Problem.of(W, data, refit=False)
        same = replace(best, error=plain.error(best.weight))
        if cost(same) < cost(best):
            # What the refit fits to a few rows does not hold on others.
            problem = plain
            base, best = rounded(problem)
            best = min(best, same, key=cost)
    energies = torch.tensor(
        [problem.signal, problem.mismatch, base.total, best.total], dtype=torch.float64
    )
    if not bool(torch.isfinite(energies).all()):
        raise CalibrationError(
            "its statistics are not finite; check the calibration data and the layers before it"
        )
    gained = None if problem.means is None else problem.means.bias(W, best.weight)
    return GroupResult(best=best, bias=gained, energies=energies)


def _rounded(plan: LayerPlan, problem: Problem, settings: MPQConfig) -> tuple[Candidate, Candidate]:
    """The rounding without correction, and the best one of all."""
    options = _corrections(plan, problem, settings)
    candidates = [
        Candidate(
            codes=codes,
            levels=levels,
            correction=correction,
            error=problem.error(_dequantized(codes, levels)),
        )
        for correction, (codes, levels) in zip(
            options, _round(options, plan, problem, settings), strict=True
        )
    ]
    best = min(candidates, key=lambda candidate: candidate.total)
    return candidates[0], _refined(best, problem, settings)


def _refined(candidate: Candidate, problem: Problem, settings: MPQConfig) -> Candidate:
    """The chosen rounding refined, unless that does not help on the rows that judge."""
    if settings.rounding != "gptq" or not settings.refinements:
        return candidate
    target = _corrected(problem.W, candidate.correction)
    codes, levels = refine(
        target, candidate.codes, candidate.levels, problem.gram, passes=settings.refinements
    )
    error = problem.error(_dequantized(codes, levels))
    if float(error.sum()) > candidate.total:
        return candidate
    return replace(candidate, codes=codes, levels=levels, error=error)


def _dequantized(codes: Tensor, levels: RowLevels) -> Tensor:
    return codes.float() * levels.scale[:, None].to(codes.device)


def _corrected(W: Tensor, correction: Correction) -> Tensor:
    return W if correction.weight is None else W + correction.weight


def _corrections(plan: LayerPlan, problem: Problem, settings: MPQConfig) -> list[Correction]:
    """What to try; with the automatic strength, no correction comes first."""
    none, W, train, gram = Correction(), problem.W, problem.train, problem.gram
    if settings.propagation == "auto":
        if problem.judge is train:
            return [none]  # no rows are held out
        try:
            regressions = SourceRegressions(W, train, gram)
            chosen = choose_correction(
                W,
                train,
                gram,
                problem.judge,
                bits=plan.bits_tensor(),
                regressions=regressions,
                targets=problem.targets,
            )
        except CalibrationError as error:
            logger.warning("%s: no correction, since %s", plan.name, error)
            return [none]
        if chosen.weight is None:
            return [none]
        # The closed form does not see the rounding; where that tips the scales, the paper's
        # strength may do better, and it is there to be judged by the same rows.
        paper = fixed_correction(W, train, gram, PAPER_STRENGTH, regressions=regressions)
        return [none, chosen, paper]
    assert isinstance(settings.propagation, float | int)
    return [fixed_correction(W, train, gram, float(settings.propagation))]


def _round(
    corrections: Sequence[Correction], plan: LayerPlan, problem: Problem, settings: MPQConfig
) -> list[tuple[Tensor, RowLevels]]:
    """Fit levels to the rows under each correction and round them, all in one run."""
    gram, targets = problem.gram, [_corrected(problem.W, correction) for correction in corrections]
    bits, importance = plan.bits_tensor(), gram.diagonal.float()
    together = torch.cat(targets)  # rows do not meet
    levels = RowLevels.fit(together, bits.repeat(len(targets)), plan.levels, importance)
    levels = _unclipped_where_better(together, levels, gram, settings)
    if settings.rounding == "nearest":
        codes = levels.snap(together).to(torch.int8)
    else:
        codes = gptq(together, levels, gram)
    return list(zip(torch.split(codes, len(problem.W)), levels.split(len(problem.W)), strict=True))


def _unclipped_where_better(
    W: Tensor, levels: RowLevels, gram: Gram, settings: MPQConfig
) -> RowLevels:
    """The levels with the scale that clips nothing in rows where that errs less.

    The search takes the errors of a row's weights as independent. Those of clipped weights are not:
    all of them pull one way. So the rows' own error decides, inputs correlated as they are. Narrow
    rows that are rounded with feedback keep theirs: it makes up for the clipping.
    """
    whole = levels.unclipped(W)
    errors = [
        gram.quadratic(W - grid.snap(W) * grid.scale[:, None].to(W)) for grid in (levels, whole)
    ]
    better = (errors[1] < errors[0]).to(levels.bits.device)
    if settings.rounding != "nearest":
        better &= levels.bits >= _WIDE
    scale = torch.where(better.to(levels.scale.device), whole.scale, levels.scale)
    return replace(levels, scale=scale)
