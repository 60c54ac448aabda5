"""Layers without fixed widths: rounded at a pitch, which is what is left of a budget."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.layers import WeightLayer, weight_rows
from mpqdm_fx.numerics.levels.entropy_code import encode
from mpqdm_fx.numerics.levels.grids import MAX_BITS
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.coded_rounding import (
    bit_price,
    coded_size,
    first_steps,
    round_coded,
    shrunk,
)
from mpqdm_fx.numerics.solve.propagation import Correction, choose_correction, fixed_correction
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.sweep.coded_budget import CodedBudget
from mpqdm_fx.sweep.problem import LayerData, Problem
from mpqdm_fx.sweep.solve import LayerSolution, stored_bias

logger = logging.getLogger(__name__)

__all__ = ["solve_coded_layer", "solve_coded_table"]

_COARSER, _TRIES = 1.4, 16


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rounding:
    """One rounding of a group of rows.

    Attributes:
        codes: int8 [O, K].
        scale: Steps, float32 [O].
        correction: What the target was corrected by.
        error: Of each channel on the rows that judge, float64 [O].
        bits: What the codes take.
    """

    codes: Tensor
    scale: Tensor
    correction: Correction
    error: Tensor
    bits: float

    @property
    def weight(self) -> Tensor:
        """Rounded rows, float32 [O, K]."""
        return self.codes.float() * self.scale[:, None].to(self.codes.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Result:
    """What is installed for a group of rows.

    Attributes:
        best: The rounding.
        bias: What the bias gains, float64 [O], or None if it stays.
        energies: Signal, mismatch, error without correction, error, float64 [4].
    """

    best: _Rounding
    bias: Tensor | None
    energies: Tensor


def solve_coded_layer(
    module: nn.Module, plan: LayerPlan, data: LayerData, settings: MPQConfig, budget: CodedBudget
) -> LayerSolution:
    """Round one convolution or linear layer at the budget's pitch, and take it from the budget.

    The correction for quantized predecessors and the refit of the bias are judged on held-out rows,
    as in `solve_layer`.

    Args:
        module: The float layer; it is not changed.
        plan: From `coded_plan`.
        data: Its rows in both lanes.
        settings: Propagation and bias correction.
        budget: What is left.

    Raises:
        CalibrationError: The rows hold NaN or infinity, or their moments have no factor.
        ConfigError: What is left of the budget does not hold the layer.
    """
    start = time.perf_counter()
    solution = _within(
        budget, plan, lambda pitch: _solved(module, plan, data, settings, budget, pitch)
    )
    return replace(solution, seconds=time.perf_counter() - start)


def solve_coded_table(layer: WeightLayer, plan: LayerPlan, budget: CodedBudget) -> LayerSolution:
    """Round an embedding table, which reads no rows: each of its numbers counts alike.

    Args: as of `solve_coded_layer`.
    """
    rows, sensitivity = weight_rows(layer.module).float(), budget.sensitivity[plan.name]

    def solve(pitch: float) -> LayerSolution:
        steps = first_steps(rows, sensitivity, budget.energy[plan.name], pitch)
        bits = torch.full((len(rows),), MAX_BITS)
        codes = RowLevels(bits=bits, scale=steps, tables=None).snap(rows)
        return _solution(plan, [codes], [steps])

    return _within(budget, plan, solve)


def _within(
    budget: CodedBudget, plan: LayerPlan, solve: Callable[[float], LayerSolution]
) -> LayerSolution:
    """Solve at the budget's pitch, or at a coarser one where the others would not fit any more."""
    pitch = budget.pitch()
    for _ in range(_TRIES):
        solution = solve(pitch)
        bits = solution.plan.storage.total
        if budget.allows(plan.name, bits):
            budget.take(plan.name, bits)
            return solution
        pitch *= _COARSER
    raise ConfigError(
        f"{plan.name}: what is left of the budget does not hold its {plan.num_weights} weights at "
        "any step; give more bits"
    )


