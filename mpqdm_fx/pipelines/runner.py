"""Draw pictures or make sounds with the programs of a folder that `mpqdm-fx export` wrote.

This file is copied into that folder as `run.py`, with what it imports of the package beside it.
They need numpy, ExecuTorch's runtime, the scheduler (diffusers, with torch), the tokenizer
(transformers) and, for picture files, pillow.

    python run.py "a cat" --seed 0 --steps 20 --guidance 7.5 --output cat.png
"""

import argparse
import copy
import importlib
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.errors import ArtifactError, first_line
from mpqdm_fx.io.classes import diffusers_class
from mpqdm_fx.pipelines.loops.loop import Loop, Number, Parts, Request, Spec, loop_class
from mpqdm_fx.pipelines.medium import Medium
from mpqdm_fx.pipelines.picture_files import Pictures, area_of, picture_of, read_picture
from mpqdm_fx.pipelines.program_files import (
    LARGEST,
    SCHEDULER,
    ProgramFiles,
    RunnerError,
    check_settings,
    refusals,
)

__all__ = ["PipelineRunner", "RunnerError", "main"]

logger = logging.getLogger(__name__)


class PipelineRunner:
    """A folder of programs, callable with a prompt.

    Programs are loaded when they are first run.

    Args:
        folder: Folder written by `mpqdm-fx export`.
        verify: Hash all files at once; otherwise each is hashed before it is used.

    Raises:
        ArtifactError: The folder is not whole, or written by another version.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.programs: ProgramFiles = ProgramFiles(folder, verify=verify)
        #: How the folder draws.
        self.loop: type[Loop] = loop_class(self.manifest["kind"])
        check_settings(self.manifest["settings"], self.loop.settings, self.folder)
        if len(self.sizes[0]) != len(self.loop.makes.measures):
            raise ArtifactError(f"{self.folder} is damaged: its sizes are none of its kind")
        #: What the folder makes.
        self.medium: Medium = self.loop.makes(self.sizes, self.manifest["settings"])
        self._tokenizers: dict[str, Any] = {}

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `pipeline.json`."""
        return self.programs.manifest

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """What there are programs for; the first is the default.

        Heights and widths of pictures in pixels, lengths of sounds in samples of a channel.
        """
        return [tuple(size) for size in self.manifest["sizes"]]

    def __call__(self, prompt: str | None = None, **options: Any) -> NDArray[Any]:
        """Draw one image, or make one sound.

        Args:
            prompt: What to draw; None for an unconditional model.
            **options: As of `sample`.

        Returns:
            uint8 [H, W, 3], or [H, W, 1] for a model of grey images; of a sound int16 [samples,
            channels].

        Raises:
            RunnerError: As `sample`.
        """
        return self.medium.codes(self.sample(prompt, **options))

    def sample(
        self,
        prompt: str | None = None,
        *,
        scheduler: Any = None,
        callback: Callable[[int, int], None] | None = None,
        **wanted: Any,
    ) -> NDArray[np.float32]:
        """Draw one image, or make one sound, as float numbers.

        Args:
            prompt: What to draw; None for an unconditional model.
            scheduler: Class name of a diffusers scheduler, or a scheduler, in place of the
                folder's own.
            callback: Told the step's number and their count after each step.
            **wanted: As of `request`.

        Returns:
            float32 [H, W, channels] in 0..1; of a sound [samples, channels], about -1 to 1.

        Raises:
            RunnerError: There is no program for the size, no row for a timestep, a condition is
                missing or too much, a number is out of range, the scheduler cannot draw, or a
                package is not installed.
            ArtifactError: A file of the folder is not what was written.
        """
        return self.draw(self.request(prompt, **wanted), self.programs, scheduler, callback)

    def request(
        self,
        prompt: str | None = None,
        *,
        negative: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seconds: float | None = None,
        image: Any = None,
        mask: Any = None,
        **numbers: float,
    ) -> Request:
        """What is to be drawn, checked.

        Args:
            prompt: What to draw; None for an unconditional model.
            negative: What not to draw; used with guidance.
            seed: Seed of the noise; the same numbers as diffusers with a CPU generator.
            steps: Steps of the scheduler; default: those of the export.
            guidance: Weight of classifier-free guidance, as the pipeline takes it. Up to 1, for
                Z-Image up to 0, switches it off and saves its calls. Default: that of the export.
            height: Height in pixels; height and width must be a size of the export.
            width: Width in pixels.
            seconds: Length of a sound, at most the longest of the export; that of the first size by
                default.
            image: What a picture is drawn from or into, where the pipeline takes one: uint8
                [H, W, 3] or float in 0..1.
            mask: For inpainting: [H, W], from 0.5 on (uint8: from 128) where to draw.
            **numbers: What only this kind of pipeline takes; `loop.numbers` lists it, such as the
                `strength` of image to image.

        Raises:
            RunnerError: As `sample`.
        """
        defaults = self.manifest["defaults"]
        for name, text in (("prompt", prompt), ("negative", negative)):
            _check_type(name, text, str | None, "one text")
        size = self.size({"height": height, "width": width, "seconds": seconds})
        self.check_conditions({"prompt": prompt, "image": image, "mask": mask})
        if negative is not None and not self.loop.takes_negative(self.manifest["settings"]):
            raise RunnerError(f"this {self.manifest['pipeline']} takes no negative prompt")
        request = Request(
            prompt=prompt,
            negative=negative,
            size=size,
            seconds=seconds,
            seed=seed,
            steps=defaults["steps"] if steps is None else steps,
            guidance=defaults["guidance"] if guidance is None else guidance,
            image=None if image is None else picture_of(image, size),
            mask=None if mask is None else area_of(mask, size),
            numbers=self._numbers(numbers),
        )
        _check_numbers(request)
        return request

    def draw(
        self,
        request: Request,
        parts: Parts,
        scheduler: Any = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Draw what was asked for with these programs, or with what stands in their place.

        Args:
            request: What is asked for, checked.
            parts: What runs.
            scheduler: As of `sample`.
            callback: As of `sample`.
        """
        latents_of = self.manifest["latents"]
        spec = Spec(
            settings=self.manifest["settings"],
            channels=latents_of["channels"],
            scale=latents_of["scale"],
            convention=CallingConvention(**self.manifest["convention"]),
            timesteps=self.manifest["timesteps"],
            tokenizer=self._tokenizer,
        )
        loop = self.loop(parts, spec)
        latents = loop.draw(request, self.scheduler(scheduler), callback)
        return self._decoded(loop, latents, request)

    def _decoded(self, loop: Loop, latents: Tensor, request: Request) -> NDArray[np.float32]:
        """What the scheduler ended with as a picture or a sound."""
        made = loop.decode(latents, request)
        if bool(made.isnan().any()):
            raise RunnerError(
                f"the {self.medium.noun} is not a number (NaN); change guidance or the scheduler"
            )
        return self.medium.values(made)

    def scheduler(self, chosen: Any = None) -> Any:
        """The folder's scheduler, or another one with its settings.

        Args:
            chosen: Class name of a diffusers scheduler; a scheduler is copied.

        Raises:
            RunnerError: diffusers has no such class, or it refuses the settings.
        """
        if chosen is not None and not isinstance(chosen, str):
            if not hasattr(chosen, "set_timesteps"):
                raise RunnerError(f"{chosen!r} is no scheduler; give one of diffusers, or its name")
            return copy.deepcopy(chosen)
        config = self.programs.files.read_json(SCHEDULER, finite=False)
        is_own = chosen is None
        with refusals("the scheduler cannot be made"):
            try:
                scheduler_class = diffusers_class(
                    "scheduler",
                    config.get("_class_name") if is_own else chosen,
                    str(self.folder / SCHEDULER) if is_own else "",
                )
            except ArtifactError as error:
                raise RunnerError(str(error)) from None
            return scheduler_class.from_config(config)

    def size(self, asked: Mapping[str, float | None]) -> tuple[int, ...]:
        """The size of the programs that make what is asked for.

        Args:
            asked: Height, width and seconds, by name; None where nothing is asked for.

        Raises:
            RunnerError: There are no such programs, or the pipeline makes nothing of that measure.
        """
        given = {name: value for name, value in asked.items() if value is not None}
        unknown = [name for name in given if name not in self.medium.measures]
        if unknown:
            raise RunnerError(f"this {self.manifest['pipeline']} takes no {unknown[0]}")
        return self.medium.size(given)

    def check_conditions(self, conditions: Mapping[str, Any]) -> None:
        """Refuse a request without what the pipeline draws from, or with what it does not take.

        Args:
            conditions: Prompt, image and mask; None where there is none.

        Raises:
            RunnerError: Says what is missing, or too much.
        """
        given = {name for name, value in conditions.items() if value is not None}
        needs, pipeline = self.loop.needs, self.manifest["pipeline"]
        if "prompt" in needs and "prompt" not in given:
            raise RunnerError(f"this {pipeline} needs a prompt")
        pictures = [name for name in needs if name != "prompt"]
        if not given.issuperset(pictures):
            raise RunnerError(f"this {pipeline} needs {' and '.join(pictures)}")
        if given - set(needs):
            unwanted = " and ".join(name for name in conditions if name in given - set(needs))
            raise RunnerError(f"this {pipeline} takes no {unwanted}")

    def _numbers(self, given: Mapping[str, float]) -> dict[str, float]:
        """The loop's own numbers, those that are not given by their defaults."""
        unknown = [name for name in given if name not in self.loop.numbers]
        if unknown:
            known = ", ".join(self.loop.numbers) or "no numbers of its own"
            raise RunnerError(
                f"this {self.manifest['pipeline']} takes no {unknown[0]}; it takes {known}"
            )
        for name, value in given.items():
            _check_number(name, value, self.loop.numbers[name])
        return {**self.manifest["defaults"]["numbers"], **given}

    def _tokenizer(self, name: str) -> Any:
        if name not in self._tokenizers:
            loader = importlib.import_module("transformers").AutoTokenizer
            folder = self.programs.checked_folder(name)
            self._tokenizers[name] = loader.from_pretrained(folder, local_files_only=True)
        return self._tokenizers[name]


def _check_number(name: str, value: float, number: Number) -> None:
    _check_type(name, value, Real, "a number")
    if not number.least <= value <= number.most:
        raise RunnerError(
            f"{name} is {value}; give at least {number.least:g} and at most {number.most:g}"
        )


def _check_type(name: str, value: object, kind: Any, noun: str) -> None:
    if not isinstance(value, kind):
        raise RunnerError(f"{name} is {value!r}; give {noun}")


def _check_numbers(request: Request) -> None:
    steps, guidance, seed = request.steps, request.guidance, request.seed
    _check_type("guidance", guidance, Real, "a number")
    for name, value in (("steps", steps), ("seed", seed)):
        _check_type(name, value, Integral, "a whole number")
    if not 1 <= steps <= LARGEST:
        raise RunnerError(f"steps is {steps}; give at least 1 and at most {LARGEST}")
    if not math.isfinite(guidance):
        raise RunnerError(f"guidance is {guidance}; give a finite number")
    if not -(2**63) <= seed < 2**64:
        raise RunnerError(f"seed is {seed}; give at least -2**63 and less than 2**64")


def _parser(makes: type[Medium], numbers: Mapping[str, Number]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make an image or a sound with the programs beside this file",
        parents=[_folder_parser()],
    )
    parser.add_argument("prompt", nargs="?", help="what to draw, or what is to be heard")
    parser.add_argument("--negative", help="what not to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float, help="up to 1 (Z-Image: 0): off")
    for name, kind in makes.measures.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--image", type=Path, help="picture to start from or to paint into")
    parser.add_argument("--mask", type=Path, help="white where to paint")
    for name, number in numbers.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=argparse.SUPPRESS, help=number.text)
    parser.add_argument("--scheduler", help="class of diffusers in place of the folder's own")
    parser.add_argument("-o", "--output", type=Path, default=Path(makes.file))
    return parser


def _folder_parser() -> argparse.ArgumentParser:
    """What says which numbers there are: every kind of pipeline has its own."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw or make a sound from the command line; an error is one line on stderr and exit status 2.

    Args:
        arguments: Words after the program's name; default: those that it was called with.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    folder = _folder_parser().parse_known_args(arguments)[0].folder
    try:
        runner = PipelineRunner(folder)
    except ArtifactError as error:
        _parser(Pictures, {}).parse_known_args(arguments)  # help is for everyone
        logger.error("error: %s", error)
        return 2
    options = vars(_parser(runner.loop.makes, runner.loop.numbers).parse_args(arguments))
    output = options.pop("output")
    del options["folder"]
    try:
        runner.medium.check_output(output)
        size = runner.size({name: options[name] for name in runner.medium.measures})
        runner.check_conditions({name: options[name] for name in ("prompt", "image", "mask")})
        for name, mode in (("image", "RGB"), ("mask", "L")):
            if options[name] is not None:
                options[name] = read_picture(options[name], mode, size)
        made = runner(
            options.pop("prompt"),
            **options,
            callback=lambda step, count: logger.info("step %d of %d", step, count),
        )
        runner.medium.write(made, output)
    except ArtifactError as error:
        logger.error("error: %s", error)
        return 2
    except (OSError, RuntimeError) as error:
        logger.error("error: %s", first_line(error))
        return 2
    logger.info("written to %s", output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
