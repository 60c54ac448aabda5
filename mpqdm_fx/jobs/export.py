"""From a pipeline to a folder of programs, and what these must measure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpqdm_fx.backends.names import Cpu, FourBit, Kernels, ProgramBackend, SideBits
from mpqdm_fx.io.peak_memory import tells_peaks
from mpqdm_fx.jobs.command_text import export_command
from mpqdm_fx.pipelines.adapters import Lora
from mpqdm_fx.pipelines.export import MINIMUM_SQNR_DB, ExportResult, export_pipeline
from mpqdm_fx.pipelines.layout import Size, size_text
from mpqdm_fx.pipelines.prompts import read_prompts
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.report.export_metrics import expected_export, export_metrics
from mpqdm_fx.report.gates import Gate, Verdict, check_measured, judge
from mpqdm_fx.report.sample_metrics import measures_pictures

__all__ = ["ExportRuns", "check_export_gates", "export_to_folder", "judge_export"]


@dataclass(frozen=True, kw_only=True)
class ExportRuns:
    """What a pipeline is calibrated on and drawn with.

    Attributes:
        sizes: As of `export_pipeline`, like all others.
        prompts: File of prompts; None for the built-in ones.
        steps: See above.
        guidance: See above.
        trajectories: See above.
        samples: See above.
        lora: See above.
    """

    sizes: Sequence[Size] | None = None
    prompts: Path | None = None
    steps: int = 20
    guidance: float | None = None
    trajectories: int = 16
    samples: int = 4
    lora: Lora | None = None

    @property
    def texts(self) -> Sequence[str] | None:
        """The prompts themselves; None for the built-in ones."""
        return None if self.prompts is None else read_prompts(self.prompts)


def export_to_folder(
    pipeline: str,
    config: MPQConfig | None,
    output: Path,
    runs: ExportRuns,
    *,
    minimum_sqnr_db: float = MINIMUM_SQNR_DB,
    run: RunOptions = RunOptions(),
    tabulate: bool = False,
    backend: ProgramBackend = "xnnpack",
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
    four_bit: FourBit = "whole",
    external_weights: bool = False,
    compress: bool = False,
    encoder_bits: SideBits = 8,
    overwrite: bool = False,
) -> ExportResult:
    """Export a pipeline's folder; its report says how to do it again.

    Args: as of `export_pipeline`.

    Raises:
        MPQError: As of `export_pipeline`.
    """
    command = export_command(
        pipeline,
        config,
        {
            "--size": [size_text(size) for size in runs.sizes or ()],
            "--prompts": runs.prompts,
            "--guidance": runs.guidance,
            "--steps": runs.steps,
            "--trajectories": None if config is None else runs.trajectories,
            "--fuse-lora": None if runs.lora is None else runs.lora.file,
            "--lora-scale": None if runs.lora is None else runs.lora.scale,
            "--start-from": run.start_from,
            "--tabulate": tabulate,
            "--minimum-sqnr": None if minimum_sqnr_db == MINIMUM_SQNR_DB else minimum_sqnr_db,
            "--encoder-bits": None if encoder_bits == 8 else encoder_bits,
            "--backend": None if backend == "xnnpack" else backend,
            "--kernels": kernels if backend == "lowbit" else None,
            "--cpu": None if cpu == "avx2" else cpu,
            "--four-bit": None if four_bit == "whole" else four_bit,
            "--external-weights": external_weights,
            "--compress": compress,
            "--samples": runs.samples,
            "--output": output,
        },
    )
    return export_pipeline(
        pipeline,
        config,
        output,
        sizes=runs.sizes,
        prompts=runs.texts,
        steps=runs.steps,
        guidance=runs.guidance,
        trajectories=runs.trajectories,
        samples=runs.samples,
        lora=runs.lora,
        minimum_sqnr_db=minimum_sqnr_db,
        run=run,
        tabulate=tabulate,
        backend=backend,
        kernels=kernels,
        cpu=cpu,
        four_bit=four_bit,
        external_weights=external_weights,
        compress=compress,
        encoder_bits=encoder_bits,
        overwrite=overwrite,
        command=command,
    )


def check_export_gates(
    gates: Sequence[Gate], config: MPQConfig | None, runs: ExportRuns
) -> tuple[str, ...]:
    """Refuse gates on what an export will not measure; the names of what it will.

    Args:
        gates: The gates.
        config: Settings of the denoiser; None exports everything in float.
        runs: What will be drawn.

    Raises:
        ConfigError: A metric will not be there.
    """
    names = expected_export(
        quantized=config is not None,
        drawn=runs.samples > 0,
        likened=measures_pictures(),
        peaks=tells_peaks(),
    )
    form = "" if config is not None else " in float"
    pictures = "" if runs.samples else " without pictures (--samples 0)"
    check_measured(gates, names, f"an export{form}{pictures}")
    return names


def judge_export(
    gates: Sequence[Gate], result: ExportResult, expected: Sequence[str]
) -> tuple[Verdict, ...]:
    """Judge what an export made; what could not be measured after all fails.

    Args:
        gates: The gates, which `check_export_gates` took.
        result: What was made.
        expected: What that function returned.
    """
    nothing = dict.fromkeys(expected, math.nan)
    return judge(gates, {**nothing, **export_metrics(result.summary)})
