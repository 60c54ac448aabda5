"""What each part of a pipeline is called with: example inputs and calibration data.

Parts are calibrated on the float pipeline's own drawings, with its scheduler, prompts, pictures and
guidance; the decoder on what these end with; text encoders on the prompts.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.calibration.sampling import scheduled
from mpqdm_fx.calibration.schedules import schedule_of
from mpqdm_fx.errors import ConfigError, MPQError, first_line
from mpqdm_fx.graph.nested import concatenate
from mpqdm_fx.model.feasibility import check_feasible
from mpqdm_fx.pipelines.adapters import Lora, fused
from mpqdm_fx.pipelines.conditions import Call, default_guidance, default_number
from mpqdm_fx.pipelines.layout import Layout, Size, layout_of, open_pipeline, size_text
from mpqdm_fx.pipelines.loops.loop import Loop, Request
from mpqdm_fx.pipelines.recorded import (
    ModuleParts,
    RecordedRuns,
    decoder_call,
    first_calls,
    float_loop,
)
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.validation import Count, NonNegative, Seed, check_fields
from mpqdm_fx.sources.extra_channels import random_masks

__all__ = ["PipelineInputs", "inputs_of"]

_RUN_SEEDS = 1 << 40  # far from those of pictures that are drawn for eyes
_SEEDS = 1 << 20  # runs of one seed, at most
_VALUES, _RUNS = 1 << 20, 4  # pixels that show a part of the VAE its ranges; runs, at least
_SHARES = (1.0, 0.5, 0.75, 0.25)  # of the programs' length, that sounds have


@dataclass(frozen=True, kw_only=True)
class PipelineInputs:
    """Calibration data of a pipeline's parts, made when it is asked for.

    Attributes:
        layout: The pipeline.
        size: Size to calibrate at.
        prompts: Prompts; runs take turns with them.
        steps: Steps of each run.
        guidance: Guidance scale of the runs, as the pipeline takes it.
        trajectories: Runs.
        batch_size: Rows in a call.
        seed: Seed of noise and order.
    """

    layout: Layout
    size: Size
    prompts: Sequence[str]
    steps: Count
    guidance: NonNegative
    trajectories: Count
    batch_size: Count
    seed: Seed

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def calls_per_step(self) -> int:
        """How often a step calls the denoiser."""
        return self.layout.loop.calls_per_step(self.guidance, self.layout.settings)

    @property
    def takes_text(self) -> bool:
        """Whether the pipeline draws what a prompt says."""
        return "prompt" in self.layout.loop.needs

    @property
    def numbers(self) -> dict[str, float]:
        """The loop's own numbers in calibration runs: more steps than some pipelines run."""
        return {name: number.default for name, number in self.layout.loop.numbers.items()}

    @property
    def default_numbers(self) -> dict[str, float]:
        """The loop's own numbers where a request says none: those of the pipeline's class."""
        drawing = type(self.layout.pipeline)
        return {
            name: default_number(drawing, number.argument, number.default)
            for name, number in self.layout.loop.numbers.items()
        }

    def scheduled(self) -> Any:
        """A copy of the pipeline's scheduler at the start of a run.

        Raises:
            MPQError: It has no schedule of so many steps.
        """
        layout = self.layout
        shape = self._loop.latent_shape(self._request(0, self.size))
        return scheduled(
            layout.pipeline.scheduler, self.steps, convention=layout.convention, sample_shape=shape
        )

    def told_times(self) -> list[float]:
        """What the denoiser is told at each call; a time that comes twice needs one row."""
        times = schedule_of(self.scheduled(), self.layout.convention).times
        return list(dict.fromkeys(times.float().tolist()))

    @cached_property
    def runs(self) -> RecordedRuns:
        """The float pipeline's drawings."""
        return RecordedRuns(
            self.layout,
            [self._request(index, self.size) for index in range(self.trajectories)],
            held_out=self.trajectories // 4,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def _request(self, index: int, size: Size) -> Request:
        """What run number `index` draws, or plays."""
        row = index % self.trajectories  # prompts may be more
        pictures = {name: rows[row][None] for name, rows in self._pictures.items()}
        if size != self.size:
            pictures = {
                name: functional.interpolate(rows, size=size) for name, rows in pictures.items()
            }
        return Request(
            size=size,
            steps=self.steps,
            guidance=self.guidance,
            seed=_RUN_SEEDS + self.seed % _SEEDS * _SEEDS + index,
            seconds=self._seconds(index, size),
            prompt=self.prompts[index % len(self.prompts)] if self.takes_text else None,
            image=pictures.get("image"),
            mask=pictures.get("mask"),
            numbers=self.numbers,
        )

    @cached_property
    def _pictures(self) -> dict[str, Tensor]:
        """What the pipeline is shown: smooth random images in 0..1, and random rectangles."""
        needs = self.layout.loop.needs
        if not {"image", "mask"} & set(needs):
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        coarse = torch.randn(self.trajectories, 3, 4, 4, generator=generator)
        images = functional.interpolate(coarse, size=self.size, mode="bicubic").clamp(-1, 1)
        masks = random_masks(self.trajectories, self.size, generator)
        shown = {"image": images / 2 + 0.5, "mask": masks}
        return {name: rows for name, rows in shown.items() if name in needs}

    def picture(self, index: int) -> dict[str, Any]:
        """What the runner is shown beside the prompt: image and mask, where it takes them.

        Args:
            index: Number of the drawing.
        """
        row = index % self.trajectories
        shown = {name: rows[row] for name, rows in self._pictures.items()}
        arrays = {"image": lambda t: t.permute(1, 2, 0).numpy(), "mask": lambda t: t[0].numpy()}
        return {name: arrays[name](tensor) for name, tensor in shown.items()}

    def calls(self, part: str) -> list[Call]:
        """Calibration calls of a part that runs once per image, in batches.

        Args:
            part: The part's name.
        """
        if not self.layout.parts[part].sized:
            rows = [
                self._once(part, index, prompt) for index, prompt in enumerate(("", *self.prompts))
            ]
            size = self.batch_size
            return [concatenate(rows[start : start + size]) for start in range(0, len(rows), size)]
        if part == "vae_decoder":
            request = self._request(0, self.size)
            latents = self.runs.final_samples
            chosen = self._evenly(len(latents))
            return [decoder_call(self.layout, latents[row, None], request) for row in chosen]
        calls = list(self.runs.calls(part, batch_size=1))  # large activations: one by one
        return [dict(calls[row]) for row in self._evenly(len(calls))]

    def vae_call_count(self, available: int) -> int:
        """Pictures or sounds that a part of the VAE is calibrated on and judged by.

        Their pixels are its rows: few large pictures show as many as many small ones, and each
        takes a decoder's whole run several times.

        Args:
            available: Runs that there are.
        """
        return min(available, max(_RUNS, _VALUES // math.prod(self.size)))

    def _evenly(self, available: int) -> list[int]:
        """Some of all runs alike, the last one among them."""
        count = self.vae_call_count(available)
        return [(place + 1) * available // count - 1 for place in range(count)]

    def tokens_of(self, part: str) -> int:
        """Tokens of a prompt, as a text encoder gets it.

        Args:
            part: The encoder's name.
        """
        return int(self.example(part, self.size)["input_ids"].shape[-1])

    def _once(self, part: str, index: int, prompt: str) -> Call:
        """What a part that runs once, whatever the size, gets of a prompt."""
        loop: Any = self._loop
        request = dataclasses.replace(self._request(index, self.size), prompt=prompt)
        return dict(loop.once_inputs(part, request))

    def _seconds(self, index: int, size: Size) -> float | None:
        """Length of sound number `index`, from a quarter to all of the size; None of pictures."""
        if len(size) > 1:
            return None
        share = _SHARES[index % len(_SHARES)]
        return share * size[0] / float(self.layout.settings["sampling_rate"])

    @property
    def _loop(self) -> Loop:
        return float_loop(self.layout, ModuleParts(self.layout))

    def example(self, part: str, size: Size) -> Call:
        """Inputs of one call with batch 1; at most one step is run for it.

        Args:
            part: The part's name.
            size: Size of what is drawn.
        """
        if not self.layout.parts[part].sized:
            return self._once(part, 0, self.prompts[0])
        if part == "vae_decoder":
            request = self._request(0, size)
            generator = torch.Generator().manual_seed(self.seed)
            return decoder_call(self.layout, self._loop.noise(request, generator), request)
        if size not in self._first_calls:
            self._first_calls[size] = first_calls(self.layout, self._request(0, size))
        return dict(self._first_calls[size][part])

    def check_size(self, size: Size) -> None:
        """Refuse a size that the denoiser cannot be called at, by running one step.

        Its inputs are kept for `example`, so that nothing is run twice.

        Args:
            size: Size of what is drawn.

        Raises:
            ConfigError: A part fails; says what it says.
        """
        try:
            self.example("denoiser", size)
        except MPQError:
            raise
        except Exception as error:  # whatever torch and diffusers say to shapes
            raise ConfigError(
                f"size {size_text(size)}: this {self.layout.class_name} draws nothing of that "
                f"size: {type(error).__name__}: {first_line(error)}; give another one"
            ) from error

    def check_settings(
        self,
        config: MPQConfig,
        *,
        sensitivity: str | Path | None = None,
        max_memory: int | None = None,
    ) -> None:
        """Refuse settings of the denoiser that its calibration or solving would refuse.

        Args:
            config: The settings.
            sensitivity: As of `check_feasible`.
            max_memory: As of `check_feasible`.

        Raises:
            MPQError: As of `check_feasible`.
        """
        runs = self.trajectories - self.trajectories // 4
        check_feasible(
            self.layout.denoiser, self.example("denoiser", self.size), config,
            sensitivity=sensitivity, max_memory=max_memory,
            batch_size=min(self.batch_size, max(1, runs * self.steps)),
        )  # fmt: skip

    @cached_property
    def _first_calls(self) -> dict[Size, dict[str, Call]]:
        return {}


def inputs_of(
    pipeline: Any,
    sizes: Sequence[Size] | None,
    *,
    prompts: Sequence[str] | None,
    guidance: float | None,
    lora: Lora | None = None,
    stored: bool = False,
    **settings: Any,
) -> tuple[PipelineInputs, tuple[Size, ...]]:
    """Open a pipeline; how its parts are called, and the sizes that it is to draw.

    Args:
        pipeline: As of `open_pipeline`.
        sizes: As of `Layout.check_sizes`.
        prompts: Prompts; None takes the family's own.
        guidance: Guidance scale; None takes the pipeline's own. None where nothing is prompted.
        lora: A LoRA that is fused into a copy of the pipeline first.
        stored: As of `open_pipeline`; with a LoRA everything is loaded whole.
        **settings: The other fields of `PipelineInputs`.

    Raises:
        ConfigError: A part does not run at a size.
        MPQError: See `open_pipeline`, `layout_of` and `Layout.check_sizes`.
    """
    opened = open_pipeline(pipeline, stored=stored and lora is None)
    layout = layout_of(opened if lora is None else fused(opened, lora))
    chosen = layout.check_sizes(sizes)
    if "prompt" not in layout.loop.needs:
        guidance = 1.0
    elif guidance is None:
        guidance = default_guidance(type(layout.pipeline))
    texts = layout.family.prompts if prompts is None else tuple(prompts)
    inputs = PipelineInputs(
        layout=layout, size=chosen[0], prompts=texts, guidance=guidance, **settings
    )
    inputs.scheduled()  # what has no such schedule is refused here
    for size in chosen:
        inputs.check_size(size)
    return inputs, chosen
