"""The folder that a job gives: weights, program, scheduler, sample grid, thresholds, numbers."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from mpqdm_fx.backends.check_settings import check_kernel_options, check_settings
from mpqdm_fx.backends.compressed import compress_program, drop_expansions
from mpqdm_fx.backends.kernel_library import require_kernels
from mpqdm_fx.backends.lower import lower_to_lowbit, lower_to_torch_ao, lower_to_xnnpack
from mpqdm_fx.backends.names import (
    BACKENDS,
    PROGRAMS,
    Backend,
    Cpu,
    Kernels,
    may_call_own_kernels,
)
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, check_four_bit
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.graph.calling import example_call
from mpqdm_fx.graph.nested import first_row
from mpqdm_fx.io import progress
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.folders import MANIFEST, seal_folder, staged_directory
from mpqdm_fx.io.sealed import Entry
from mpqdm_fx.jobs.calibration import held_out_of
from mpqdm_fx.jobs.memory import peak_memory
from mpqdm_fx.jobs.pictures import Drawn, draw_pictures
from mpqdm_fx.jobs.presets import write_recipe
from mpqdm_fx.jobs.report import write_report
from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.model.manifest import Program
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.stages import in_form_of
from mpqdm_fx.model.storage import write_model
from mpqdm_fx.model.summary import SUMMARY, write_summary
from mpqdm_fx.parity.verify import store_parity
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import Fate
from mpqdm_fx.records.validation import check_fields
from mpqdm_fx.report.against_float import measured_of
from mpqdm_fx.report.comparison import Comparison, compare_all
from mpqdm_fx.report.images import save_rows
from mpqdm_fx.report.page.packages import can_render
from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.report.timing import time_per_step
from mpqdm_fx.sources.denoisers import (
    PROGRAM,
    SOURCE,
    Denoiser,
    Origin,
    program_denoiser,
    program_names,
)
from mpqdm_fx.sources.source import Source

__all__ = ["FolderResult", "ProgramForm", "write_folder"]

logger = logging.getLogger(__name__)

GRID = "samples.png"


@dataclass(frozen=True, kw_only=True)
class FolderResult:
    """What a job made.

    Attributes:
        directory: The folder.
        quantized: The quantized model.
        summary: Numbers for the printed table, plain JSON types.
        source: The float model, conditioned as the job's own runs were.
    """

    directory: Path
    quantized: QuantizedModel
    summary: dict[str, Any]
    source: Source


@dataclass(frozen=True, kw_only=True)
class ProgramForm:
    """What a folder holds beside the packed weights, which are always there.

    Attributes:
        backend: `"xnnpack"` and `"lowbit"` have a program, `unet.pte`; `"torch_ao"` is converted
            and timed.
        four_bit: Which weights the program stores at four bits, as of `lower`.
        external_weights: The program's weights have a file of their own, `unet.ptd`.
        compress: The program's files are `.xz`, which are expanded when they are first run.
        kernels: Which layers own kernels run, of `"lowbit"`; as of `lower`, like `cpu`.
        cpu: Class of CPUs that the choice is made for.
    """

    backend: Backend
    four_bit: FourBit = "whole"
    external_weights: bool = False
    compress: bool = False
    kernels: Kernels = "auto"
    cpu: Cpu = "avx2"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def has_program(self) -> bool:
        """Whether there is an ExecuTorch program."""
        return self.backend in PROGRAMS

    def check(self, config: MPQConfig, *, runs: bool = True) -> None:
        """Refuse settings that the backend does not run, and one that is not installed.

        Args:
            config: Settings.
            runs: Whether a program is run here, and not only foretold.

        Raises:
            ConfigError: Settings do not fit the backend.
            LoweringError: ExecuTorch is missing, or the library of own kernels is.
        """
        check_settings(self.backend, config)
        check_kernel_options(self.backend, self.kernels, self.cpu)
        if self.has_program:
            check_four_bit(self.four_bit, config.activation_mode)
            require_executorch()
            if runs and may_call_own_kernels(self.backend, self.kernels):
                require_kernels()  # what is written is compared, timed, drawn with
        elif self.external_weights or self.compress or self.four_bit != "whole":
            raise ConfigError(
                f"{self.backend} writes no program whose weights could be apart, compressed or at "
                f'four bits; choose backend="xnnpack" or leave external_weights, compress and '
                f"four_bit out"
            )

    @classmethod
    def of(cls, backend: Any, program: Program | None) -> "ProgramForm":
        """The form of a folder, from its summary's backend and its manifest's `program`.

        Raises:
            ArtifactError: There is no such backend.
        """
        if backend not in BACKENDS:
            raise ArtifactError(f"{SUMMARY} is damaged: there is no backend {backend!r}")
        options = {} if program is None else program.model_dump(exclude={"expanded"})
        known = {name: value for name, value in options.items() if value is not None}
        return cls(backend=backend, **known)

    def to_dict(self) -> dict[str, Any]:
        """What a program was made with, plain JSON types."""
        own = {"kernels": self.kernels, "cpu": self.cpu} if self.backend == "lowbit" else {}
        return {
            "four_bit": self.four_bit,
            "external_weights": self.external_weights,
            "compress": self.compress,
            **own,
        }


def write_folder(
    quantized: QuantizedModel,
    source: Source,
    output: Path,
    *,
    form: ProgramForm,
    steps: int,
    samples: int,
    subfolder: str | None = None,
    overwrite: bool = False,
    more: Mapping[str, Any] | None = None,
    command: str | None = None,
    sensitivity: str | Path | None = None,
) -> dict[str, Any]:
    """Lower, draw, measure, report, and write it all.

    Args:
        quantized: The model.
        source: The float model and its scheduler.
        output: Folder; it appears whole or not at all.
        form: What it holds beside the packed weights.
        steps: Steps of the sampling runs.
        samples: Images that the float model and what the backend runs draw from the same noise.
        subfolder: Part of a pipeline folder that the source came from.
        overwrite: Whether `output` may be a result that is replaced.
        more: Further numbers for the summary, plain JSON types.
        command: The command line that makes the folder again.
        sensitivity: File of the sensitivities, for the report.

    Returns:
        Numbers for the printed table, plain JSON types.
    """
    backend = form.backend
    with staged_directory(output, overwrite=overwrite) as stage:
        if source.scheduler is not None:
            source.scheduler.save_pretrained(stage / "scheduler")
        write_text(stage / SOURCE, Origin.of(source, subfolder).model_dump_json())
        write_recipe(stage, quantized.settings)
        runner: Denoiser = quantized
        lowered: XnnpackProgram | None = None
        options: dict[str, Any] | None = None
        if form.has_program:
            lowered, expanded = _write_program(quantized, stage, form)
            options = {**form.to_dict(), "expanded": expanded}
        write_model(quantized, stage, program=options)
        if form.has_program:
            runner = program_denoiser(open_folder(stage))
        elif backend == "torch_ao":
            runner = _positional(lower_to_torch_ao(quantized), quantized)
        floats = in_form_of(quantized, source.model, example_call(quantized.signature))
        with progress.stage("comparing forms"):
            store_parity(quantized, source, stage, lowered and lowered.graphs, floats=floats)
        program = lowered and lowered.to_dict()
        del lowered  # and with it the graphs, several times the model
        with progress.stage("measuring"):
            calls = list(held_out_of(source, steps=20, seed=EVALUATION_SEED))
            compared = _compared(source, quantized, runner, calls)
            timing = time_per_step({"float": source.model, backend: runner}, first_row(calls[0]))
        summary = {**_summarise(source, quantized, backend, compared, timing), **(more or {})}
        summary |= {"program": program, "command": command}
        drawn = _draw(source, runner, stage, steps=steps, samples=samples)
        peak = "pte" if form.has_program else "packed"
        has_scheduler = source.scheduler is not None  # else another process cannot make a call
        with progress.stage("peak memory"):
            summary["peak_memory_bytes"] = {
                peak: peak_memory(peak, str(stage)) if has_scheduler else None,
                "float": peak_memory("float", source.name, subfolder, source.variant)
                if has_scheduler
                else None,
            }
        for name in program_names(open_folder(stage)):
            drop_expansions(stage / name)
        progress.leave_log(stage)
        summary["files"] = _sizes(stage)
        if can_render():
            with progress.stage("report"):
                write_report(
                    stage,
                    quantized,
                    source,
                    measured=measured_of(
                        quantized, source.name, calls,
                        floats=floats, compared=compared, sensitivity=sensitivity,
                    ),
                    drawn=drawn,
                    summary=summary,
                    why_no_pictures=_why_none(source, samples),
                )  # fmt: skip
            summary["files"] = _sizes(stage)
        write_summary(stage, summary)
        seal_folder(stage)
    return summary


def _write_program(
    quantized: QuantizedModel, stage: Path, form: ProgramForm
) -> tuple[XnnpackProgram, dict[str, Any]]:
    """Write the program; what it is, and what each compressed file expands to."""
    options: dict[str, Any] = {
        "output": stage / PROGRAM,
        "keep_graphs": True,
        "external_weights": form.external_weights,
        "four_bit": form.four_bit,
    }
    lowered = (
        lower_to_lowbit(quantized, kernels=form.kernels, cpu=form.cpu, **options)
        if form.backend == "lowbit"
        else lower_to_xnnpack(quantized, **options)
    )
    expanded = {}
    for file in (lowered.path, lowered.weights_path) if form.compress else ():
        if file is not None:
            content = Entry.of(file).to_dict()
            expanded[compress_program(file, keep=False).name] = content
    return lowered, expanded


def _sizes(stage: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_size
        for path in sorted(stage.iterdir())
        if path.is_file() and path.name != MANIFEST  # which lists the summary, with its size
    }


def _draw(
    source: Source, runner: Denoiser, stage: Path, *, steps: int, samples: int
) -> Drawn | None:
    """Samples of the float model and of what the backend runs, from the same noise."""
    if source.scheduler is None:
        logger.info("no images are drawn and no peak is measured: the model has no scheduler")
        return None
    if not samples:
        return None
    models = {"float": source.model, "quantized": runner}
    drawn = draw_pictures(source, models, num=samples, steps=steps)
    if drawn.images:
        save_rows(list(drawn.images.items()), stage / GRID)
    return drawn


def _why_none(source: Source, samples: int) -> str:
    if source.scheduler is None:
        return "the model has no scheduler to draw with"
    return "" if samples else "no samples were asked for (--samples 0)"


def _compared(
    source: Source,
    quantized: QuantizedModel,
    runner: Denoiser,
    calls: Sequence[Mapping[str, Any]],
) -> dict[str, Comparison]:
    """Outputs on held-out calls against the float model's: of the graph, and of what runs."""
    models: dict[str, Denoiser] = {"quantized": quantized}
    if runner is not quantized:
        models["backend"] = runner
    named = quantized.settings.noise_argument
    return compare_all(source.model, models, calls, noise_argument=named)


def _summarise(
    source: Source,
    quantized: QuantizedModel,
    backend: str,
    compared: Mapping[str, Comparison],
    timing: Mapping[str, float],
) -> dict[str, Any]:
    plan = quantized.plan
    comparison = compared["quantized"]
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
        "epsilon_sqnr_db": comparison.sqnr_db,
        "backend_epsilon_sqnr_db": compared.get("backend", comparison).sqnr_db,
        "milliseconds_per_step": dict(timing),
        "threads": torch.get_num_threads(),
        "seconds_to_quantize": quantized.report.seconds,
    }


def _positional(graph_module: Callable[..., Any], quantized: QuantizedModel) -> Denoiser:
    """A lowered graph behind the model's keyword arguments."""

    def call(**kwargs: Any) -> Any:
        return graph_module(**quantized.signature.normalize((), kwargs))

    return call
