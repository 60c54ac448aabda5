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

from mpqdm_fx.calibration.sampling import denoise, first_tensor, guided
from mpqdm_fx.errors import CalibrationError

__all__ = ["Batch", "Recorder", "Runs"]

Predict = Callable[..., Any]
"""Called with the model's keyword arguments; returns the predicted noise or what holds it."""


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

        def moved(tree: Any) -> Any:
            return pytree.tree_map_only(Tensor, lambda t: t.to(device), tree)

        return Batch(
            inputs=moved(self.inputs),
            previous=moved(self.previous),
            target=moved(self.target),
            weight=moved(self.weight),
        )


@dataclass(kw_only=True)
class Runs:
    """Recorded runs.

    Attributes:
        samples: What the model was given, [runs, calls, C, H, W], scaled by the scheduler.
        timesteps: [runs, calls].
        targets: (Guided) answers of the float model, [runs, calls, C, H, W].
        conditions: Further arguments, [runs, ...] each.
        unconditional: Those of the unconditional half; None without guidance.
    """

    samples: Tensor
    timesteps: Tensor
    targets: Tensor
    conditions: Mapping[str, Any]
    unconditional: Mapping[str, Any] | None

    @property
    def calls(self) -> int:
        """Calls in a run."""
        return self.samples.shape[1]

    def __len__(self) -> int:
        return len(self.samples)

    def conditions_of(self, runs: Tensor) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Conditions and unconditional ones of some runs, int64 [n]."""
        plain = None if self.unconditional is None else _rows(self.unconditional, runs)
        return _rows(self.conditions, runs), plain

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
        own = {
            "sample": self.samples[runs, calls],
            "timestep": self.timesteps[runs, calls],
            **_rows(self.conditions, runs),
        }
        if self.unconditional is None:
            return own
        plain = {**own, **_rows(self.unconditional, runs)}
        joined: dict[str, Any] = pytree.tree_map(lambda a, b: torch.cat([a, b]), plain, own)
        return joined


def _rows(tree: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    result: dict[str, Any] = pytree.tree_map_only(Tensor, lambda t: t[rows], dict(tree))
    return result


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
        noise: Tensor,
        conditions: Mapping[str, Any],
        unconditional: Mapping[str, Any] | None,
        *,
        seed: int,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Finished samples of a model [runs, C, H, W], on the device."""

        def moved(tree: Mapping[str, Any] | None) -> Any:
            return pytree.tree_map_only(Tensor, lambda t: t.to(self.device), tree)

        return denoise(
            model,
            self.scheduler,
            noise.to(self.device),
            num_inference_steps=self.steps,
            seed=seed,
            conditions=moved(conditions),
            unconditional=moved(unconditional),
            guidance_scale=self.guidance_scale,
            callback=callback,
        )

    @torch.no_grad()
    def record(
        self,
        walker: Predict,
        noise: Tensor,
        conditions: Mapping[str, Any],
        unconditional: Mapping[str, Any] | None,
        *,
        seed: int,
        progress: str | None = None,
    ) -> Runs:
        """Record runs.

        Args:
            walker: Decides where the runs go.
            noise: [runs, C, H, W], standard normal.
            conditions: Further arguments, [runs, ...] each.
            unconditional: Those of the unconditional half; None without guidance.
            seed: Of ancestral noise.
            progress: Text of a progress bar, None for none.

        Raises:
            CalibrationError: The runs leave the finite numbers, or an argument has the wrong
                length.
        """
        parts = []
        bar = tqdm(
            total=len(noise) * self.steps, desc=progress, unit="step", disable=progress is None
        )
        for rows in torch.split(torch.arange(len(noise)), self.batch_size):
            plain = None if unconditional is None else _rows(unconditional, rows)
            start = int(rows[0])
            own = _rows(conditions, rows)
            parts.append(self._part(walker, noise[rows], own, plain, seed + start, bar))
        bar.close()
        runs = _joined(parts)
        if not bool(torch.isfinite(runs.targets).all() and torch.isfinite(runs.samples).all()):
            raise CalibrationError(
                "denoising runs gave NaN or infinite values; check the model and that the "
                "scheduler belongs to it"
            )
        return runs

    def _part(
        self,
        walker: Predict,
        noise: Tensor,
        conditions: Mapping[str, Any],
        unconditional: Mapping[str, Any] | None,
        seed: int,
        bar: Any,
    ) -> Runs:
        samples: list[Tensor] = []
        timesteps: list[Tensor] = []
        targets: list[Tensor] = []

        def watched(**inputs: Any) -> Tensor:
            answer = first_tensor(walker(**inputs))
            right = answer if walker is self.teacher else first_tensor(self.teacher(**inputs))
            count = len(noise)
            samples.append(inputs["sample"][-count:].cpu())
            timesteps.append(inputs["timestep"][-count:].cpu())
            # a learned variance is no noise to be matched
            targets.append(guided(right, self.guidance_scale)[:, : noise.shape[1]].cpu())
            return answer

        self.denoise(
            watched,
            noise,
            conditions,
            unconditional,
            seed=seed,
            callback=lambda index, timestep, sample: bar.update(len(sample)),
        )
        return Runs(
            samples=torch.stack(samples, 1),
            timesteps=torch.stack(timesteps, 1),
            targets=torch.stack(targets, 1),
            conditions=conditions,
            unconditional=unconditional,
        )


def _joined(parts: list[Runs]) -> Runs:
    """Several records as one."""
    first = parts[0]

    def joined(*values: Any) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) else values[0]

    plain = None
    if first.unconditional is not None:
        plain = pytree.tree_map(joined, *[part.unconditional for part in parts])
    return Runs(
        samples=torch.cat([part.samples for part in parts]),
        timesteps=torch.cat([part.timesteps for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
        conditions=pytree.tree_map(joined, *[part.conditions for part in parts]),
        unconditional=plain,
    )