def _solved(
    module: nn.Module,
    plan: LayerPlan,
    data: LayerData,
    settings: MPQConfig,
    budget: CodedBudget,
    pitch: float,
) -> LayerSolution:
    """A layer at a pitch, group by group."""
    rows = weight_rows(module).float().to(data.train.inputs.device)
    bias = module.bias
    refit = isinstance(bias, Tensor) and settings.bias_correction
    grouped = data.train.inputs.dim() == 3
    groups = data.train.inputs.shape[1] if grouped else 1
    channels = len(rows) // groups
    results = []
    for index in range(groups):
        span = slice(index * channels, (index + 1) * channels)
        part = data
        if grouped:
            part = LayerData(
                train=data.train.group(index, channels),
                validation=data.validation.group(index, channels),
            )
        group = _Group(
            name=plan.name,
            W=rows[span],
            data=part,
            settings=settings,
            sensitivity=budget.sensitivity[plan.name][span].to(rows.device),
            energy=budget.energy[plan.name],
            pitch=pitch,
            places=plan.places,
        )
        results.append(group.solved(refit=refit))
    new_bias = None
    if any(result.bias is not None for result in results):
        assert isinstance(bias, Tensor)
        gained = [rows.new_zeros(channels) if r.bias is None else r.bias for r in results]
        new_bias = stored_bias(bias.detach() + torch.cat(gained).to(bias), bias.detach())
    energies = torch.stack([result.energies for result in results]).sum(dim=0)
    signal, mismatch, base, error = energies.tolist()
    signal = signal or 1.0
    first = results[0].best.correction
    return replace(
        _solution(plan, [r.best.codes for r in results], [r.best.scale for r in results]),
        bias=new_bias,
        alpha=first.alpha,
        beta=first.beta,
        damping=first.damping,
        mismatch=mismatch / signal,
        base_error=base / signal,
        error=error / signal,
        rows=len(data.train),
    )


def _solution(plan: LayerPlan, codes: list[Tensor], steps: list[Tensor]) -> LayerSolution:
    """Codes and scales of a layer's groups, and the plan with the bytes that they take."""
    joined = torch.cat(codes).to(torch.int8).cpu()
    plan = replace(plan, coded=len(encode(joined, plan.places)))
    return LayerSolution(
        plan=plan, codes=joined.reshape(plan.shape), scale=torch.cat(steps).cpu(), bias=None
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Rows that read the same inputs, and what they are rounded by."""

    name: str
    W: Tensor
    data: LayerData
    settings: MPQConfig
    sensitivity: Tensor
    energy: float
    pitch: float
    places: int

    def solved(self, *, refit: bool) -> _Result:
        """The best rounding, with the bias refitted or left, whichever costs less."""
        problem = Problem.of(self.W, self.data, refit=refit)
        base, best = self._rounded(problem)
        if refit:
            plain = Problem.of(self.W, self.data, refit=False)
            same = replace(best, error=plain.error(best.weight))
            if self._cost(same) < self._cost(best):
                # What the refit fits to a few rows does not hold on others.
                problem = plain
                base, best = self._rounded(problem)
                best = min(best, same, key=self._cost)
        sums = [problem.signal, problem.mismatch, float(base.error.sum()), float(best.error.sum())]
        energies = torch.tensor(sums, dtype=torch.float64)
        if not bool(torch.isfinite(energies).all()):
            raise CalibrationError(
                "its statistics are not finite; check the calibration data and the layers before it"
            )
        gained = None if problem.means is None else problem.means.bias(self.W, best.weight)
        return _Result(best=best, bias=gained, energies=energies)

    def _cost(self, rounding: _Rounding) -> float:
        """Error of the output, and what the bits are worth."""
        error = float((self.sensitivity * rounding.error).sum())
        return error + bit_price(self.pitch) * rounding.bits

    def _rounded(self, problem: Problem) -> tuple[_Rounding, _Rounding]:
        """The rounding without correction, and the best one."""
        gram = shrunk(problem.gram, problem.train.inputs)
        roundings = []
        for correction in self._corrections(problem):
            target = self.W if correction.weight is None else self.W + correction.weight
            steps = first_steps(target, self.sensitivity, self.energy, self.pitch)
            codes, levels = round_coded(target, steps, gram, passes=self.settings.refinements)
            plain = _Rounding(
                codes=codes,
                scale=levels.scale,
                correction=correction,
                error=torch.empty(0),
                bits=coded_size(codes, self.places),
            )
            roundings.append(replace(plain, error=problem.error(plain.weight)))
        return roundings[0], min(roundings, key=self._cost)

    def _corrections(self, problem: Problem) -> list[Correction]:
        """None, and what the held-out rows choose."""
        if self.settings.propagation != "auto":
            strength = float(self.settings.propagation)
            return [fixed_correction(self.W, problem.train, problem.gram, strength)]
        train = problem.train
        held_out = problem.judge if problem.judge is not train else train.take(slice(0, 0))
        try:
            chosen = choose_correction(self.W, train, problem.gram, held_out)
        except CalibrationError as error:
            logger.warning("%s: no correction, since %s", self.name, error)
            return [Correction()]
        return [Correction()] if chosen.weight is None else [Correction(), chosen]
