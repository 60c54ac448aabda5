"""Denoising runs as training data: what the model was given at every step, and the float answer.

Data-free (EfficientDM, section 3.2): noise is drawn, the float model denoises it with the very
scheduler and guidance of deployment, and every call on the way is an example. Runs of the student
can be added: the latents it gets itself into, with the float model's answer to them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from mpqdm_fx.calibration.sampling import (
    EXTRA_CHANNELS,
    concatenate,
    denoise,
    first_tensor,
    guided,
    take_rows,
)
from mpqdm_fx.errors import CalibrationError

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
            inputs=_moved(self.inputs, device),
            previous=_moved(self.previous, device),
            target=self.target.to(device),
            weight=_moved(self.weight, device),
        )


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Recorded runs.

    Attributes:
        samples: What the model was given, [runs, calls, C, H, W], scaled by the scheduler.
        timesteps: [runs, calls].
        targets: (Guided) answers of the float model, [runs, calls, C, H, W].
        start: What they started from.
    """

    samples: Tensor
    timesteps: Tensor
    targets: Tensor
    start: Start

    @property
    def calls(self) -> int:
        """Calls in a run."""
        return self.samples.shape[1]

    def __len__(self) -> int:
        return len(self.samples)

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
        start = self.start.rows(runs)
        drawn = {"sample": self.samples[runs, calls], "timestep": self.timesteps[runs, calls]}
        # what was recorded has the extra channels already
        own = {**start.conditions, **drawn}
        own.pop(EXTRA_CHANNELS, None)
        if start.unconditional is None:
            return own
        plain = {**own, **start.unconditional}
        plain.pop(EXTRA_CHANNELS, None)
        joined: dict[str, Any] = concatenate([plain, own])
        return joined


def _moved(tree: Any, device: torch.device | str) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), tree)


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Denoises with one model and records the float model's answers.

    Attributes:
        teacher: The float model; its answers are the targets.
        scheduler: A diffusers scheduler; it is copied.
        steps: Steps of a run.
        guidance_scale: Weight of guidance, None for none.
        batch_size: Runs at once.
        device: Where the models are; what is recorded stays on the CPU.
    """

    teacher: Predict
    scheduler: Any
    steps: int
    guidance_scale: float | None
    batch_size: int
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
            num_inference_steps=self.steps,
            seed=start.seed,
            conditions=_moved(start.conditions, self.device),
            unconditional=_moved(start.unconditional, self.device),
            guidance_scale=self.guidance_scale,
            callback=callback,
        )

    def noise_of(self, output: Tensor, start: Start) -> Tensor:
        """The (guided) noise in an answer; a learned variance is none to be matched."""
        return guided(output, self.guidance_scale)[:, : start.noise.shape[1]]

    @torch.no_grad()
    def record(self, walker: Predict, start: Start, *, progress: str | None = None) -> Runs:
        """Record runs.

        Args:
            walker: Decides where the runs go.
            start: What they start from.
            progress: Text of a progress bar, None for none.

        Raises:
            CalibrationError: The runs leave the finite numbers, or an argument has the wrong
                length.
        """
        total = len(start) * self.steps
        with tqdm(total=total, desc=progress, unit="step", disable=progress is None) as bar:
            parts = [
                self._part(walker, start.rows(rows), bar)
                for rows in torch.split(torch.arange(len(start)), self.batch_size)
            ]
        samples, timesteps, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        if not bool(torch.isfinite(targets).all() and torch.isfinite(samples).all()):
            raise CalibrationError(
                "denoising runs gave NaN or infinite values; check the model and that the "
                "scheduler belongs to it"
                if walker is self.teacher
                else "the trained model's own runs gave NaN or infinite values; train with "
                "on_policy=0, or lower the rates"
            )
        return Runs(samples=samples, timesteps=timesteps, targets=targets, start=start)

    def _part(self, walker: Predict, start: Start, bar: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Samples, timesteps and targets of runs that are made at once."""
        samples: list[Tensor] = []
        timesteps: list[Tensor] = []
        targets: list[Tensor] = []

        def watched(**inputs: Any) -> Tensor:
            answer = first_tensor(walker(**inputs))
            right = answer if walker is self.teacher else first_tensor(self.teacher(**inputs))
            samples.append(inputs["sample"][-len(start) :].cpu())
            timesteps.append(inputs["timestep"][-len(start) :].cpu())
            targets.append(self.noise_of(right, start).cpu())
            return answer

        self.denoise(watched, start, lambda index, timestep, sample: bar.update(len(sample)))
        return torch.stack(samples, 1), torch.stack(timesteps, 1), torch.stack(targets, 1)
