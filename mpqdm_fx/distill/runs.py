"""Denoising runs as training data: what the model was given at every step, and the float answer.

Data-free (EfficientDM, section 3.2): noise is drawn, the float model denoises it with the very
scheduler and guidance of deployment, and every call on the way is an example. Runs of the student
can be added: the latents it gets itself into, with the float model's answer to them. A `Sampler` is
recorded as it calls the model: each row of a call is an example, whatever its arguments are.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.calibration.samplers import first_tensor, is_sampler, rows_of
from mpqdm_fx.calibration.sampling import EXTRA_CHANNELS, denoise, guided
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.nested import concatenate, take_rows, to_device
from mpqdm_fx.io.progress import Stage, stage

__all__ = ["Batch", "Recorder", "Runs", "Start"]

Predict = Callable[..., Any]
"""Called with the model's keyword arguments; returns the predicted noise or what holds it."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What runs start from.

    Attributes:
        noise: [runs, C, H, W], standard normal.
        conditions: Further arguments of the model, [runs, ...] each.
        unconditional: Those of the unconditional half; None without guidance.
        seed: Of ancestral noise.
    """

    noise: Tensor
    conditions: Mapping[str, Any]
    unconditional: Mapping[str, Any] | None
    seed: int

    def __len__(self) -> int:
        return len(self.noise)

    def rows(self, rows: Tensor) -> "Start":
        """Some of the runs, int64 [n]; each group has ancestral noise of its own."""
        return Start(
            noise=self.noise[rows],
            conditions=take_rows(dict(self.conditions), rows),
            unconditional=(
                None if self.unconditional is None else take_rows(dict(self.unconditional), rows)
            ),
            seed=self.seed + int(rows[0]),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of training data.

    Attributes:
        inputs: Keyword arguments of the model; with guidance both halves, unconditional first.
        previous: The same at the step before, for losses over consecutive steps; at the first step
            the rows themselves.
        target: The float model's (guided) answer [B, C, H, W].
        weight: What each row's loss is multiplied with [B]; None weighs all alike.
    """

    inputs: Mapping[str, Any]
    previous: Mapping[str, Any]
    target: Tensor
    weight: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device."""
        return Batch(
            inputs=to_device(self.inputs, device),
            previous=to_device(self.previous, device),
            target=self.target.to(device),
            weight=to_device(self.weight, device),
        )


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Recorded runs.

    Attributes:
        inputs: What the model was given at each call, tensors [runs, calls, ...]: the sample,
            scaled by the scheduler, and the time; all that a sampler gave.
        targets: (Guided) answers of the float model, [runs, calls, C, H, W].
        start: What they started from.
        conditioned: Whether `inputs` hold the conditions too, as of samplers; else those of `start`
            are theirs.
    """

    inputs: Mapping[str, Any]
    targets: Tensor
    start: Start
    conditioned: bool = False

    @property
    def calls(self) -> int:
        """Calls in a run."""
        return self.targets.shape[1]

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, runs: Tensor, calls: Tensor) -> Batch:
        """The rows (run, call).

        Args:
            runs: int64 [B].
            calls: int64 [B].
        """
        before = (calls - 1).clamp_min(0)
        return Batch(
            inputs=self._inputs(runs, calls),
            previous=self._inputs(runs, before),
            target=self.targets[runs, calls],
        )

    def _inputs(self, runs: Tensor, calls: Tensor) -> dict[str, Any]:
        recorded: dict[str, Any] = pytree.tree_map_only(
            Tensor, lambda tensor: tensor[runs, calls], dict(self.inputs)
        )
        if self.conditioned:
            return recorded
        start = self.start.rows(runs)
        # what was recorded has the extra channels already
        conditioned = {**start.conditions, **recorded}
        conditioned.pop(EXTRA_CHANNELS, None)
        if start.unconditional is None:
            return conditioned
        unconditioned = {**conditioned, **start.unconditional}
        unconditioned.pop(EXTRA_CHANNELS, None)
        joined: dict[str, Any] = concatenate([unconditioned, conditioned])
        return joined


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Denoises with one model and records the float model's answers.

    Attributes:
        teacher: The float model; its answers are the targets.
        scheduler: A diffusers scheduler; it is copied. Or a `Sampler`.
        steps: Steps of a run; a sampler has its own.
        guidance_scale: Weight of guidance, None for none.
        batch_size: Runs at once.
        convention: How both models are called by the loop of a scheduler.
        device: Where the models are; what is recorded stays on the CPU.
    """

    teacher: Predict
    scheduler: Any
    steps: int
    guidance_scale: float | None
    batch_size: int
    convention: CallingConvention = field(default_factory=CallingConvention)
    device: torch.device | str = "cpu"

    def denoise(
        self,
        model: Predict,
        start: Start,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Finished samples of a model [runs, C, H, W], on the device."""
        return denoise(
            model,
            self.scheduler,
            start.noise.to(self.device),
            num_inference_steps=None if is_sampler(self.scheduler) else self.steps,
            seed=start.seed,
            conditions=to_device(start.conditions, self.device),
            unconditional=to_device(start.unconditional, self.device),
            guidance_scale=self.guidance_scale,
            convention=self.convention,
            callback=callback,
        )

    def noise_of(self, output: Tensor, start: Start) -> Tensor:
        """The (guided) noise in an answer; a learned variance is none to be matched."""
        if is_sampler(self.scheduler):  # it alone knows what an answer is
            return output
        return guided(output, self.guidance_scale)[:, : start.noise.shape[1]]

    def examples_in(self, inputs: Mapping[str, Any], start: Start) -> int:
        """How many examples of each run a call holds: several if a sampler joins halves."""
        if not is_sampler(self.scheduler):
            return 1
        return rows_of(inputs, len(start), self.scheduler) // len(start)

    @torch.no_grad()
    def record(self, walker: Predict, start: Start, *, progress: str | None = None) -> Runs:
        """Record runs.

        Args:
            walker: Decides where the runs go.
            start: What they start from.
            progress: Name of the stage that is told, None for none.

        Raises:
            CalibrationError: The runs leave the finite numbers, or an argument has the wrong
                length.
        """
        total = len(start) * (1 if is_sampler(self.scheduler) else self.steps)
        with stage(progress, total) as advance:
            parts = [
                self._part(walker, start.rows(rows), advance)
                for rows in torch.split(torch.arange(len(start)), self.batch_size)
            ]
        counts = {part.calls for part in parts}
        if len(counts) > 1:
            raise CalibrationError(
                f"{type(self.scheduler).__name__} calls the model {min(counts)} times in one batch "
                f"and {max(counts)} times in another; training goes by the place of a call in its "
                f"run, so give a loop with a fixed number"
            )
        joined = Runs(
            inputs=concatenate([dict(part.inputs) for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
            start=start,
            conditioned=is_sampler(self.scheduler),
        )
        leaves = [joined.targets, *pytree.tree_leaves(dict(joined.inputs))]
        if not all(bool(t.isfinite().all()) for t in leaves if isinstance(t, Tensor)):
            raise CalibrationError(
                "denoising runs gave NaN or infinite values; check the model and that the "
                "scheduler belongs to it"
                if walker is self.teacher
                else "the trained model's own runs gave NaN or infinite values; train with "
                "on_policy=0, or lower the rates"
            )
        return joined

    def _part(self, walker: Predict, start: Start, advance: Stage) -> Runs:
        """Runs that are made at once."""
        inputs: list[dict[str, Any]] = []
        targets: list[Tensor] = []

        def recorded(**call: Any) -> Tensor:
            answer = first_tensor(walker(**call))
            right = answer if walker is self.teacher else first_tensor(self.teacher(**call))
            for example, target in self._examples(call, right, start):
                inputs.append(_copied(example))
                targets.append(_copied(target))
            return answer

        if is_sampler(self.scheduler):
            self.denoise(recorded, start)
            advance(len(start))
        else:
            self.denoise(recorded, start, lambda index, timestep, sample: advance(len(sample)))
        return Runs(inputs=_stacked(inputs), targets=torch.stack(targets, 1), start=start)

    def _examples(
        self, inputs: Mapping[str, Any], right: Tensor, start: Start
    ) -> Iterator[tuple[Any, Tensor]]:
        """The examples in one call, each with a row for each run: inputs and target."""
        if not is_sampler(self.scheduler):
            # the conditional half; conditions are those of the start
            half = slice(-len(start), None)
            names = (self.convention.sample, self.convention.timestep)
            yield {name: inputs[name][half] for name in names}, self.noise_of(right, start)
            return
        count = self.examples_in(inputs, start)
        for rows in torch.split(torch.arange(count * len(start)), len(start)):
            yield take_rows(dict(inputs), rows), right[rows]


def _copied(tree: Any) -> Any:
    """On the CPU, in memory of its own: a loop may go on with the same tensors in place."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), tree)


def _stacked(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of several calls, tensors [rows, calls, ...]."""
    apart = [pytree.tree_map_only(Tensor, lambda t: t[None], call) for call in calls]
    joined = concatenate(apart)
    stacked: dict[str, Any] = pytree.tree_map_only(Tensor, lambda t: t.transpose(0, 1), joined)
    return stacked
