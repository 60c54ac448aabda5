"""Layers without fixed widths: rounded at a pitch, which is what is left of a budget."""

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.layers import WeightLayer, weight_rows
from mpqdm_fx.io.fast_coder import installed_coder
from mpqdm_fx.numerics.levels.entropy_code import encode
from mpqdm_fx.numerics.levels.grids import MAX_BITS
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.coded_rounding import (
    SHRINKAGES,
    bit_price,
    coded_size,
    first_steps,
    round_coded,
    shrunk,
)
from mpqdm_fx.numerics.solve.propagation import Correction, choose_correction, fixed_correction
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.sweep.coded_budget import COARSEST, CodedBudget
from mpqdm_fx.sweep.problem import LayerData, Problem
from mpqdm_fx.sweep.solve import Candidate, LayerSolution, join_groups, solve_group

logger = logging.getLogger(__name__)

__all__ = ["solve_coded_layer", "solve_coded_table"]

_STRIDE = 0.125  # octaves of the pitch: about a sixteenth of a bit a weight


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
        codes = RowLevels(bits=bits, scale=steps, tables=None).snap(rows).to(torch.int8)
        return _counted(
            LayerSolution(plan=plan, codes=codes.reshape(plan.shape), scale=steps, bias=None)
        )

    return _within(budget, plan, solve)


def _within(
    budget: CodedBudget, plan: LayerPlan, solve: Callable[[float], LayerSolution]
) -> LayerSolution:
    """Solve at the budget's pitch, or at a coarser one where the others would not fit any more."""
    for in_need in (False, True):
        solution = _first_allowed(budget, plan.name, solve, in_need=in_need)
        if solution is not None:
            budget.take(plan.name, solution.plan.storage.total)
            return solution
    raise ConfigError(
        f"{plan.name}: what is left of the budget does not hold its {plan.num_weights} weights "
        "at any step; give more bits, or leave start_from out if the run began with that"
    )


def _first_allowed(
    budget: CodedBudget, name: str, solve: Callable[[float], LayerSolution], *, in_need: bool
) -> LayerSolution | None:
    """The solution of the finest pitch that the budget allows; None if it allows none.

    Where forecasts are far off, so is the budget's pitch: strides grow until the layer fits, and
    the last one is halved down to the first.
    """

    def tried(octave: float) -> LayerSolution | None:
        solution = solve(2.0**octave)
        fits = budget.allows(name, solution.plan.storage.total, in_need=in_need)
        return solution if fits else None

    octave = budget.octave()
    refused, solution, stride = octave, tried(octave), _STRIDE
    while solution is None and octave < COARSEST:
        refused, octave = octave, octave + stride
        solution, stride = tried(octave), 2 * stride
    while solution is not None and octave - refused > _STRIDE:
        middle = (refused + octave) / 2
        finer = tried(middle)
        solution, octave, refused = (
            (solution, octave, middle) if finer is None else (finer, middle, refused)
        )
    return solution


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
    refit = isinstance(module.bias, Tensor) and settings.bias_correction
    parts = data.groups(len(rows))
    channels = len(rows) // len(parts)
    results = []
    for W, sensitivity, part in zip(
        torch.split(rows, channels),
        torch.split(budget.sensitivity[plan.name], channels),
        parts,
        strict=True,
    ):
        group = _Group(
            name=plan.name,
            W=W,
            settings=settings,
            sensitivity=sensitivity.to(rows.device),
            energy=budget.energy[plan.name],
            pitch=pitch,
            places=plan.places,
        )
        results.append(solve_group(W, part, group.rounded, group.cost, refit=refit))
    return _counted(join_groups(module, plan, results, len(data.train)))


def _counted(solution: LayerSolution) -> LayerSolution:
    """A solution whose plan has the bytes that its codes take."""
    plan = solution.plan
    stream = encode(solution.codes.flatten(1), plan.places, installed_coder())
    return replace(solution, plan=replace(plan, coded=len(stream)))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Rows that read the same inputs, and what they are rounded by."""

    name: str
    W: Tensor
    settings: MPQConfig
    sensitivity: Tensor
    energy: float
    pitch: float
    places: int

    def cost(self, candidate: Candidate) -> float:
        """Error of the output, and what the bits are worth."""
        error = float((self.sensitivity * candidate.error).sum())
        return error + bit_price(self.pitch) * coded_size(candidate.codes, self.places)

    def rounded(self, problem: Problem) -> tuple[Candidate, Candidate]:
        """The rounding without correction, and the best one."""
        grams = [shrunk(problem.gram, problem.train.inputs, by) for by in SHRINKAGES]
        candidates = []
        for correction, gram in itertools.product(self._corrections(problem), grams):
            target = self.W if correction.weight is None else self.W + correction.weight
            steps = first_steps(target, self.sensitivity, self.energy, self.pitch)
            codes, levels = round_coded(target, steps, gram, passes=self.settings.refinements)
            candidate = Candidate(
                codes=codes, levels=levels, correction=correction, error=torch.empty(0)
            )
            candidates.append(replace(candidate, error=problem.error(candidate.weight)))
        return candidates[0], min(candidates, key=self.cost)

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
