"""What every way of drawing has in common: the loop over a scheduler's timesteps.

This file is copied into exported folders, beside `run.py`, with the file of the folder's own kind.
Calibration runs the same loops with the pipeline's float modules in the place of programs, so that
a program meets at run time what its part was calibrated on.
"""

import importlib
import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.calibration.schedules import Schedule, schedule_of, set_steps
from mpqdm_fx.pipelines.medium import Medium
from mpqdm_fx.pipelines.picture_files import Pictures
from mpqdm_fx.pipelines.program_files import RunnerError, refusals

__all__ = [
    "EXTRA",
    "Loop",
    "Number",
    "Parts",
    "Request",
    "Spec",
    "loop_class",
    "predicts_flow",
    "register_loop",
]

#: Condition that stands in further channels behind the latents in every call of the denoiser.
EXTRA = "extra_channels"
Inputs = dict[str, Tensor]
Size = tuple[int, ...]
"""Height and width of a picture in pixels, or samples of a sound in each channel."""
StepCallback = Callable[[int, int], None]


class Parts(Protocol):
    """The networks of a pipeline: programs of a folder, or a pipeline's own modules."""

    def has(self, part: str, size: Size | None = None) -> bool:
        """Whether there is such a part for images of a size; None: for images of any size."""
        ...

    def run(self, part: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Inputs:
        """Run a part on tensors by name; returns its outputs by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number of a request that only some loops take.

    Attributes:
        default: What it is where a request does not say.
        least: Smallest value.
        most: Largest value.
        text: What it does, for help texts.
        argument: What diffusers' pipelines call it, whose own default goes before; None: nothing.
    """

    default: float
    least: float
    most: float
    text: str
    argument: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture or sound that is asked for.

    Attributes:
        size: Of the programs that make it.
        steps: Steps of the scheduler.
        guidance: Weight of classifier-free guidance; up to 1: none.
        seed: Seed of all noise.
        seconds: Length of a sound, no longer than its size; None is all of that.
        prompt: What to draw; None without text.
        negative: What not to draw.
        image: A picture to start from, float [1, 3, H, W] in 0..1.
        mask: Where to draw, float [1, 1, H, W], zeros and ones.
        numbers: The loop's own numbers by name.
    """

    size: Size
    steps: int
    guidance: float
    seed: int
    seconds: float | None = None
    prompt: str | None = None
    negative: str | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def pixels(self) -> Tensor:
        """The picture in -1..1.

        Raises:
            RunnerError: There is none.
        """
        if self.image is None:
            raise RunnerError("the request has no image")
        return self.image * 2 - 1


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an exported folder says of its pipeline beside its programs.

    Attributes:
        settings: What the loop must know of the models, as its `settings` lists it.
        channels: Channels of the latents.
        scale: Pixels or samples for one of the latents, per side.
        convention: How the denoiser is called along a schedule.
        timesteps: Those that the denoiser has table rows for; None if it takes any.
        tokenizer: The tokenizer of a name.
    """

    settings: Mapping[str, Any]
    channels: int
    scale: int
    convention: CallingConvention
    timesteps: Sequence[float] | None
    tokenizer: Callable[[str], Any]


class Loop(ABC):
    """A way of drawing; a subclass is one kind of pipeline.

    Args:
        parts: What it runs.
        spec: What is known of them.
    """

    #: What it makes.
    makes: ClassVar[type[Medium]] = Pictures
    #: What a request must have, and what none else may: of `prompt`, `image` and `mask`.
    needs: ClassVar[tuple[str, ...]] = ()
    #: Whether guidance is away from a prompt that says what not to draw.
    negatives: ClassVar[bool] = False
    #: Numbers that a request may have beside steps and guidance.
    numbers: ClassVar[Mapping[str, Number]] = {}
    #: Parts that run in every step, in running order; the last is the denoiser.
    stepped: ClassVar[tuple[str, ...]] = ("denoiser",)
    #: Names and types of what `Spec.settings` holds, as `program_files` describes JSON values.
    settings: ClassVar[Mapping[str, Any]] = {"prediction_type": str, "flow": bool}

    def __init__(self, parts: Parts, spec: Spec) -> None:
        self.parts = parts
        self.spec = spec

    @abstractmethod
    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """What the stepped parts get beside latents and timestep, for each call of one step."""

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """How often a step calls the denoiser.

        Args:
            guidance: As of `Request`.
            settings: As of `Spec`.
        """
        return 1

    @classmethod
    def takes_negative(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a request may say what not to draw: models with guidance inside read none.

        Args:
            settings: As of `Spec`.
        """
        return cls.negatives and cls.calls_per_step(math.inf, settings) > 1

    def draw(
        self, request: Request, scheduler: Any, callback: StepCallback | None = None
    ) -> Tensor:
        """Run the loop.

        Args:
            request: What is asked for, checked.
            scheduler: A scheduler of diffusers; it is changed.
            callback: Told each step's number and their count after the step.

        Returns:
            What the scheduler ends with, float [1, C, h, w].

        Raises:
            RunnerError: The scheduler cannot draw, a timestep has no row in the tables, or a part
                has no program.
        """
        generator = torch.Generator().manual_seed(request.seed)
        schedule = self.schedule(request, scheduler)
        first = self.first_call(request, schedule)
        times = self._times(schedule.times[first:])
        latents = self.begin(request, schedule, first, generator)
        runs = [self._once(inputs) for inputs in self.conditions(request, generator)]
        drawing = f"{type(scheduler).__name__} cannot draw with this folder"
        for index, time in enumerate(times):
            with refusals(drawing):
                seen = schedule.model_input(latents, first + index)
            predicted = self.combine([self._called(r, seen, time, request) for r in runs], request)
            with refusals(drawing):
                stepped = schedule.step(predicted, first + index, latents, generator)
            if stepped.shape != latents.shape:
                raise RunnerError(
                    f"{drawing}: it makes latents of another size (scale_factors), for which there "
                    f"is no program; give one without"
                )
            latents = stepped
            if callback is not None:
                callback(index + 1, len(times))
        return schedule.last_sample(latents)

    def count(self, request: Request, scheduler: Any) -> int:
        """Steps of `draw` as its callback counts them; the scheduler is changed."""
        schedule = self.schedule(request, scheduler)
        return len(schedule.times) - self.first_call(request, schedule)

    def schedule(self, request: Request, scheduler: Any) -> Schedule:
        """The scheduler's schedule of so many steps, for latents of the request's size."""
        name = type(scheduler).__name__
        if predicts_flow(scheduler) != self.spec.settings["flow"]:
            kinds = {True: "flow matching", False: "noise or v-prediction"}
            raise RunnerError(
                f"{name} is no scheduler of {kinds[self.spec.settings['flow']]}, which this "
                f"folder's model was trained with; give one that is, or the folder's own"
            )
        with refusals(f"{name} has no schedule of {request.steps} steps"):
            shape = self.latent_shape(request)
            set_steps(scheduler, request.steps, self.spec.convention, shape)
        with refusals(f"{name} cannot draw with this folder"):
            return schedule_of(scheduler, self.spec.convention)

    def first_call(self, request: Request, schedule: Schedule) -> int:
        """The first call of the schedule that is run."""
        return 0

    def begin(
        self, request: Request, schedule: Schedule, first: int, generator: torch.Generator
    ) -> Tensor:
        """What the first call starts from, float [1, C, h, w]: noise at the first level."""
        return schedule.first_sample(self.noise(request, generator))

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """Shape of what the scheduler steps on, without the batch axis."""
        return (self.spec.channels, *(side // self.spec.scale for side in request.size))

    def noise(self, request: Request, generator: torch.Generator) -> Tensor:
        """Standard normal latents for a request's size."""
        return torch.randn((1, *self.latent_shape(request)), generator=generator)

    def denoiser_inputs(self, inputs: Inputs, request: Request) -> Inputs:
        """What the denoiser gets, from what all stepped parts of this call get."""
        return inputs

    def combine(self, outputs: Sequence[Tensor], request: Request) -> Tensor:
        """What the calls of a step predict together."""
        return outputs[0]

    def decode(self, latents: Tensor, request: Request) -> Tensor:
        """The picture of latents, float [1, channels, H, W] in -1..1, not clamped.

        A sound's loop returns [1, channels, samples].
        """
        if not self.parts.has("vae_decoder", request.size):
            return latents
        return self.parts.run("vae_decoder", request.size, {"latents": latents})["image"]

    def _called(
        self, run: Mapping[str, Inputs], latents: Tensor, time: Tensor, request: Request
    ) -> Tensor:
        """One call of the stepped parts."""
        outputs: Inputs = {}
        for part in self.stepped:
            inputs = dict(run[part])
            extra = inputs.pop(EXTRA, None)
            sample = latents if extra is None else torch.cat([latents, extra], dim=1)
            convention = self.spec.convention
            inputs |= {convention.sample: sample, convention.timestep: time, **outputs}
            if part == self.stepped[-1]:
                inputs = self.denoiser_inputs(inputs, request)
            outputs = self.parts.run(part, request.size, inputs)
        return outputs["noise_pred"]

    def _once(self, conditions: Inputs) -> dict[str, Inputs]:
        """By stepped part: the conditions, and what it computes of them once per image."""
        return {
            part: {**conditions, **self.parts.run(part, None, conditions)}
            if self.parts.has(part)
            else conditions
            for part in self.stepped
        }

    def _times(self, times: Tensor) -> list[Tensor]:
        """What the denoiser is told at each call: the time, or its row in the tables."""
        table = self.spec.timesteps
        if table is None:
            return [time.float().reshape(1) for time in times]
        rows = {value: row for row, value in enumerate(table)}
        missing = [value for value in times.float().tolist() if value not in rows]
        if missing:
            raise RunnerError(
                f"timestep {missing[0]:g} is not in this folder's tables, which have "
                f"{len(rows)} timesteps from {table[0]:g} to {table[-1]:g}; draw with the steps "
                f"of the export and the folder's own scheduler, or export without tables"
            )
        return [torch.tensor([rows[value]]) for value in times.float().tolist()]


def predicts_flow(scheduler: Any) -> bool:
    """Whether a scheduler takes the velocity of flow matching for the model's prediction.

    Args:
        scheduler: A scheduler of diffusers.
    """
    kind = scheduler.config.get("prediction_type", "")
    return kind in ("flow_prediction", "trigflow") or not hasattr(scheduler, "init_noise_sigma")


_REGISTERED: dict[str, type[Loop]] = {}


def register_loop(kind: str, loop: type[Loop]) -> None:
    """Make a loop known by the name of its kind.

    Args:
        kind: A Python name; the file that defines it becomes `<kind>.py` in exported folders.
        loop: The loop.

    Raises:
        ValueError: The name is no Python name, or another loop's.
    """
    if not kind.isidentifier() or _REGISTERED.get(kind, loop) is not loop:
        raise ValueError(f"kind {kind!r} is no Python name, or another loop's")
    _REGISTERED[kind] = loop


def loop_class(kind: str) -> type[Loop]:
    """The loop of a kind: registered, or the one class of a loop in the file `<kind>.py`.

    Args:
        kind: As a manifest has it.

    Raises:
        RunnerError: There is none.
    """
    if kind in _REGISTERED:
        return _REGISTERED[kind]
    # a file of this folder and nothing else, whatever a manifest says
    if kind.isidentifier() and Path(__file__).with_name(f"{kind}.py").is_file():
        module = _imported(kind)
        for value in vars(module).values():
            if _is_loop(value) and value.__module__ == module.__name__:
                loop: type[Loop] = value
                return loop
    raise RunnerError(
        f"nothing here draws the kind {kind[:80]!r}; draw with the folder's own "
        f"run.py, or register its loop"
    )


def _imported(kind: str) -> ModuleType:
    """A file beside this one, as a module of this one's package, or of none in a folder."""
    package = __name__.rpartition(".")[0]
    if package:
        return importlib.import_module(f"{package}.{kind}")
    # whoever imported run.py by its path need not have the folder among the places of modules
    place = str(Path(__file__).parent)
    sys.path.insert(0, place)
    try:
        return importlib.import_module(kind)
    finally:
        sys.path.remove(place)


def _is_loop(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Loop) and not inspect.isabstract(value)
