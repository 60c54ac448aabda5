"""One layer: correct its weights for the error that reaches it, round them, refit its bias."""

import logging
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import weight_rows
from mpqdm_fx.numerics.gptq import gptq
from mpqdm_fx.numerics.gram import Gram
from mpqdm_fx.numerics.halves import fits_half
from mpqdm_fx.numerics.levels import RowLevels
from mpqdm_fx.numerics.propagation import (
    Correction,
    LayerRows,
    choose_correction,
    fixed_correction,
    output_error,
)
from mpqdm_fx.numerics.refine import refine
from mpqdm_fx.plan import LayerPlan

PAPER_STRENGTH = 0.5
"""Propagation strength of QEP's main results (arXiv 2504.09629)."""

logger = logging.getLogger(__name__)

__all__ = ["LayerData", "LayerSolution", "solve_layer"]


@dataclass(frozen=True, kw_only=True)
class LayerData:
    """Rows of one layer in both lanes, [N, G, K] for grouped layers.

    Attributes:
        train: Rows that corrections and roundings are fitted to.
        validation: Rows of held-out calls; may be empty.
    """

    train: LayerRows
    validation: LayerRows


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
class _Candidate:
    codes: Tensor
    levels: RowLevels
    correction: Correction
    error: Tensor  # [O], on the rows that choose

    @property
    def weight(self) -> Tensor:
        return _dequantized(self.codes, self.levels)


