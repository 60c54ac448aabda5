"""The report of a folder that is being made: measured against the float model, then written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.io.files import write_text
from mpqdm_fx.jobs.pictures import Drawn
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.report.gather import PartMeasurements, part_of, with_command
from mpqdm_fx.report.page.gallery import Gallery, gallery_of
from mpqdm_fx.report.page.render import render_report
from mpqdm_fx.report.record import (
    PAGE,
    RECORD,
    PartRecord,
    PictureNumbers,
    ReportRecord,
    write_record,
)
from mpqdm_fx.sources.source import Source

__all__ = [
    "gallery_of_drawn",
    "picture_numbers",
    "record_of",
    "write_report",
]


def picture_numbers(drawn: Drawn) -> PictureNumbers:
    """The numbers of pictures: of two denoisers, the second against the first."""
    samples = list(drawn.samples.values())
    pairs = list(zip(*samples, strict=True)) if len(samples) == 2 else []
    return PictureNumbers(
        count=len(samples[0]),
        steps=drawn.steps,
        seed=drawn.seed,
        labels=drawn.labels,
        x0_sqnr_db=sqnr_db(*samples) if pairs else None,
        by_picture=tuple(sqnr_db(*pair) for pair in pairs),
    )


def write_report(
    folder: Path,
    quantized: QuantizedModel,
    source: Source,
    *,
    measured: PartMeasurements,
    drawn: Drawn | None,
    summary: Mapping[str, Any],
    why_no_pictures: str = "",
) -> ReportRecord:
    """Write `report.html` and `report.json` into a folder that is being made.

    Args:
        folder: The folder.
        quantized: The model.
        source: Its float model.
        measured: What `measured_of` gave.
        drawn: Pictures of the float model and of what the backend runs, in this order.
        summary: The folder's summary.
        why_no_pictures: Said where there are none.
    """
    part = part_of(
        "unet",
        quantized.signature.model_class,
        plan=quantized.plan,
        report=quantized.report,
        settings=quantized.settings.to_dict(),
        measured=measured,
        summary=summary,
    )
    record = record_of(
        source.name,
        part,
        versions=quantized.report.versions,
        command=summary.get("command"),
        drawn=drawn,
        missing={} if drawn else {"gallery": why_no_pictures},
    )
    write_record(record, folder / RECORD)
    write_text(folder / PAGE, render_report(record, gallery_of_drawn(drawn)))
    return record


def record_of(
    model: str,
    part: PartRecord,
    *,
    versions: Mapping[str, str],
    command: str | None,
    drawn: Drawn | None,
    missing: Mapping[str, str],
) -> ReportRecord:
    """The record of a folder of one part.

    Args:
        model: What the user called the float model.
        part: Its numbers.
        versions: What it was made with.
        command: What makes it again; None if nobody knows.
        drawn: Its pictures.
        missing: Why sections are not there.
    """
    record = ReportRecord(
        model=model,
        command=None,
        versions=dict(versions),
        pictures=None if drawn is None else picture_numbers(drawn),
        parts=(part,),
        missing=dict(missing),
    )
    return with_command(record, command)


def gallery_of_drawn(drawn: Drawn | None) -> Gallery | None:
    """What the page shows of pictures; None where there are none."""
    if drawn is None or not drawn.images:
        return None
    return gallery_of(drawn.images, labels=drawn.labels, note=drawn.note)
