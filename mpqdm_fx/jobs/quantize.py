"""From a float model to a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.names import Backend, Cpu, Kernels
from mpqdm_fx.backends.xnnpack.four_bit import FourBit
from mpqdm_fx.io.exchange import remove_folder
from mpqdm_fx.io.files import checkpoint_of
from mpqdm_fx.io.folders import check_target
from mpqdm_fx.io.processes import is_first
from mpqdm_fx.io.progress import expect
from mpqdm_fx.io.unfinished import UnfinishedRun
from mpqdm_fx.io.versions import versions
from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.jobs.command_text import quantize_command
from mpqdm_fx.jobs.estimate import finish_of
from mpqdm_fx.jobs.foretold import finish_stages, quantize_stages
from mpqdm_fx.jobs.result_folder import (
    FolderResult,
    ProgramForm,
    write_folder,
)
from mpqdm_fx.pipelines.prompts import DEFAULT_PROMPTS
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.records.validation import Count, NonNegative, Some, checked
from mpqdm_fx.sources.source import Source
from mpqdm_fx.sweep.checkpoint import HEADER

__all__ = ["check_start", "command_of", "quantize_to_folder"]


@checked
def quantize_to_folder(
    source: Source,
    config: MPQConfig,
    *,
    backend: Backend,
    output: Path,
    trajectories: Count = 16,
    steps: Count = 20,
    samples: Some = 16,
    subfolder: str | None = None,
    run: RunOptions = RunOptions(),
    four_bit: FourBit = "whole",
    external_weights: bool = False,
    compress: bool = False,
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
    overwrite: bool = False,
    then: Mapping[str, NonNegative] | None = None,
) -> FolderResult | None:
    """Quantize a source and write everything that belongs to it into one folder.

    Args:
        source: Model and scheduler, or model and calls (`Source.with_calls`).
        config: Settings.
        backend: `"xnnpack"` and `"lowbit"` also write `unet.pte`; `"torch_ao"` also checks that
            conversion succeeds and times it; packed weights are always written.
        output: Folder; it appears whole or not at all.
        trajectories: Denoising runs to calibrate on, where the source has no calls.
        steps: Steps of each.
        samples: Images in the grid, drawn by what the backend runs.
        subfolder: Part of a pipeline folder that the source came from.
        run: How it runs; see `RunOptions`. Its folder lies beside `output`, with that name and
            `.checkpoint`, until the run is through.
        four_bit: Which weights the program stores at four bits, as of `lower`.
        external_weights: Write the program's weights to a file of their own, `unet.ptd`.
        compress: Store the program's files as `.xz`, which are expanded when they are first run.
        kernels: Which layers own kernels run, of `"lowbit"`; as of `lower`, like `cpu`.
        cpu: Class of CPUs that the choice is made for.
        overwrite: Whether `output` may be a result that is replaced.
        then: Seconds by stage of what the caller does behind it, for progress.

    Returns:
        What was made; None in the other processes of a run with several, which write nothing.

    Raises:
        MPQError: One of the steps cannot be done; no half of a result is left behind.
    """
    form = ProgramForm(
        backend=backend,
        four_bit=four_bit,
        external_weights=external_weights,
        compress=compress,
        kernels=kernels,
        cpu=cpu,
    )
    solved = checkpoint_of(output)
    run = run.inside(solved)
    check_start(form, config, output, resume=run.resume, overwrite=overwrite)
    expect(lambda: {**quantize_stages(source, config, backend, samples), **(then or {})})
    data = calibration_of(source, trajectories=trajectories, steps=steps, seed=config.seed)
    quantized = quantize(source.model, config, data, run=run)
    if not is_first():
        return None
    expect(lambda: finish_stages(finish_of(quantized, source, form, samples=samples, steps=steps)))
    summary = write_folder(
        quantized, source, output, form=form, steps=steps, samples=samples, subfolder=subfolder,
        overwrite=overwrite, sensitivity=run.sensitivity, command=command_of(
            source, config, form, output,
            trajectories=trajectories, steps=steps, samples=samples, subfolder=subfolder,
        ),
    )  # fmt: skip
    remove_folder(solved)
    return FolderResult(directory=output, quantized=quantized, summary=summary, source=source)


def command_of(
    source: Source,
    config: MPQConfig,
    form: ProgramForm,
    output: Path,
    *,
    trajectories: int,
    steps: int,
    samples: int,
    subfolder: str | None,
) -> str | None:
    """The command line that does the same; None if calls or prompts are of nobody knows where."""
    calls, beside = source.calls, source.components
    if calls is not None and calls.name is None:
        return None
    if beside is not None and beside.prompts not in ((), DEFAULT_PROMPTS):
        return None  # of a file of the user's
    calibration: dict[str, Any] = {"--trajectories": trajectories, "--steps": steps}
    if calls is not None:
        calibration = {"--inputs": calls.name, "--held-out": len(calls.held_out_calls)}
    return quantize_command(
        source.name,
        config,
        {
            "--subfolder": subfolder,
            "--variant": source.variant,
            "--backend": form.backend,
            **calibration,
            "--guidance": beside.scale if beside is not None and beside.prompts else None,
            "--samples": samples,
            "--four-bit": form.four_bit if form.has_program else None,
            "--kernels": form.kernels if form.backend == "lowbit" else None,
            "--cpu": None if form.cpu == "avx2" else form.cpu,
            "--external-weights": form.external_weights,
            "--compress": form.compress,
            "--output": output,
        },
    )


def check_start(
    form: ProgramForm, config: MPQConfig, output: Path, *, resume: bool, overwrite: bool = False
) -> None:
    """Refuse what `quantize_to_folder` could not end with, before the model is loaded.

    Args:
        form: What is to be written.
        config: Settings.
        output: Folder to appear.
        resume: Go on with a run that was stopped.
        overwrite: Whether `output` may be a result that is replaced.

    Raises:
        ConfigError: Settings do not fit the backend, or an unfinished run lies beside `output` that
            has other settings, or is not to be resumed.
        ArtifactError: `output` holds something else.
        LoweringError: ExecuTorch is missing, or the library of own kernels is.
    """
    form.check(config)
    check_target(output, overwrite=overwrite)
    identity = {"settings": config.to_dict(), "versions": versions()}
    UnfinishedRun.check(checkpoint_of(output), HEADER, identity, resume=resume, solved="layer-*")
