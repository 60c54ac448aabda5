"""What a pipeline draws in float and with an exported folder's programs, from the same noise.

A sound is shown by its spectrogram, and written to a file of its own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqdm_fx.numerics.metrics import ratio_db, sqnr_db
from mpqdm_fx.pipelines.layout import Layout, Size
from mpqdm_fx.pipelines.loops.loop import Loop, Parts, Request
from mpqdm_fx.pipelines.part_inputs import PipelineInputs
from mpqdm_fx.pipelines.program_files import ProgramFiles
from mpqdm_fx.pipelines.recorded import ModuleParts
from mpqdm_fx.pipelines.runner import PipelineRunner
from mpqdm_fx.pipelines.sound_files import Sounds
from mpqdm_fx.pipelines.spectrograms import FLOOR_DB, spectrogram
from mpqdm_fx.report.images import save_rows
from mpqdm_fx.report.noise_levels import row_powers
from mpqdm_fx.report.record import PictureNumbers
from mpqdm_fx.report.reference_run import EVALUATION_SEED, shows_pictures
from mpqdm_fx.report.sample_metrics import measures_pictures, psnr, ssim

__all__ = ["FLOAT", "GRID", "PROGRAMS", "SOUNDS", "DrawnPictures", "draw_pictures", "write_samples"]

logger = logging.getLogger(__name__)

#: Folder of sounds in an exported one.
SOUNDS = "samples"
_NOTE = (
    f"Spectrograms: time to the right, low frequencies at the bottom, black is {FLOOR_DB:g} dB "
    f"below full scale. The sounds are WAV files in the folder {SOUNDS}."
)
GRID = "samples.png"
#: Names of the two rows.
FLOAT, PROGRAMS = "float", "programs"


@dataclass(frozen=True, kw_only=True)
class DrawnPictures:
    """Pictures or sounds of the same prompts from the same noise, which calibration has not seen.

    Attributes:
        samples: What the scheduler ended with, float [N, C, h, w], by row; the float pipeline's
            first, where it was at hand.
        images: The same as pictures [N, 1 or 3, H, W] in -1..1; of sounds their spectrograms.
        files: The same as the medium writes them, each with the name of its row and its number;
            empty for pictures, which stand in one file.
        note: What pictures are, where they are not what was drawn.
        prompts: What each was to show; empty without prompts.
        steps: Steps of the scheduler.
        backend_sqnr_db: The denoiser's program against its float model, in dB, on the calls of the
            float pipeline's runs; None without the float pipeline.
    """

    samples: Mapping[str, Tensor]
    images: Mapping[str, Tensor]
    files: Mapping[str, NDArray[Any]]
    note: str
    prompts: tuple[str, ...]
    steps: int
    backend_sqnr_db: float | None

    def numbers(self) -> PictureNumbers:
        """How far the programs' samples and pictures are from the float pipeline's."""
        pairs = [tuple(tensors.values()) for tensors in (self.samples, self.images)]
        known = len(self.samples) == 2
        shape = tuple(next(iter(self.images.values())).shape[1:])
        likened = known and not self.files and measures_pictures() and shows_pictures(shape)
        return PictureNumbers(
            count=len(next(iter(self.samples.values()))),
            steps=self.steps,
            seed=EVALUATION_SEED,
            labels=self.prompts,
            x0_sqnr_db=sqnr_db(*pairs[0]) if known else None,
            by_picture=tuple(sqnr_db(*pair) for pair in zip(*pairs[0], strict=True))
            if known
            else (),
            psnr_db=psnr(*pairs[1]) if likened else None,
            ssim=ssim(*pairs[1]) if likened else None,
        )


def draw_pictures(
    folder: Path, count: int, *, prompts: Sequence[str], inputs: PipelineInputs | None
) -> DrawnPictures:
    """Draw with a folder's programs, and with the pipeline in float.

    Args:
        folder: An exported folder whose manifest is written; it says size, steps and guidance.
        count: Pictures.
        prompts: They take turns; ignored by an unconditional pipeline.
        inputs: The pipeline that it was exported from; None if it is not at hand.

    Raises:
        ArtifactError: A program cannot draw; says why.
    """
    runner = _KeepingRunner(folder)
    rows: dict[str, Parts] = {PROGRAMS: runner.programs}
    compared: _ComparedParts | None = None
    if inputs is not None:
        compared = _ComparedParts(inputs.layout, runner.programs)
        rows = {FLOAT: compared, PROGRAMS: runner.programs}
    conditional = "prompt" in runner.loop.needs
    shown = tuple(prompts[index % len(prompts)] for index in range(count)) if conditional else ()
    heard = isinstance(runner.medium, Sounds)
    files: dict[str, NDArray[Any]] = {}
    images: dict[str, list[Tensor]] = {name: [] for name in rows}
    samples: dict[str, list[Tensor]] = {name: [] for name in rows}
    for name, parts in rows.items():
        for index in range(count):
            logger.info("drawing %s %d of %d, %s", runner.medium.noun, index + 1, count, name)
            picture_inputs = {} if inputs is None else inputs.picture(index)
            prompt = shown[index] if conditional else None
            request = runner.request(prompt, seed=EVALUATION_SEED + index, **picture_inputs)
            made = runner.draw(request, parts)
            if heard:
                files[f"{name}-{index + 1}.wav"] = runner.medium.codes(made)
                images[name].append(spectrogram(torch.from_numpy(made).T))
            else:
                images[name].append(torch.from_numpy(made).permute(2, 0, 1) * 2 - 1)
            samples[name].append(runner.sampled)
    return DrawnPictures(
        samples={name: torch.cat(drawn) for name, drawn in samples.items()},
        images={name: torch.stack(drawn) for name, drawn in images.items()},
        files=files,
        note=_NOTE if heard else "",
        prompts=shown,
        steps=runner.manifest["defaults"]["steps"],
        backend_sqnr_db=None if compared is None else ratio_db(*compared.powers.tolist()),
    )


def write_samples(folder: Path, drawn: DrawnPictures) -> None:
    """Write `samples.png` into an exported folder, and a WAV file of each sound.

    Args:
        folder: The folder, whose manifest is written.
        drawn: What its programs drew, and the float pipeline.
    """
    save_rows(list(drawn.images.items()), folder / GRID)
    if drawn.files:
        (folder / SOUNDS).mkdir()
    medium = PipelineRunner(folder).medium
    for name, codes in drawn.files.items():
        medium.write(codes, folder / SOUNDS / name)


class _KeepingRunner(PipelineRunner):
    """A runner that keeps what the scheduler ended with last.

    Attributes:
        sampled: Float [1, C, h, w].
    """

    sampled: Tensor

    def _decoded(self, loop: Loop, latents: Tensor, request: Request) -> NDArray[np.float32]:
        self.sampled = latents
        return super()._decoded(loop, latents, request)


class _ComparedParts(ModuleParts):
    """The pipeline in float, whose denoiser's calls the program answers too.

    Attributes:
        powers: Energy of the float denoiser's outputs and of the program's difference, float64 [2].
    """

    def __init__(self, layout: Layout, programs: ProgramFiles) -> None:
        super().__init__(layout, programs.manifest["timesteps"])
        self._beside = programs
        self.powers = torch.zeros(2, dtype=torch.float64)

    def run(self, part: str, size: Size | None, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a part as torch does; see `Parts.run`."""
        outputs = super().run(part, size, inputs)
        if part == "denoiser":
            call: dict[str, Any] = dict(inputs)
            if self._beside.has(part):
                call |= self._beside.run(part, None, inputs)
            actual = self._beside.run(part, size, call)
            for name, value in outputs.items():
                self.powers += row_powers(value, actual[name], 1).sum(dim=0)
        return outputs
