"""Calibration data from the model itself: its inputs along its own denoising runs.

A diffusion model sees its own outputs again and again, so it is calibrated on what it meets there,
not on noised training images: Q-Diffusion (Li et al. 2023, section 4.2) and MPQ-DM sample the
inputs of the float model over all timesteps. Anything else that yields keyword dicts can be used as
well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpqdm_fx.calibration.calls import check_call
from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.calibration.samplers import (
    Denoiser,
    check_scheduled,
    is_sampler,
    model_convention,
    rows_of,
)
from mpqdm_fx.calibration.sampling import EXTRA_CHANNELS, check_loop, denoise
from mpqdm_fx.capture.entry import in_float32, unwrap
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.nested import concatenate, take_rows, tensor_leaves
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.progress import stage
from mpqdm_fx.records.validation import Count, NonNegative, Seed, Some, checked

__all__ = [
    "Conditions",
    "Trajectories",
    "balanced_class_labels",
    "digits_trajectories",
    "make_conditions",
    "sample_shape_of",
]

Conditions = Mapping[str, Any] | Callable[[int, torch.Generator], Mapping[str, Any]]
"""Conditions of all trajectories at once, or a function `(count, generator)` that makes them."""


_RUN = "__run"  # which run a recorded row belongs to, until the rows are in batches


class Trajectories:
    """The inputs a model gets along its own denoising runs, as batches of keyword arguments.

    Iterating yields dicts `{"sample", "timestep", **conditions}` under the model's names, or of
    what a `Sampler` calls the model with, exactly as the model was called: with guidance both
    halves of each pair are there. Every trajectory contributes every timestep of the schedule
    (every call of a sampler). The runs are made once, at the first iteration, with a progress bar;
    the same settings give the same batches, however often they are read.

    Args:
        model: the float denoiser, called as `model(sample=..., timestep=..., **conditions)`, by its
            own names for these, or as the sampler calls it; one in half precision runs as a float32
            copy.
        scheduler: a diffusers scheduler; it is copied. Or a `Sampler`: a loop of one's own.
        sample_shape: shape of one sample without the batch axis; None reads `model.config`.
        num_trajectories: how many runs from different noise.
        num_inference_steps: steps in each run; None with a sampler, which has its own.
        batch_size: rows in a batch (model rows: with guidance a run has two at each timestep). The
            last batch may be smaller. A sampler makes so many runs at once.
        seed: of the noise, of conditions made by a function, of ancestral noise, and of the order.
        conditions: further keyword arguments of the model. A mapping holds tensors with
            `num_trajectories` in front; a function is called once with the number of trajectories
            and a generator seeded by `seed`. A sampler gets those of its runs. With a scheduler,
            channels behind the noisy ones, such as the mask and the masked image of inpainting, are
            the condition `"extra_channels"`; batches hold them as channels of `sample`, as the
            model was called.
        guidance_scale: weight of classifier-free guidance, None for none and with a sampler.
        unconditional: conditions of the unconditional half, in the same form.
        convention: what the model calls samples and times, and how it is told these; None takes
            that of the model's class.
        shuffle: True mixes trajectories and timesteps, so that each batch holds many noise levels;
            False keeps the order of the runs, one timestep in a batch.
        held_out: so many of the runs, the last ones, fill batches of their own at the end; see
            `held_out_calls`.
        rows_per_timestep: with a number, only so many of the model's rows at each timestep (at each
            of a sampler's calls) are kept, drawn with `seed` without replacement; None keeps all.

    Raises:
        ConfigError: a number is out of range.
        CalibrationError: a scheduler whose numbers are no schedule, conditions of the wrong length
            or not finite, an unknown sample shape, or samples that are not finite.
    """

    @plain_torch()
    @checked
    def __init__(
        self,
        model: Denoiser,
        scheduler: Any,
        *,
        num_trajectories: Count,
        num_inference_steps: Count | None = None,
        batch_size: Count,
        seed: Seed,
        sample_shape: tuple[Count, ...] | None = None,
        conditions: Conditions | None = None,
        guidance_scale: NonNegative | None = None,
        unconditional: Conditions | None = None,
        convention: CallingConvention | None = None,
        shuffle: bool = True,
        rows_per_timestep: Count | None = None,
        held_out: Some = 0,
    ) -> None:
        if held_out >= num_trajectories:
            raise ConfigError(
                f"held_out is {held_out}; it must leave some of the {num_trajectories} runs"
            )
        check_loop(scheduler, num_inference_steps, guidance_scale)
        self.convention = convention or model_convention(model)
        if not is_sampler(scheduler):
            check_scheduled(model, self.convention)
        self.model = model
        self.scheduler = scheduler
        self.num_trajectories = num_trajectories
        self.num_inference_steps = num_inference_steps
        self.batch_size = batch_size
        self.seed = seed
        self.sample_shape = sample_shape or sample_shape_of(model)
        self.guidance_scale = guidance_scale
        self.shuffle = shuffle
        self.rows_per_timestep = rows_per_timestep
        self.held_out = held_out
        generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(num_trajectories, *self.sample_shape, generator=generator)
        self._conditions = make_conditions(conditions, num_trajectories, generator)
        self._unconditional = (
            make_conditions(unconditional, num_trajectories, generator)
            if guidance_scale is not None
            else None
        )
        self._batches: list[dict[str, Any]] | None = None
        self._held_out_batches = 0
        self._samples: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._run())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the batches; the dicts are new each time, their tensors are shared."""
        for batch in self._run():
            yield dict(batch)

    @property
    def held_out_calls(self) -> range:
        """Indices of the batches that hold rows of the held-out runs alone."""
        return range(len(self) - self._held_out_batches, len(self))

    @property
    def final_samples(self) -> Tensor:
        """What the runs ended with, float [num_trajectories, ...]."""
        self._run()
        assert self._samples is not None
        return self._samples

    @plain_torch()
    def _run(self) -> list[dict[str, Any]]:
        if self._batches is None:
            self._samples, calls = self._record()
            self._batches = self._arrange(calls)
        return self._batches

    def _record(self) -> tuple[Tensor, list[list[dict[str, Any]]]]:
        """Run all trajectories; return final samples and the calls at each step, or call."""
        # a dict: second-order schedulers (Heun, ...) call the model more often than they have steps
        calls: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        step = 0
        model = in_float32(self.model)
        sampler = self.scheduler if is_sampler(self.scheduler) else None

        def recording_model(**inputs: Any) -> Any:
            nonlocal step
            if sampler is None:
                calls[step].append({**inputs, _RUN: runs.repeat(pairs)})
                return model(**inputs)
            times = rows_of(inputs, len(runs), sampler) // len(runs)
            # the loop may go on with the same tensors in place
            clones = pytree.tree_map_only(Tensor, torch.clone, inputs)
            calls[step].append({**clones, _RUN: runs.repeat(times)})
            step += 1
            return model(**inputs)

        pairs = 1 if self.guidance_scale is None else 2
        finals = []
        with stage(
            "float model's runs",
            self.num_trajectories * (self.num_inference_steps or 1),
            unit="step" if sampler is None else "run",
        ) as advance_by:
            for start, rows in self._chunks(pairs):
                noise = self._noise[rows]
                runs = torch.arange(start, start + len(noise))

                def advance(index: int, timestep: Tensor, sample: Tensor) -> None:
                    nonlocal step
                    step = index + 1
                    advance_by(len(sample))

                step = 0
                finals.append(
                    denoise(
                        recording_model,
                        self.scheduler,
                        noise,
                        num_inference_steps=self.num_inference_steps,
                        seed=self.seed + start,
                        conditions=take_rows(self._conditions, rows),
                        guidance_scale=self.guidance_scale,
                        unconditional=(
                            None
                            if self._unconditional is None
                            else take_rows(self._unconditional, rows)
                        ),
                        convention=self.convention,
                        callback=advance if sampler is None else None,
                    )
                )
                if sampler is not None:
                    advance_by(len(noise))
        samples = torch.cat(finals)
        if not torch.isfinite(samples).all():
            raise CalibrationError(
                "the model's own denoising run gave NaN or infinite samples; check the float model "
                "and that scheduler (or sampler) and conditions belong to it"
            )
        return samples, [calls[index] for index in sorted(calls)]

    def _chunks(self, pairs: int) -> Iterator[tuple[int, slice]]:
        """Runs that are made at once: the first one's number, and their rows."""
        chunk = max(1, self.batch_size // pairs)
        ends = [self.num_trajectories]
        if is_sampler(self.scheduler):  # the order of the rows in its calls is its own affair
            ends.insert(0, self.num_trajectories - self.held_out)
        first = 0
        for end in ends:
            for start in range(first, end, chunk):
                yield start, slice(start, min(start + chunk, end))
            first = end

    def _arrange(self, calls: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        if self.rows_per_timestep is not None:
            subsets = []
            for at_timestep in calls:
                merged = concatenate(at_timestep)
                rows = torch.randperm(len(merged[_RUN]), generator=generator)
                subsets.append([take_rows(merged, rows[: self.rows_per_timestep])])
            calls = subsets
        timesteps = [concatenate(at_timestep) for at_timestep in calls]
        first_held_out = self.num_trajectories - self.held_out
        batches: list[dict[str, Any]] = []
        for held_out in (False, True):
            parts = [
                take_rows(part, ((part[_RUN] >= first_held_out) == held_out).nonzero()[:, 0])
                for part in timesteps
            ]
            if self.shuffle:
                everything = concatenate(parts)
                order = torch.randperm(len(everything[_RUN]), generator=generator)
                parts = [take_rows(everything, order)]
            before = len(batches)
            for part in parts:
                indices = torch.arange(len(part.pop(_RUN)))
                for rows in torch.split(indices, self.batch_size):
                    batches += [take_rows(part, rows)] if len(rows) else []
            self._held_out_batches = len(batches) - before
        return batches


def balanced_class_labels(num_classes: int, *, name: str = "class_labels") -> Conditions:
    """Return conditions that give every class its turn: labels 0, 1, ..., n-1, 0, 1, ...

    Args:
        num_classes: how many classes the model knows.
        name: the model's keyword for labels.

    Returns:
        A function for the `conditions` of `Trajectories`.
    """

    def labels(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.arange(count) % num_classes}

    return labels


def digits_trajectories(
    model: Denoiser,
    scheduler: Any,
    *,
    seed: int,
    num_trajectories: int = 20,
    num_inference_steps: int = 20,
    batch_size: int = 32,
    rows_per_timestep: int | None = 16,
) -> Trajectories:
    """Return the calibration data of the bundled digits model: 16 of 20 runs at each of 20 steps.

    Args:
        model: the digits UNet.
        scheduler: its scheduler.
        seed: of noise and order.
        num_trajectories: runs; labels take turns.
        num_inference_steps: steps of each run.
        batch_size: rows in a batch.
        rows_per_timestep: rows kept of each timestep, None for all.

    Returns:
        The trajectories, shuffled; with the defaults 320 rows in 10 batches.
    """
    return Trajectories(
        model,
        scheduler,
        num_trajectories=num_trajectories,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        seed=seed,
        sample_shape=(1, 16, 16),
        conditions=balanced_class_labels(10),
        rows_per_timestep=rows_per_timestep,
    )


def sample_shape_of(model: Any) -> tuple[int, ...]:
    """Shape of one sample, as the model's config says it.

    Raises:
        CalibrationError: It does not say, or some of the channels that it takes are no noise.
    """
    config = getattr(unwrap(model) if isinstance(model, nn.Module) else model, "config", None)
    size = getattr(config, "sample_size", None)
    channels = getattr(config, "in_channels", None)
    if size is None or channels is None:
        raise CalibrationError(
            f"{type(model).__name__} does not say its sample size; give sample_shape=(C, H, W)"
        )
    predicted = getattr(config, "out_channels", None)
    if predicted is not None and predicted < channels:
        raise CalibrationError(
            f"{type(model).__name__} takes {channels} channels and predicts {predicted}; give "
            f"sample_shape=({predicted}, H, W), and the others as conditions "
            f"{{{EXTRA_CHANNELS!r}: tensor}}"
        )
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (channels, *sides)


def make_conditions(
    conditions: Conditions | None, count: int, generator: torch.Generator
) -> dict[str, Any]:
    """Conditions of so many runs: a mapping as it is, or what a function makes.

    Args:
        conditions: See `Trajectories`; None gives none.
        count: Number of runs.
        generator: Given to a function.

    Raises:
        CalibrationError: A tensor has another length, is empty, or holds NaN or infinity.
    """
    values = conditions(count, generator) if callable(conditions) else conditions
    values = {} if values is None else values
    check_call(values, "conditions")
    values = dict(values)
    for name, value in values.items():
        if isinstance(value, list) and not any(tensor_leaves(value)):
            raise CalibrationError(
                f"condition {name} is a list without tensors; give a tensor whose first axis is "
                f"the number of trajectories, {count}"
            )
    for name, tensor in tensor_leaves(values):
        if tensor.ndim == 0 or len(tensor) != count:
            raise CalibrationError(
                f"condition {name} has shape {tuple(tensor.shape)}; its first axis must be the "
                f"number of trajectories, {count}"
            )
    return values
