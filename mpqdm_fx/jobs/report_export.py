"""The report of an exported folder, told again: its numbers are stored, its pictures are drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError, MPQError
from mpqdm_fx.io.schema import read_listed
from mpqdm_fx.model.summary import SUMMARY
from mpqdm_fx.pipelines.loops.loop import loop_class
from mpqdm_fx.pipelines.part_inputs import PipelineInputs, inputs_of
from mpqdm_fx.pipelines.pictures import DrawnPictures, draw_pictures
from mpqdm_fx.pipelines.program_files import ProgramFiles
from mpqdm_fx.pipelines.report import export_gallery, with_pictures
from mpqdm_fx.report.page.render import render_report
from mpqdm_fx.report.record import RECORD, ReportRecord, write_page

__all__ = ["report_export"]

_PICTURES = 4
_BATCH = 8  # of calls that are never made


def report_export(
    directory: Path, output: Path, *, model: str | None = None, samples: int | None = None
) -> ReportRecord:
    """Write the page of an exported folder, and its numbers beside it.

    Args:
        directory: Folder written by `export_pipeline`; it is not changed.
        output: The page, `.html`; the numbers get its name with `.json`.
        model: The float pipeline, if it is no longer where it was.
        samples: Pictures to draw; by default as many as the folder's own, or 4.

    Returns:
        The numbers.

    Raises:
        ArtifactError: The folder or one of its files is damaged, or of an older version, which
            keeps no numbers.
    """
    programs = ProgramFiles(directory, verify=True)
    if RECORD not in programs.files:
        raise ArtifactError(
            f"{directory} keeps no numbers for a report: it was exported by an older version; "
            f"export the pipeline again"
        )
    record = read_listed(ReportRecord, programs.files, RECORD)
    summary = programs.files.read_json(SUMMARY)
    inputs, without = _inputs(summary, model)
    if samples is None:
        samples = _PICTURES if record.pictures is None else record.pictures.count
    drawn, why_none = _drawn(programs, summary, inputs, samples)
    record = with_pictures(record, None if drawn is None else drawn.numbers(), why_none)
    if inputs is None:
        record = record.model_copy(update={"missing": {**record.missing, "float": without}})
    page = render_report(record, export_gallery(drawn))
    write_page(record, page, output)
    return record


def _inputs(summary: Mapping[str, Any], model: str | None) -> tuple[PipelineInputs | None, str]:
    """The float pipeline as it was drawn with, or why it is not at hand."""
    name = model or summary["model"]
    if name is None:
        return None, "it was exported from a pipeline in memory; give its folder with --model"
    try:
        inputs, _ = inputs_of(
            name,
            [tuple(summary["size"])],
            prompts=tuple(summary["prompts"]),
            steps=summary["steps"],
            guidance=summary["guidance"],
            trajectories=summary["trajectories"],
            batch_size=_BATCH,
            seed=summary["seed"],
            stored=summary["settings"] is not None,
        )
    except MPQError as error:
        return None, f"{error}; give --model"
    other = [
        key
        for key, part in inputs.layout.parts.items()
        if summary["digests"].get(key) != part.digest
    ]
    if other:
        return None, f"{name} is not what was exported: its {other[0]} is another; give --model"
    return inputs, ""


def _drawn(
    programs: ProgramFiles, summary: Mapping[str, Any], inputs: PipelineInputs | None, samples: int
) -> tuple[DrawnPictures | None, str]:
    """Pictures, or why there are none."""
    if samples == 0:
        return None, "no samples were asked for (--samples 0)"
    if inputs is None and "image" in loop_class(programs.manifest["kind"]).needs:
        return None, "pictures to start from are made for the float pipeline, which is not here"
    try:
        drawn = draw_pictures(programs.folder, samples, prompts=summary["prompts"], inputs=inputs)
    except ArtifactError as error:
        return None, f"the programs do not draw: {error}"
    return drawn, ""