def solve_layer(
    module: nn.Module, plan: LayerPlan, data: LayerData, settings: MPQConfig
) -> LayerSolution:
    """Correct and round one convolution or linear layer.

    With `propagation="auto"` the layer is rounded without correction, with the one that the
    held-out rows chose and with the paper's, in one run, and the one of least validation error is
    kept; so is its refinement only if it lowers that error. No layer is worse than its base there.

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
    centred = isinstance(bias, Tensor) and settings.bias_correction
    grouped = data.train.inputs.dim() == 3
    groups = data.train.inputs.shape[1] if grouped else 1
    channels = len(rows) // groups
    found, shifts, sums = [], [], torch.zeros(4, dtype=torch.float64)
    for index in range(groups):
        own = slice(index * channels, (index + 1) * channels)
        part = data
        if grouped:
            part = LayerData(
                train=data.train.group(index, channels),
                validation=data.validation.group(index, channels),
            )
        one, shift, energies = _solve_rows(
            rows[own], replace(plan, bits=plan.bits[own], shape=(channels, *plan.shape[1:])),
            part, settings, centred=centred,
        )  # fmt: skip
        found.append(one)
        shifts.append(shift)
        sums += energies
    codes = torch.cat([one.codes for one in found]).reshape(plan.shape)
    new_bias = None
    if centred:
        assert isinstance(bias, Tensor)
        new_bias = _stored(bias.detach() + torch.cat(shifts).to(bias), bias.detach())
    signal, mismatch, base, error = sums.tolist()
    signal = signal or 1.0
    first = found[0].correction
    return LayerSolution(
        plan=plan,
        codes=codes.cpu(),
        scale=torch.cat([one.levels.scale for one in found]).cpu(),
        bias=new_bias,
        alpha=first.alpha,
        beta=first.beta,
        damping=first.damping,
        mismatch=mismatch / signal,
        base_error=base / signal,
        error=error / signal,
        rows=len(data.train),
        seconds=time.perf_counter() - start,
    )


def _stored(bias: Tensor, old: Tensor) -> Tensor:
    """A bias as precise as the one it replaces: half precision stays half precision on disk."""
    if old.dtype == torch.float32 and fits_half(old.detach()):
        half = bias.half().float()
        return half if bool(torch.isfinite(half).all()) else bias
    return bias


def _solve_rows(
    W: Tensor, plan: LayerPlan, data: LayerData, settings: MPQConfig, *, centred: bool
) -> tuple[_Candidate, Tensor, Tensor]:
    """The rounding of one group, its bias shift [O], and (signal, mismatch, base, error)."""
    train = data.train
    gram = Gram.of(train.inputs, center=centred)
    targets = train.targets(W)
    means = [target.mean(dim=0) * centred for target in targets]
    judge = data.validation if len(data.validation) else train
    candidates = []
    options = _corrections(W, plan, data, gram, settings)
    for correction, (codes, levels) in zip(
        options, _round(W, options, plan, gram, settings), strict=True
    ):
        error = output_error(W, _dequantized(codes, levels), judge, gram.mean, means)
        candidates.append(
            _Candidate(codes=codes, levels=levels, correction=correction, error=error)
        )
    base = candidates[0]
    best = min(candidates, key=lambda one: float(one.error.sum()))
    best = _refined(best, W, gram, judge, means, settings)
    shift = torch.stack(means).sum(dim=0) if means else W.new_zeros(len(W), dtype=torch.float64)
    shift = shift + (W - best.weight).to(torch.float64) @ gram.mean
    signal = _signal(W, judge, gram)
    mismatch = sum(
        float((t - m).square().mean(dim=0).sum())
        for t, m in zip(judge.targets(W), means, strict=True)
    )
    energies = [signal, mismatch, float(base.error.sum()), float(best.error.sum())]
    if not all(map(torch.isfinite, torch.tensor(energies))):
        raise CalibrationError(
            "its statistics are not finite; check the calibration data and the layers before it"
        )
    return best, shift, torch.tensor(energies, dtype=torch.float64)


def _refined(
    found: _Candidate,
    W: Tensor,
    gram: Gram,
    judge: LayerRows,
    means: list[Tensor],
    settings: MPQConfig,
) -> _Candidate:
    """The chosen rounding refined, unless that does not help on the rows that judge."""
    if settings.rounding != "gptq" or not settings.refinements:
        return found
    target = W if found.correction.weight is None else W + found.correction.weight
    codes, levels = refine(target, found.codes, found.levels, gram, passes=settings.refinements)
    error = output_error(W, _dequantized(codes, levels), judge, gram.mean, means)
    if float(error.sum()) > float(found.error.sum()):
        return found
    return replace(found, codes=codes, levels=levels, error=error)


def _dequantized(codes: Tensor, levels: RowLevels) -> Tensor:
    return codes.float() * levels.scale[:, None].to(codes.device)


def _signal(W: Tensor, rows: LayerRows, gram: Gram) -> float:
    outputs = (rows.inputs - gram.mean.float()) @ W.T
    return float(outputs.square().mean(dim=0, dtype=torch.float64).sum())


def _corrections(
    W: Tensor, plan: LayerPlan, data: LayerData, gram: Gram, settings: MPQConfig
) -> list[Correction]:
    """What to try; with the automatic strength, no correction comes first."""
    none = Correction()
    if settings.propagation == "auto":
        try:
            chosen = choose_correction(
                W, data.train, gram, data.validation, bits=plan.bits_tensor()
            )
        except CalibrationError as error:
            logger.warning("%s: no correction, since %s", plan.name, error)
            return [none]
        if chosen.weight is None:
            return [none]
        # The closed form does not see the rounding; where that tips the scales, the paper's
        # strength may do better, and it is there to be judged by the same rows.
        return [none, chosen, fixed_correction(W, data.train, gram, PAPER_STRENGTH)]
    assert isinstance(settings.propagation, float | int)
    return [fixed_correction(W, data.train, gram, float(settings.propagation))]


def _round(
    W: Tensor,
    corrections: list[Correction],
    plan: LayerPlan,
    gram: Gram,
    settings: MPQConfig,
) -> list[tuple[Tensor, RowLevels]]:
    """Fit levels to the rows under each correction and round them, all in one run."""
    targets = [W if one.weight is None else W + one.weight for one in corrections]
    bits, importance = plan.bits_tensor(), gram.diagonal.float()
    together = torch.cat(targets)  # rows do not meet
    levels = RowLevels.fit(together, bits.repeat(len(targets)), plan.levels, importance)
    if settings.rounding == "nearest":
        codes = levels.snap(together).to(torch.int8)
    else:
        codes = gptq(together, levels, gram)
    return list(zip(torch.split(codes, len(W)), levels.split(len(W)), strict=True))
