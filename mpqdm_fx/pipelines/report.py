"""The report of an exported folder, as it is made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.progress import stage
from mpqdm_fx.pipelines.part_numbers import with_costs
from mpqdm_fx.pipelines.pictures import DrawnPictures
from mpqdm_fx.report.gather import with_command
from mpqdm_fx.report.page.gallery import Gallery, gallery_of
from mpqdm_fx.report.page.packages import can_render
from mpqdm_fx.report.page.render import render_report
from mpqdm_fx.report.record import (
    PAGE,
    RECORD,
    FloatPart,
    PartRecord,
    PictureNumbers,
    ReportRecord,
    write_record,
)

__all__ = ["export_gallery", "with_pictures", "write_export_report"]


def write_export_report(
    folder: Path,
    numbers: Mapping[str, PartRecord | FloatPart],
    summary: Mapping[str, Any],
    manifest: Mapping[str, Any],
    drawn: DrawnPictures | None,
    *,
    why_none: str,
) -> ReportRecord:
    """Write `report.json`, and `report.html` if what draws it is installed.

    The numbers are written always: unlike those of a quantized folder, they cannot be measured
    again, since an exported folder keeps programs alone.

    Args:
        folder: A folder that is being made.
        numbers: What is known of each part, without its costs.
        summary: The content of its `summary.json`.
        manifest: The content of its `pipeline.json`.
        drawn: Pictures in float and of the programs.
        why_none: Said where there are none.
    """
    sizes = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    parts = {
        name: with_costs(
            part,
            summary["parts"][name],
            files={file: sizes[file] for file in _files(name, manifest)},
            threads=summary["threads"],
        )
        for name, part in numbers.items()
    }
    quantized = tuple(part for part in parts.values() if isinstance(part, PartRecord))
    backend = summary["backend_denoiser_sqnr_db"]
    record = ReportRecord(
        model=summary["model"] or summary["pipeline"],
        command=None,
        versions=dict(manifest["versions"]),
        pictures=None,
        parts=tuple(
            part.model_copy(update={"backend_epsilon_sqnr_db": backend})
            if part.calls_per_step
            else part
            for part in quantized
        ),
        float_parts=tuple(part for part in parts.values() if isinstance(part, FloatPart)),
        missing={},
    )
    pictures = None if drawn is None else PictureNumbers(**summary["pictures"])
    record = with_pictures(with_command(record, summary["command"]), pictures, why_none)
    write_record(record, folder / RECORD)
    if can_render():
        with stage("report"):
            write_text(folder / PAGE, render_report(record, export_gallery(drawn)))
    return record


def _files(part: str, manifest: Mapping[str, Any]) -> list[str]:
    entries = [entry for entry in manifest["methods"] if entry["part"] == part]
    names = (entry[key] for entry in entries for key in ("file", "weights"))
    return sorted({name for name in names if name is not None})


def with_pictures(
    record: ReportRecord, pictures: PictureNumbers | None, why_none: str
) -> ReportRecord:
    """A record with the numbers of its pictures, or the sentence that says why there are none.

    Args:
        record: The record.
        pictures: The numbers.
        why_none: Said where there are none.
    """
    missing = {key: why for key, why in record.missing.items() if key != "gallery"}
    if pictures is None:
        missing["gallery"] = why_none
    return record.model_copy(update={"pictures": pictures, "missing": missing})


def export_gallery(drawn: DrawnPictures | None) -> Gallery | None:
    """What the page shows of pictures; None where there are none."""
    if drawn is None:
        return None
    return gallery_of(drawn.images, labels=drawn.prompts, note=drawn.note)
