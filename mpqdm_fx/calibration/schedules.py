"""What a loop asks of a scheduler, whichever methods that has: one interface for all of diffusers'.

Schedulers of noise prediction scale the first noise (`init_noise_sigma`) and the model's input
(`scale_model_input`); those of flow matching (Lipman et al. 2023) do neither. SCM (Lu and Song
2024, "Simplifying, stabilizing and scaling continuous-time consistency models") speaks of angles
where its models know flow matching, which SANA-Sprint translates (Chen et al. 2025, section 3.2).

The file needs torch and numpy alone, so that it goes with an exported pipeline.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpqdm_fx.calibration.conventions import CallingConvention, resolution_shift
from mpqdm_fx.errors import CalibrationError

__all__ = ["Schedule", "schedule_of", "set_steps"]


def set_steps(
    scheduler: Any,
    steps: int,
    convention: CallingConvention,
    sample_shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
) -> None:
    """Set the timesteps of a scheduler as a model's pipeline does.

    Args:
        scheduler: A diffusers scheduler; it is changed.
        steps: Steps of the run.
        convention: Of the model.
        sample_shape: Shape of one sample without the batch axis.
        device: Where the timesteps are to be.

    Raises:
        CalibrationError: The schedule depends on the number of tokens, and that is not known, or
            the model's pipeline does not tell it; or the schedule holds what is no number.
    """
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    config = scheduler.config
    settings: dict[str, Any] = {"device": device}
    shifts = "mu" in accepted and bool(config.get("use_dynamic_shifting"))
    if shifts and convention.shifted:
        settings["mu"] = resolution_shift(config, convention, sample_shape, steps)
    if convention.even_sigmas and "sigmas" in accepted and not config.get("use_flow_sigmas"):
        # in double precision, as diffusers has them
        settings["sigmas"] = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
    if "intermediate_timesteps" in accepted and steps != 2:
        settings["intermediate_timesteps"] = None  # its default is for two steps alone
    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # refused below
            scheduler.set_timesteps(steps, **settings)
    except ValueError as error:
        # others have a shift of their own beside it, which holds
        if not shifts or convention.shifted:
            raise
        raise CalibrationError(
            f"the schedule is shifted by the number of tokens (use_dynamic_shifting), which "
            f"diffusers' pipelines of this model do not tell a {type(scheduler).__name__}; give "
            f"one with use_dynamic_shifting=False and its shift"
        ) from error
    _check_numbers(scheduler, steps)


def _check_numbers(scheduler: Any, steps: int) -> None:
    """Refuse a schedule that some settings make of zeros divided by zeros."""
    for name in ("timesteps", "sigmas"):
        table = getattr(scheduler, name, None)
        if not isinstance(table, Tensor) or not bool(table.isnan().any()):
            continue
        terminal = scheduler.config.get("shift_terminal")
        reason = "check the scheduler's config, or give more steps"
        if terminal:
            reason = (
                f"shift_terminal={terminal:g} stretches them from the first step to the last; give "
                f"2 steps at least, or a {type(scheduler).__name__} without it"
            )
        raise CalibrationError(f"{name} of {steps} steps are not numbers (NaN): {reason}")


class Schedule:
    """A scheduler after `set_timesteps`, as a loop uses it for one run.

    Args:
        scheduler: The scheduler; its state changes from step to step.
        convention: Of the model.
    """

    def __init__(self, scheduler: Any, convention: CallingConvention) -> None:
        self.scheduler = scheduler
        self.convention = convention
        accepted = inspect.signature(scheduler.step).parameters
        self._takes_generator = "generator" in accepted
        # most pipelines say 0 whatever a scheduler's own default is (TCD's is not 0)
        says = "eta" in accepted and convention.eta is not None
        self._options: dict[str, Any] = {"eta": convention.eta} if says else {}

    @property
    def timesteps(self) -> Tensor:
        """The scheduler's timestep at each call of the model, [calls]."""
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    @property
    def times(self) -> Tensor:
        """What the model is told at each call, int64 or float32 [calls].

        Some schedulers (Euler, Heun, ...) keep their timesteps in floating point. Whole numbers
        become int64, because diffusion models are traced and exported with integer timesteps; a
        schedule with fractions stays float32.
        """
        times = self.timesteps
        whole = not times.is_floating_point() or torch.equal(times, times.round())
        return self.convention.model_times(times.long() if whole else times.float())

    def first_sample(self, noise: Tensor) -> Tensor:
        """What the run starts from, of standard normal noise; same shape."""
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def model_input(self, sample: Tensor, call: int) -> Tensor:
        """What the model gets for a sample [B, ...] at a call."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        scaled: Tensor = sample if scale is None else scale(sample, self.timesteps[call])
        return scaled

    def step(
        self, output: Tensor, call: int, sample: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """The next sample.

        Args:
            output: What the model predicted, guided [B, ...].
            call: Number of the call.
            sample: The sample at that call [B, ...].
            generator: For noise that the scheduler adds.
        """
        return self._stepped(self.convention.prediction(output), call, sample, generator)[0]

    def last_sample(self, sample: Tensor) -> Tensor:
        """What the run ends with, of the last step's sample."""
        return sample

    def _stepped(
        self, output: Tensor, call: int, sample: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        options = {**self._options, **({"generator": generator} if self._takes_generator else {})}
        stepped: tuple[Tensor, ...] = self.scheduler.step(
            output, self.timesteps[call], sample, return_dict=False, **options
        )
        return stepped


class _AngleSchedule(Schedule):
    """SCM's, for a model that knows flow matching, as SANA-Sprint's pipeline has it.

    At the angle s the model is told the share of noise u = sin s / (sin s + cos s), sees the sample
    in flow matching's scale, and its velocity is turned into that of the angle.
    """

    def __init__(self, scheduler: Any, convention: CallingConvention) -> None:
        super().__init__(scheduler, convention)
        self._sigma = float(scheduler.config.sigma_data)
        self._clean: Tensor | None = None

    @property
    def timesteps(self) -> Tensor:
        # the last one is where the run ends
        timesteps: Tensor = self.scheduler.timesteps[:-1]
        return timesteps

    @property
    def times(self) -> Tensor:
        angles = self.timesteps.float()
        return torch.sin(angles) / (torch.cos(angles) + torch.sin(angles))

    def first_sample(self, noise: Tensor) -> Tensor:
        return super().first_sample(noise) * self._sigma

    def model_input(self, sample: Tensor, call: int) -> Tensor:
        share = self.times[call]
        return sample / self._sigma * torch.sqrt(share**2 + (1 - share) ** 2)

    def step(
        self, output: Tensor, call: int, sample: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        share, seen = self.times[call], self.model_input(sample, call)
        output = self.convention.prediction(output)
        velocity = (1 - 2 * share) * seen + (1 - 2 * share + 2 * share**2) * output
        velocity = velocity / torch.sqrt(share**2 + (1 - share) ** 2) * self._sigma
        following, self._clean = self._stepped(velocity, call, sample, generator)
        return following

    def last_sample(self, sample: Tensor) -> Tensor:
        return (sample if self._clean is None else self._clean) / self._sigma


def schedule_of(scheduler: Any, convention: CallingConvention) -> Schedule:
    """A scheduler, after `set_timesteps`, as a loop uses it.

    Args:
        scheduler: A diffusers scheduler.
        convention: Of the model.
    """
    is_angle = str(getattr(scheduler.config, "prediction_type", "")) == "trigflow"
    return (_AngleSchedule if is_angle else Schedule)(scheduler, convention)
