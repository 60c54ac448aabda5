"""The report of a folder that exists: what it stores, and what can be measured now."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ConfigError, MPQError
from mpqdm_fx.graph.calling import example_call
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.folders import SCHEDULER_CONFIG, WEIGHTS, is_export
from mpqdm_fx.io.progress import expect, stage
from mpqdm_fx.io.schema import read_listed
from mpqdm_fx.jobs.calibration import held_out_of
from mpqdm_fx.jobs.foretold import report_stages
from mpqdm_fx.jobs.pictures import Drawn, draw_pictures
from mpqdm_fx.jobs.report import (
    gallery_of_drawn,
    picture_numbers,
    record_of,
)
from mpqdm_fx.jobs.report_export import report_export
from mpqdm_fx.model.folder import ModelFolder, open_folder
from mpqdm_fx.model.packed import read_packed
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.stages import in_form_of
from mpqdm_fx.model.storage import load
from mpqdm_fx.model.summary import SUMMARY, read_summary
from mpqdm_fx.pipelines.components import as_recorded, is_in_pipeline
from mpqdm_fx.records.validation import Some, checked
from mpqdm_fx.report.against_float import measured_of
from mpqdm_fx.report.comparison import compare_all
from mpqdm_fx.report.gather import PartMeasurements, part_of, training_of, with_command
from mpqdm_fx.report.page.packages import can_render
from mpqdm_fx.report.page.render import render_report
from mpqdm_fx.report.record import PAGE, RECORD, ReportRecord, write_page, write_record
from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.sources.denoisers import (
    SOURCE,
    Denoiser,
    Origin,
    origin_of,
    program_denoiser,
    program_names,
    saved_source,
    source_of,
)
from mpqdm_fx.sources.functions import calls_of
from mpqdm_fx.sources.source import Source

__all__ = ["FolderReport", "draw_folder", "open_report", "report_folder", "retell_report"]

logger = logging.getLogger(__name__)

_STEPS = 20  # of runs whose number of steps no folder says
_PICTURES = 16


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """A folder's numbers, and what draws its pictures.

    Attributes:
        folder: The folder, all of its files checked.
        record: Its numbers.
        denoiser: What its backend runs; None if nothing can be run here.
        origin: Where its float model is; None if it does not say.
        source: The float model; None if it cannot be loaded.
        saved: Scheduler and shapes as the folder has them; None without a scheduler.
    """

    folder: ModelFolder
    record: ReportRecord
    denoiser: Denoiser | None
    origin: Origin | None
    source: Source | None
    saved: Source | None


@checked
def report_folder(
    directory: Path,
    output: Path,
    *,
    model: str | None = None,
    inputs: str | None = None,
    sensitivity: Path | None = None,
    samples: Some | None = None,
) -> ReportRecord:
    """Write a folder's page, and its numbers beside it.

    Args:
        directory: Folder written by `quantize`, `distill`, `save` or `export_pipeline`; it is not
            changed.
        output: The page, `.html`; the numbers get its name with `.json`.
        model: The float model, if it is no longer where it was.
        inputs: Function that gives calls to measure on, as of `calls_of`.
        sensitivity: File of the sensitivities.
        samples: Pictures to draw; by default as many as the folder's own, or 16.

    Returns:
        The numbers.

    Raises:
        ArtifactError: The folder or one of its files is damaged.
    """
    if is_export(directory):
        if inputs is not None or sensitivity is not None:
            raise ConfigError(
                f"{directory} is an exported pipeline, of which nothing is measured again; leave "
                f"--inputs and --sensitivity out"
            )
        return report_export(directory, output, model=model, samples=samples)
    expect(
        lambda: report_stages(
            measures=_measures(open_folder(directory), inputs, sensitivity),
            samples=samples != 0,
            in_pipeline=is_in_pipeline(directory, model),
        )
    )
    report = open_report(directory, model=model, inputs=inputs, sensitivity=sensitivity)
    stored = report.record.pictures
    if samples is None:
        samples = stored.count if stored is not None else _PICTURES
    drawn, why = draw_folder(report, num=samples)
    pictures = None if drawn is None else picture_numbers(drawn)
    missing = {key: text for key, text in report.record.missing.items() if key != "gallery"}
    if drawn is None:
        missing["gallery"] = why
    record = report.record.model_copy(update={"pictures": pictures, "missing": missing})
    with stage("page"):
        page = render_report(record, gallery_of_drawn(drawn))
        write_page(record, page, output)
    return record


def retell_report(
    folder: ModelFolder,
    quantized: QuantizedModel,
    source: Source,
    stage: Path,
    summary: Mapping[str, Any],
) -> None:
    """Write the report of a copy whose summary says more than that of the folder it is a copy of.

    Args:
        folder: The folder; one without a record has no report to tell again.
        quantized: Its model.
        source: Its float model.
        stage: The copy.
        summary: The copy's summary.
    """
    if RECORD not in folder.files or not can_render():
        return
    stored = read_listed(ReportRecord, folder.files, RECORD)
    report = FolderReport(
        folder=folder,
        record=stored,
        denoiser=_runner(folder, quantized),
        origin=None,
        source=source,
        saved=None,
    )
    drawn, _ = draw_folder(report, num=0 if stored.pictures is None else stored.pictures.count)
    (part,) = stored.parts
    part = part.model_copy(update={"trained": training_of(summary.get("distilled"))})
    retold = stored.model_copy(update={"parts": (part,)})
    record = with_command(retold, summary.get("command"))
    write_record(record, stage / RECORD)
    write_text(stage / PAGE, render_report(record, gallery_of_drawn(drawn)))


def open_report(
    directory: Path,
    *,
    model: str | None = None,
    inputs: str | None = None,
    sensitivity: Path | None = None,
) -> FolderReport:
    """The numbers of a folder: what it stores, else what can be measured.

    Args: as of `report_folder`.

    Raises:
        ArtifactError: The folder or one of its files is damaged.
        ConfigError: Calls are given, and the model cannot be run on them.
    """
    folder = open_folder(directory)
    with stage("loading"):
        folder.files.check()
        source, no_source = _source(folder, model)
        quantized, not_loaded = _loaded(folder)
    why = no_source or not_loaded
    if inputs is not None and why:
        raise ConfigError(f"nothing can be measured on --inputs {inputs}: {why}")
    if not _measures(folder, inputs, sensitivity):
        record = read_listed(ReportRecord, folder.files, RECORD)
    else:
        with stage("comparing outputs"):
            measured = _measured(quantized, source, inputs, sensitivity, why)
        record = _record(folder, source, measured, own_calls=inputs is not None)
    if no_source:
        record = record.model_copy(update={"missing": {**record.missing, "float": no_source}})
    denoiser, saved = _runner(folder, quantized), None
    if denoiser is not None and SCHEDULER_CONFIG in folder.files:
        saved = saved_source(folder, denoiser)
    return FolderReport(
        folder=folder,
        record=record,
        denoiser=denoiser,
        origin=origin_of(folder.root) if SOURCE in folder.files else None,
        source=source,
        saved=saved,
    )


def draw_folder(
    report: FolderReport, *, num: int, steps: int | None = None, seed: int = EVALUATION_SEED
) -> tuple[Drawn | None, str]:
    """Pictures of the float model, where it is, and of what the folder runs.

    Args:
        report: The folder's.
        num: Pictures of each.
        steps: Steps of the scheduler; by default as the folder's own pictures were drawn.
        seed: Seed of the noise.

    Returns:
        The pictures, or None and the reason.
    """
    source = report.source if report.source is not None else report.saved
    if num == 0:
        return None, "no samples were asked for (--samples 0)"
    if source is None or source.scheduler is None:
        return None, "the model has no scheduler to draw with"
    if report.denoiser is None:
        return None, "neither weights nor program can be run here"
    models: dict[str, Denoiser] = {} if report.source is None else {"float": source.model}
    stored = report.record.pictures
    drawn = draw_pictures(
        source,
        {**models, "quantized": report.denoiser},
        num=num,
        steps=steps or (stored.steps if stored is not None else _STEPS),
        seed=seed,
    )
    return drawn, ""


def _measures(folder: ModelFolder, inputs: str | None, sensitivity: Path | None) -> bool:
    """Whether a folder keeps no numbers, or others are asked for."""
    return RECORD not in folder.files or inputs is not None or sensitivity is not None


def _source(folder: ModelFolder, model: str | None) -> tuple[Source | None, str]:
    """The float model, or why there is none."""
    try:
        source = source_of(folder.root, model)
        return as_recorded(source, folder.root, model=model), ""
    except MPQError as error:
        return None, str(error)


def _loaded(folder: ModelFolder) -> tuple[QuantizedModel | None, str]:
    """The quantized model, or why it cannot be loaded: it may have code of its own."""
    try:
        return load(folder.root), ""
    except MPQError as error:
        return None, str(error)


def _runner(folder: ModelFolder, quantized: QuantizedModel | None) -> Denoiser | None:
    """The program if there is one that can be run here, else the packed weights."""
    if program_names(folder):
        try:
            return program_denoiser(folder)
        except MPQError as error:
            logger.warning("the packed weights draw in place of the program: %s", error)
    return quantized


def _measured(
    quantized: QuantizedModel | None,
    source: Source | None,
    inputs: str | None,
    sensitivity: Path | None,
    why: str,
) -> PartMeasurements:
    """What can be measured of a folder that keeps no record of it."""
    if quantized is None or source is None:
        return PartMeasurements(missing=dict.fromkeys(("levels", "kurtosis"), why))
    if inputs is not None:
        calls: Sequence[Mapping[str, Any]] = calls_of(inputs, source.model, held_out=0).calls
    elif source.scheduler is None:
        no_calls = f"{source.name} has no scheduler; give calls with --inputs module:function"
        return PartMeasurements(missing=dict.fromkeys(("levels", "kurtosis"), no_calls))
    else:
        calls = list(held_out_of(source, steps=_STEPS, seed=EVALUATION_SEED))
    compared = compare_all(
        source.model,
        {"quantized": quantized},
        calls,
        noise_argument=quantized.settings.noise_argument,
    )
    return measured_of(
        quantized,
        source.name,
        calls,
        floats=in_form_of(quantized, source.model, example_call(quantized.signature)),
        compared=compared,
        sensitivity=sensitivity,
    )


def _record(
    folder: ModelFolder, source: Source | None, measured: PartMeasurements, *, own_calls: bool
) -> ReportRecord:
    manifest = folder.manifest
    with folder.files.opened(WEIGHTS) as path:
        plan = read_packed(path, manifest.weights, name=folder.root / WEIGHTS).plan
    summary = read_summary(folder) if SUMMARY in folder.files else None
    if summary is not None and own_calls:  # the summary's ratios are of other calls
        ratios = ("epsilon_sqnr_db", "backend_epsilon_sqnr_db")
        summary = {key: value for key, value in summary.items() if key not in ratios}
    part = part_of(
        "unet",
        manifest.signature.model_class,
        plan=plan,
        report=manifest.report,
        settings=manifest.settings.to_dict(),
        measured=measured,
        summary=summary,
    )
    name = part.model_class if source is None else source.name
    if SOURCE in folder.files:
        name = origin_of(folder.root).model
    return record_of(
        name,
        part,
        versions=manifest.versions,
        command=(summary or {}).get("command"),
        drawn=None,
        missing={},
    )
