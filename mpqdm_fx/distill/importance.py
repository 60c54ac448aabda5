"""Which steps of a run count how much, and how often each is drawn.

A squared error of the noise is not worth the same at every step. At the noisiest the scheduler
multiplies it most, and every later step builds on what it gave; at the cleanest it is large and
moves next to nothing. How far an error moves the finished sample is measured: one run for each
step, in which the student answers at that step and the float model at all others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.calibration.samplers import first_tensor, is_sampler
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.runs import Predict, Recorder, Start
from mpqdm_fx.io.progress import Stage, stage

__all__ = ["Effects", "Importance", "importance", "measure_effects"]

# Share of the draws that go to all steps alike, so that none is forgotten as its error changes.
_EVEN = 0.1


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What the student's error at each step does, summed over runs.

    Attributes:
        error: Squared error of the (guided) answer, float64 [calls].
        moved: Squared distance by which the finished sample moves, float64 [calls].
    """

    error: Tensor
    moved: Tensor


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How steps are drawn and weighed.

    Attributes:
        draw: Probability of each step [calls].
        weight: What a row's loss is multiplied with [calls], float32; `draw * weight` sums to 1.
    """

    draw: Tensor
    weight: Tensor

    def calls(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw steps, int64 [count]."""
        return torch.multinomial(self.draw, count, replacement=True, generator=generator)

    def weighed(self, errors: Tensor) -> float:
        """What the loss makes of the squared errors of the steps [calls]."""
        return float((self.draw * self.weight.double() * errors).sum())


def importance(config: DistillConfig, calls: int, effects: Effects | None = None) -> Importance:
    """Importance of the steps of runs.

    Args:
        config: `noise_bias` gives the part that does not look at effects, `final_share` the other's
            share of the loss at the start.
        calls: Steps of a run.
        effects: Measured; None, or effects that are all zero, leave the first part alone.
    """
    plain = _beta_masses(*config.noise_bias, calls)
    if effects is None or not bool(effects.moved.sum() > 0):
        return Importance(draw=plain, weight=torch.ones(calls))
    error = effects.error.clamp_min(effects.error.max() * 1e-6)
    # both parts count the same at the start: each is 1 there
    share = (1 - config.final_share) * plain / (plain * error).sum()
    share += config.final_share * effects.moved / error / effects.moved.sum()
    draw = (1 - _EVEN) * share * error + _EVEN / calls
    weight = share / draw
    return Importance(draw=draw, weight=(weight / (draw * weight).sum()).float())


def _beta_masses(a: float, b: float, calls: int) -> Tensor:
    """Mass of each step, the first being the noisiest, under Beta(a, b) of the noisiness."""
    grid = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    density = grid ** (a - 1) * (1 - grid) ** (b - 1)
    place = ((1 - grid) * calls).long().clamp_max(calls - 1)
    masses = torch.zeros(calls, dtype=torch.float64).index_add(0, place, density)
    return masses / masses.sum()


@torch.no_grad()
def measure_effects(student: Predict, recorder: Recorder, start: Start) -> Effects:
    """Measure what the student's error does at each step, as many runs at once as `recorder` has.

    Takes half the square of the number of steps in calls of the float model.

    Args:
        student: Called with the model's keyword arguments.
        recorder: Its float model, scheduler, steps and guidance.
        start: What the runs start from.
    """
    groups = torch.split(torch.arange(len(start)), recorder.batch_size)
    total = None if is_sampler(recorder.scheduler) else len(groups) * recorder.steps
    with stage("effects of steps", total) as advance:
        parts = [_measure_part(student, recorder, start.rows(rows), advance) for rows in groups]
    return Effects(
        error=torch.stack([part.error for part in parts]).sum(0),
        moved=torch.stack([part.moved for part in parts]).sum(0),
    )


def _measure_part(student: Predict, recorder: Recorder, start: Start, advance: Stage) -> Effects:
    answers: list[Tensor] = []
    counts: list[int] = []

    def recorded(**inputs: Any) -> Tensor:
        counts.append(recorder.examples_in(inputs, start))
        answers.append(first_tensor(recorder.teacher(**inputs)))
        return answers[-1]

    finished = recorder.denoise(recorded, start)
    error: list[float] = []
    moved: list[float] = []
    for place, count in enumerate(counts):
        deviant = _Deviant(student, recorder.teacher, answers, place)
        distance = _energy(recorder.denoise(deviant, start) - finished)
        answer, target = (recorder.noise_of(a, start) for a in (deviant.answer, answers[place]))
        # the examples of one call share what it does
        moved += [distance / count] * count
        error += [_energy(answer - target) / count] * count
        advance()
    return Effects(
        error=torch.tensor(error, dtype=torch.float64),
        moved=torch.tensor(moved, dtype=torch.float64),
    )


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())


class _Deviant:
    """Answers like the float model but for one step, at which the student does.

    Attributes:
        answer: What the student said then.
    """

    answer: Tensor

    def __init__(
        self, student: Predict, teacher: Predict, answers: list[Tensor], place: int
    ) -> None:
        self._student, self._teacher, self._answers = student, teacher, answers
        self._place, self._step = place, -1

    def __call__(self, **inputs: Any) -> Tensor:
        self._step += 1
        if self._step > self._place:
            return first_tensor(self._teacher(**inputs))
        if self._step < self._place:
            return self._answers[self._step]  # up to here the run is the float model's
        self.answer = first_tensor(self._student(**inputs))
        return self.answer
