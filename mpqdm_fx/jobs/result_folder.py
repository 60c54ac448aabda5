"""The folder that a job gives: weights, program, scheduler, sample grid, thresholds, numbers."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from mpqdm_fx.api import BACKENDS, MODES, Backend, lower
from mpqdm_fx.backends.xnnpack.compressed import compress_program, drop_expansions
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, check_four_bit
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.denoisers import (
    PROGRAM,
    SOURCE,
    Denoiser,
    Origin,
    draw,
    first_rows,
    pictures,
    program_denoiser,
    program_names,
    zoom_of,
)
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.files import write_text
from mpqdm_fx.folders import MANIFEST, open_folder, seal_folder, staged_directory
from mpqdm_fx.io.sealed import Entry
from mpqdm_fx.jobs.calibration import held_out_of
from mpqdm_fx.memory import peak_memory
from mpqdm_fx.models.sources import Source
from mpqdm_fx.parity.verify import store_parity
from mpqdm_fx.plan import Fate
from mpqdm_fx.quantized import QuantizedModel
from mpqdm_fx.report.images import save_grid
from mpqdm_fx.report.metrics import EVALUATION_SEED, epsilon_sqnr
from mpqdm_fx.report.timing import time_per_step
from mpqdm_fx.storage import write_model
from mpqdm_fx.summary import SUMMARY, write_summary
from mpqdm_fx.validation import check_fields

__all__ = ["FolderResult", "Form", "write_folder"]

logger = logging.getLogger(__name__)

GRID = "samples.png"


@dataclass(frozen=True, kw_only=True)
class FolderResult:
    """What a job made.

    Attributes:
        directory: The folder.
        quantized: The quantized model.
        summary: Numbers for the printed table, plain JSON types.
    """

    directory: Path
    quantized: QuantizedModel
    summary: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a folder holds beside the packed weights, which are always there.

    Attributes:
        backend: `"xnnpack"` has a program, `unet.pte`; `"torch_ao"` is converted and timed.
        four_bit: Which weights the program stores at four bits, as of `lower`.
        external_weights: The program's weights have a file of their own, `unet.ptd`.
        compress: The program's files are `.xz`, which are expanded when they are first run.
    """

    backend: Backend
    four_bit: FourBit = "whole"
    external_weights: bool = False
    compress: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, config: MPQConfig) -> None:
        """Refuse settings that the backend does not run, and one that is not installed.

        Raises:
            ConfigError: Settings do not fit the backend.
            LoweringError: ExecuTorch is missing.
        """
        _check_mode(config, self.backend)
        if self.backend == "xnnpack":
            if config.narrowest_activation_bits != 8:
                raise ConfigError(
                    f"XNNPACK runs activations of 8 bits, not {config.narrowest_activation_bits}; "
                    f'choose activation_bits=8 or backend="packed"'
                )
            check_four_bit(self.four_bit, config.activation_mode)
            require_executorch()
        elif self.external_weights or self.compress or self.four_bit != "whole":
            raise ConfigError(
                f"{self.backend} writes no program whose weights could be apart, compressed or at "
                f'four bits; choose backend="xnnpack" or leave external_weights, compress and '
                f"four_bit out"
            )

    @classmethod
    def of(cls, backend: Any, program: Mapping[str, Any] | None) -> "Form":
        """The form of a folder, from its summary's backend and its manifest's `program`.

        Raises:
            ArtifactError: There is no such backend.
        """
        if backend not in BACKENDS:
            raise ArtifactError(f"{SUMMARY} is damaged: there is no backend {backend!r}")
        made = {key: value for key, value in (program or {}).items() if key != "expanded"}
        return cls(backend=backend, **made)

    def to_dict(self) -> dict[str, Any]:
        """What a program was made with, plain JSON types."""
        return {
            "four_bit": self.four_bit,
            "external_weights": self.external_weights,
            "compress": self.compress,
        }


def _check_mode(config: MPQConfig, backend: Backend) -> None:
    if config.activation_mode not in MODES[backend]:
        modes = " or ".join(f'"{mode}"' for mode in MODES[backend])
        doors = " or ".join(f'"{b}"' for b in BACKENDS if config.activation_mode in MODES[b])
        raise ConfigError(
            f"{backend} does not run activation_mode={config.activation_mode!r}; choose "
            f"activation_mode={modes} or backend={doors}"
        )


