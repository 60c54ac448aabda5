"""Run a denoiser along a diffusers scheduler: one loop for every scheduler and every kind of model.

A `Sampler` brings a loop of its own instead; see `calibration.samplers`.

The loop is the one of the diffusers pipelines, without the pipeline: scale the noise, and at each
timestep call the model, combine the two halves of classifier-free guidance (Ho and Salimans 2022,
equation 6), and let the scheduler step. The scheduler given is copied, so the caller's stays as it
is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.calibration.samplers import (
    Denoiser,
    called,
    check_scheduled,
    first_tensor,
    is_sampler,
    model_convention,
    run_sampler,
)
from mpqdm_fx.calibration.schedulers import check_scheduler
from mpqdm_fx.calibration.schedules import schedule_of, set_steps
from mpqdm_fx.capture.entry import in_float32
from mpqdm_fx.errors import CalibrationError, ConfigError, MPQError
from mpqdm_fx.graph.nested import concatenate, take_rows
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.progress import stage, tracked
from mpqdm_fx.records.validation import Count, DerivedSeed, NonNegative, checked

__all__ = [
    "EXTRA_CHANNELS",
    "Denoiser",
    "StepCallback",
    "check_loop",
    "denoise",
    "denoise_in_batches",
    "first_tensor",
    "guided",
    "scheduled",
]

EXTRA_CHANNELS = "extra_channels"
"""Condition that the model gets as channels behind those of the noisy sample, [N, C, H, W]."""

StepCallback = Callable[[int, Tensor, Tensor], None]
"""Told `(step index, timestep, sample after the step)`."""

_STEP_STREAM = 0x5DEECE66D  # what the seeds of initial noise and of added noise differ by


@plain_torch()
@checked
def denoise(
    model: Denoiser,
    scheduler: Any,
    noise: Tensor,
    *,
    num_inference_steps: Count | None = None,
    seed: DerivedSeed,
    conditions: Mapping[str, Any] | None = None,
    guidance_scale: NonNegative | None = None,
    unconditional: Mapping[str, Any] | None = None,
    convention: CallingConvention | None = None,
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """Turn noise into samples with a model and a scheduler.

    Models for inpainting, editing and upscaling see a picture in further channels of their sample:
    the condition `EXTRA_CHANNELS` is put behind the noisy channels in every call.

    Args:
        model: called with the noisy samples [B, ...], times [B] and the conditions as keywords;
            returns a tensor, a tuple whose first entry is the tensor, or an output with `.sample`.
            With guidance B is twice the batch of `noise`, the unconditional half first. A module in
            half precision runs as a float32 copy.
        scheduler: a diffusers scheduler, of noise prediction or of flow matching; a copy of it is
            used. Or a `Sampler`, which names the model's arguments itself, combines the halves of
            guidance itself, and knows its own steps.
        noise: standard normal, float [N, ...], not yet scaled by the scheduler's initial sigma. Of
            models that read packed sequences (Flux) it is packed, [N, tokens, channels], and so are
            the samples; position ids are conditions [N, tokens, axes].
        num_inference_steps: how many steps the schedule has; None with a `Sampler`.
        seed: of the noise that ancestral schedulers add at each step. Noise that was drawn with a
            generator of the same seed is another stream.
        conditions: further keyword arguments of the model, tensors (or dicts and tuples of them)
            with the batch N in front.
        guidance_scale: weight of classifier-free guidance; None runs the conditional half alone.
        unconditional: the conditions of the unconditional half, the same keywords as `conditions`.
        convention: what the model calls noisy samples and times, and how it is told these; None
            takes that of the model's class. See `mpqdm_fx.calibration.conventions`.
        callback: called after every step of a scheduler.
        progress: show a progress bar over the steps.

    Returns:
        The samples, shape and dtype of `noise`.

    Raises:
        ConfigError: a number is out of range or missing, the scheduler has no schedule of so many
            steps, the model does not take what the convention names, or a `Sampler` is given what
            belongs to schedulers.
        CalibrationError: guidance without unconditional conditions, conditions that do not match,
            a scheduler that it cannot drive or whose numbers are no schedule, or a model output of
            another shape than the sample.
    """
    check_loop(scheduler, num_inference_steps, guidance_scale)
    model = in_float32(model)
    inputs = dict(conditions or {})
    # Callers draw `noise` by this very seed: with one stream for both, an ancestral scheduler would
    # add the initial noise itself, and deviations would add up where variances have to.
    generator = torch.Generator(noise.device).manual_seed((seed + _STEP_STREAM) % 2**63)
    if is_sampler(scheduler):
        return run_sampler(scheduler, model, noise, inputs, generator)
    assert num_inference_steps is not None
    paired = guidance_scale is not None
    if paired:
        inputs = _pair_conditions(unconditional, inputs)
    extra = inputs.pop(EXTRA_CHANNELS, None)
    _check_extra(extra, len(noise) * (2 if paired else 1), noise)
    convention = convention or model_convention(model)
    check_scheduled(model, convention)
    started = scheduled(
        scheduler,
        num_inference_steps,
        convention=convention,
        sample_shape=noise.shape[1:],
        device=noise.device,
    )
    schedule = schedule_of(started, convention)
    times = schedule.times
    sample = schedule.first_sample(noise)
    with torch.no_grad():
        for index, time in enumerate(tracked(times, "denoising" if progress else None, len(times))):
            seen = schedule.model_input(sample, index)
            model_input = torch.cat([seen, seen]) if paired else seen
            if extra is not None:
                model_input = torch.cat([model_input, extra], dim=1)
            rows = len(model_input)
            call = {convention.sample: model_input, convention.timestep: time.repeat(rows)}
            output = first_tensor(called(model, {**call, **inputs}))
            output = _drop_learned_variance(output.to(sample.dtype), sample, scheduler)
            output = _guided_mean(output, sample.shape[1], guidance_scale)
            sample = schedule.step(output, index, sample, generator)
            if callback is not None:
                callback(index, time, sample)
    return schedule.last_sample(sample)


def check_loop(
    loop: Any, num_inference_steps: int | None, guidance_scale: float | None = None
) -> None:
    """Refuse a loop without what it needs, or with what it has no use for.

    Args:
        loop: A diffusers scheduler, or a `Sampler`.
        num_inference_steps: As of `denoise`.
        guidance_scale: As of `denoise`.

    Raises:
        ConfigError: A scheduler without a number of steps, a sampler with one or with guidance, or
            something that is neither.
        CalibrationError: A scheduler's numbers are no schedule.
    """
    name = type(loop).__name__
    if not is_sampler(loop):
        if not hasattr(loop, "set_timesteps"):
            raise ConfigError(
                f"{name} is no scheduler of diffusers, and no sampler: it has no method "
                f"sample(model, noise, conditions, generator)"
            )
        if num_inference_steps is None:
            raise ConfigError(f"{name} needs num_inference_steps, the steps of a run")
        return check_scheduler(loop)
    if num_inference_steps is not None:
        raise ConfigError(
            f"{name} is a sampler, which knows its own steps; leave num_inference_steps out"
        )
    if guidance_scale is not None:
        raise ConfigError(
            f"{name} is a sampler, which combines the halves of guidance itself; leave "
            f"guidance_scale out"
        )
    return None


def scheduled(
    scheduler: Any,
    steps: int,
    *,
    convention: CallingConvention | None = None,
    sample_shape: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Any:
    """Return a copy of a scheduler that stands at the start of a run.

    Args:
        scheduler: a diffusers scheduler.
        steps: steps of the run.
        convention: of the model; None is that of UNets.
        sample_shape: shape of one sample without the batch axis, for schedules that depend on it.
        device: where its timesteps are to be.

    Raises:
        ConfigError: the scheduler has no schedule of so many steps; says why.
        CalibrationError: its numbers are no schedule, or it depends on a shape that is not known.
    """
    check_scheduler(scheduler)
    schedule = copy.deepcopy(scheduler)
    try:
        set_steps(schedule, steps, convention or CallingConvention(), sample_shape, device=device)
    except MPQError:
        raise
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{type(scheduler).__name__} has no schedule of {steps} steps: {reason:.200}"
        ) from error
    check_scheduler(schedule)
    return schedule


def denoise_in_batches(
    model: Denoiser,
    scheduler: Any,
    noise: Tensor,
    *,
    num_inference_steps: int | None,
    seed: int,
    conditions: Mapping[str, Any],
    guidance_scale: float | None = None,
    unconditional: Mapping[str, Any] | None = None,
    convention: CallingConvention | None = None,
    batch_size: int = 16,
    progress: str | None = None,
) -> Tensor:
    """Turn much noise into samples, some at once; each batch has ancestral noise of its own.

    Args:
        model: as of `denoise`.
        scheduler: as of `denoise`.
        noise: standard normal, float [N, ...].
        num_inference_steps: as of `denoise`.
        seed: of the noise that ancestral schedulers add.
        conditions: tensors, or dicts and tuples of them, with N in front.
        guidance_scale: as of `denoise`.
        unconditional: as of `denoise`.
        convention: as of `denoise`.
        batch_size: samples at once.
        progress: name of the stage that tells of the steps; None tells of none.

    Returns:
        The samples, shape and dtype of `noise`.
    """
    model = in_float32(model)  # one copy for all batches
    parts = []
    own_loop = is_sampler(scheduler)  # it says nothing of its steps
    total = len(noise) * (1 if own_loop else num_inference_steps or 1)
    with stage(progress, total, "run" if own_loop else "step") as advance:
        for start in range(0, len(noise), batch_size):
            rows = slice(start, start + batch_size)
            part = denoise(
                model,
                scheduler,
                noise[rows],
                num_inference_steps=num_inference_steps,
                seed=seed + start,
                conditions=take_rows(dict(conditions), rows),
                guidance_scale=guidance_scale,
                unconditional=None
                if unconditional is None
                else take_rows(dict(unconditional), rows),
                convention=convention,
                callback=None if own_loop else lambda *step: advance(len(step[-1])),
            )
            if own_loop:
                advance(len(part))
            parts.append(part)
    return torch.cat(parts)


def guided(output: Tensor, guidance_scale: float | None) -> Tensor:
    """Combine the halves of classifier-free guidance (Ho and Salimans 2022, equation 6).

    Args:
        output: [2 B, ...], the unconditional half first; [B, ...] without guidance.
        guidance_scale: Weight of guidance; None returns `output`.
    """
    if guidance_scale is None:
        return output
    plain, conditional = output.chunk(2)
    return plain + guidance_scale * (conditional - plain)


def _guided_mean(output: Tensor, channels: int, guidance_scale: float | None) -> Tensor:
    """Guidance of what the model predicts; a learned variance is that of the conditional half."""
    if guidance_scale is None or output.shape[1] == channels:
        return guided(output, guidance_scale)
    variance = output.chunk(2)[1][:, channels:]
    return torch.cat([guided(output[:, :channels], guidance_scale), variance], dim=1)


def _check_extra(extra: Any, rows: int, noise: Tensor) -> None:
    if extra is None:
        return
    shape = tuple(extra.shape) if isinstance(extra, Tensor) else type(extra).__name__
    wanted = (rows, "any", *noise.shape[2:])
    if not isinstance(extra, Tensor) or (rows, extra.shape[1:2].numel(), *noise.shape[2:]) != shape:
        raise CalibrationError(f"condition {EXTRA_CHANNELS} is {shape}; it must be {wanted}")


def _pair_conditions(
    unconditional: Mapping[str, Any] | None, conditions: Mapping[str, Any]
) -> dict[str, Any]:
    if unconditional is None or set(unconditional) != set(conditions):
        raise CalibrationError(
            "guidance needs `unconditional` with the same keywords as `conditions`: "
            f"got {sorted(unconditional or {})} and {sorted(conditions)}"
        )
    paired: dict[str, Any] = concatenate([dict(unconditional), dict(conditions)])
    return paired


def _drop_learned_variance(output: Tensor, sample: Tensor, scheduler: Any) -> Tensor:
    """Keep the mean where a model (DiT) also predicts a variance that nobody uses."""
    channels = sample.shape[1]
    learned = str(getattr(scheduler.config, "variance_type", "")).startswith("learned")
    if output.shape[1] == 2 * channels and not learned:
        output = output[:, :channels]
    if output.shape[2:] != sample.shape[2:] or output.shape[1] not in (channels, 2 * channels):
        raise CalibrationError(
            f"the model's output has shape {tuple(output.shape)} for a sample of shape "
            f"{tuple(sample.shape)}; it does not look like a denoiser"
        )
    return output
