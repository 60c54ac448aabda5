"""From a quantized folder to a trained one."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from mpqdm_fx.distill.checkpoint import has_state, state_path
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.distillation import distill
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.exchange import remove_folder
from mpqdm_fx.io.files import checkpoint_of
from mpqdm_fx.io.folders import check_target
from mpqdm_fx.io.processes import is_first
from mpqdm_fx.io.progress import expect
from mpqdm_fx.io.unfinished import refuse_foreign_folder
from mpqdm_fx.jobs.calibration import check_unseen, warn_of
from mpqdm_fx.jobs.command_text import distill_command
from mpqdm_fx.jobs.copied_folder import copy_folder
from mpqdm_fx.jobs.estimate import TrainingEstimate, estimate_training
from mpqdm_fx.jobs.foretold import distill_stages
from mpqdm_fx.jobs.report_folder import retell_report
from mpqdm_fx.jobs.result_folder import (
    FolderResult,
    ProgramForm,
    write_folder,
)
from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.model.storage import load
from mpqdm_fx.model.summary import read_summary
from mpqdm_fx.pipelines.components import as_recorded
from mpqdm_fx.records.validation import NonNegative, Some, checked
from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.sources.denoisers import origin_of, source_of

__all__ = ["distill_folder"]


@checked
def distill_folder(
    folder: Path,
    config: DistillConfig,
    *,
    output: Path,
    model: str | None = None,
    samples: Some = 16,
    resume: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    foretold: Callable[[TrainingEstimate], None] | None = None,
    then: Mapping[str, NonNegative] | None = None,
) -> FolderResult | None:
    """Train a quantized folder against its float model, and write what comes out like `quantize`.

    Args:
        folder: Folder written by `quantize`; it is not changed.
        config: Settings of the training; `seconds` count all of the job: data, training, lowering
            and measuring. A denoiser of a pipeline is trained on the prompts that it was calibrated
            on, and with their guidance if `guidance_scale` is None; 1 is none.
        output: Folder; it appears whole or not at all, with the forms that `folder` has.
        model: The float model, if it is no longer where it was.
        samples: Images in the grid.
        resume: Go on with a run that was killed. Its state lies beside `output`, in a folder of
            that name and `.checkpoint`, until the run is through.
        device: Where to train.
        overwrite: Whether `output` may be a result that is replaced.
        foretold: Called with what the job will take, before it begins.
        then: Seconds by stage of what the caller does behind it, for progress.

    Returns:
        What was made, a copy of `folder` where training did not help; None in the other processes
        of a run with several, which write nothing.

    Raises:
        MPQError: One of the steps cannot be done; no half of a result is left behind.
    """
    start = time.perf_counter()
    command = distill_command(  # as it was asked for: the training's own share is less time
        folder, config, {"--model": model, "--samples": samples, "--output": output}
    )
    opened = open_folder(folder)
    summary = read_summary(opened)
    form = ProgramForm.of(summary["backend"], opened.manifest.program)
    check_target(output, overwrite=overwrite)
    check_unseen(EVALUATION_SEED, [config.seed])
    state = checkpoint_of(output)
    refuse_foreign_folder(state, state_path(state).name)
    if has_state(state) and not resume:
        raise ConfigError(f"{state} holds a run that was not finished; resume it, or delete it")
    source, quantized = source_of(folder, model), load(folder)
    if source.scheduler is None:
        raise ConfigError(
            f"{source.name} is made by a function, and training goes along denoising runs; train "
            f"it in Python with a loop of your own: mpqdm_fx.distill.distill(..., scheduler=)"
        )
    source = as_recorded(source, folder, model=model, guidance=config.guidance_scale)
    warn_of(source)
    runs = source.runs(config.trajectories, config.seed)
    config = replace(config, guidance_scale=runs.get("guidance_scale"))
    form.check(quantized.settings)
    times = estimate_training(quantized, source, config, form=form, samples=samples)
    if config.seconds is not None:
        left = config.seconds - times.others - (time.perf_counter() - start)
        if left <= 0:
            raise ConfigError(
                f"seconds={config.seconds:g} leaves nothing for training: all else takes about "
                f"{times.others:.0f}; give more, or updates=N alone"
            )
        config = replace(config, seconds=left)
    if foretold is not None and is_first():
        foretold(times)
    stages = distill_stages(source, config, times, samples, form.backend)
    expect(lambda: {**stages, **(then or {})})
    trained = distill(
        quantized,
        source.model,
        config,
        scheduler=source.scheduler,
        sample_shape=source.sample_shape,
        convention=source.convention,
        conditions=runs["conditions"],
        unconditional=runs.get("unconditional"),
        directory=state,
        device=device,
    )
    if not is_first():
        return None
    record = {
        "settings": config.to_dict(),
        "updates": trained.history.updates,
        "seconds": trained.history.seconds,
        "error_before": trained.before,
        "error_after": trained.after,
        "improved": trained.improved,
        "epsilon_sqnr_db_before": summary["epsilon_sqnr_db"],
    }
    if trained.quantized is quantized:  # the very model: lowering it again would give the same
        summary = copy_folder(
            opened, output, origin=model, more={"distilled": record, "command": command},
            overwrite=overwrite, retell=partial(retell_report, opened, quantized, source),
        )  # fmt: skip
        remove_folder(state)
        return FolderResult(directory=output, quantized=quantized, summary=summary, source=source)
    summary = write_folder(
        trained.quantized, source, output, form=form, steps=config.steps, samples=samples,
        subfolder=origin_of(folder).subfolder, more={"distilled": record}, overwrite=overwrite,
        command=command,
    )  # fmt: skip
    remove_folder(state)
    quantized = trained.quantized
    return FolderResult(directory=output, quantized=quantized, summary=summary, source=source)