def write_folder(
    quantized: QuantizedModel,
    source: Source,
    output: Path,
    *,
    form: Form,
    steps: int,
    samples: int,
    subfolder: str | None = None,
    overwrite: bool = False,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Lower, draw, measure, and write it all.

    Args:
        quantized: The model.
        source: The float model and its scheduler.
        output: Folder; it appears whole or not at all.
        form: What it holds beside the packed weights.
        steps: Steps of the sampling runs.
        samples: Images in the grid, drawn by what the backend runs.
        subfolder: Part of a pipeline folder that the source came from.
        overwrite: Whether `output` may be a result that is replaced.
        more: Further numbers for the summary, plain JSON types.

    Returns:
        Numbers for the printed table, plain JSON types.
    """
    backend = form.backend
    with staged_directory(output, overwrite=overwrite) as stage:
        if source.scheduler is not None:
            source.scheduler.save_pretrained(stage / "scheduler")
        write_text(stage / SOURCE, Origin.of(source, subfolder).model_dump_json())
        runner: Denoiser = quantized
        program: dict[str, Any] | None = None
        graphs: list[Any] = []
        made: dict[str, Any] | None = None
        if backend == "xnnpack":
            program, expanded = _write_program(quantized, stage, form, graphs.append)
            made = {**form.to_dict(), "expanded": expanded}
        write_model(quantized, stage, program=made)
        if backend == "xnnpack":
            runner = program_denoiser(open_folder(stage))
        elif backend == "torch_ao":
            runner = _positional(lower(quantized, "torch_ao"), quantized)
        store_parity(quantized, source, stage, graphs[0] if graphs else None)
        graphs.clear()
        summary = {**_summarise(source, quantized, runner, backend), **(more or {})}
        summary["program"] = program
        if source.scheduler is None:
            logger.info("no images are drawn and no peak is measured: the model has no scheduler")
        elif samples:
            images = pictures(draw(source, runner, num=samples, steps=steps, seed=0), source)
            columns = max(1, round(samples**0.5))
            save_grid(images, stage / GRID, columns=columns, zoom=zoom_of(images))
        peak = "pte" if backend == "xnnpack" else "packed"
        known = source.scheduler is not None  # else another process cannot make a call
        summary["peak_memory_bytes"] = {
            peak: peak_memory(peak, str(stage)) if known else None,
            "float": peak_memory("float", source.name, subfolder, source.variant)
            if known
            else None,
        }
        for name in program_names(open_folder(stage)):
            drop_expansions(stage / name)
        summary["files"] = {
            path.name: path.stat().st_size
            for path in sorted(stage.iterdir())
            if path.is_file() and path.name != MANIFEST  # which lists this file, with its size
        }
        write_summary(stage, summary)
        seal_folder(stage)
    return summary


def _write_program(
    quantized: QuantizedModel, stage: Path, form: Form, observe: Callable[[Any], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the program; what it is, and what each compressed file expands to."""
    lowered = lower(
        quantized,
        "xnnpack",
        output=stage / PROGRAM,
        observe=observe,
        external_weights=form.external_weights,
        four_bit=form.four_bit,
    )
    expanded = {}
    for file in (lowered.path, lowered.weights_path) if form.compress else ():
        if file is not None:
            content = Entry.of(file).to_dict()
            expanded[compress_program(file, keep=False).name] = content
    return lowered.to_dict(), expanded


def _summarise(
    source: Source, quantized: QuantizedModel, runner: Denoiser, backend: str
) -> dict[str, Any]:
    held_out = held_out_of(source, steps=20, seed=EVALUATION_SEED)
    plan = quantized.plan
    single = first_rows(next(iter(held_out)))
    timing = time_per_step({"float": source.model, backend: runner}, single)
    return {
        "backend": backend,
        "settings": quantized.settings.to_dict(),
        "mean_bits": plan.mean_bits,
        "effective_bits": plan.effective_bits,
        "num_weights": plan.num_weights,
        "weight_bytes": plan.weight_bytes,
        "float_remainder_bytes": plan.float_bytes,
        "float32_bytes": 4 * plan.num_parameters,
        "parameters": {fate: plan.count(fate) for fate in get_args(Fate)},
        "remarks": [*plan.remarks, *source.remarks],
        "epsilon_sqnr_db": epsilon_sqnr(source.model, quantized, held_out),
        "backend_epsilon_sqnr_db": epsilon_sqnr(source.model, runner, held_out),
        "milliseconds_per_step": timing,
        "threads": torch.get_num_threads(),
        "seconds_to_quantize": quantized.report.seconds,
    }


def _positional(graph_module: Callable[..., Any], quantized: QuantizedModel) -> Denoiser:
    """A lowered graph behind the model's keyword arguments."""

    def call(**kwargs: Any) -> Any:
        return graph_module(**quantized.signature.normalize((), kwargs))

    return call
