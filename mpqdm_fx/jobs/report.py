"""The report of a folder that is being made: measured against the float model, then written."""

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import fx

from mpqdm_fx.calibration.sensitivity_table import SensitivityTable
from mpqdm_fx.files import write_text
from mpqdm_fx.jobs.pictures import Drawn
from mpqdm_fx.models.source import Source
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.quantized import QuantizedModel
from mpqdm_fx.report.comparison import Comparison
from mpqdm_fx.report.gather import Measured, kurtosis_of, part_of, sensitivity_of
from mpqdm_fx.report.layer_levels import sqnr_by_layer
from mpqdm_fx.report.page.gallery import Gallery, gallery_of
from mpqdm_fx.report.page.render import render_report
from mpqdm_fx.report.record import (
    PAGE,
    RECORD,
    Part,
    PictureNumbers,
    ReportRecord,
    write_record,
)

__all__ = [
    "can_render",
    "gallery_of_drawn",
    "measured_of",
    "picture_numbers",
    "record_of",
    "renders",
    "with_command",
    "write_report",
]

logger = logging.getLogger(__name__)

_PACKAGES = ("matplotlib", "jinja2")


def renders() -> bool:
    """Whether what a page is made with is installed."""
    return not _absent()


def _absent() -> list[str]:
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def can_render() -> bool:
    """Whether a page can be made now; if not, one line in the log says how."""
    if absent := _absent():
        logger.warning(
            'no report is written, %s is not installed: pip install "mpqdm-fx[report]", then '
            "mpqdm-fx report DIR", " and ".join(absent),
        )  # fmt: skip
    return not absent


def measured_of(
    quantized: QuantizedModel,
    source: Source,
    calls: Iterable[Mapping[str, Any]],
    *,
    floats: fx.GraphModule,
    compared: Mapping[str, Comparison],
    sensitivity: str | Path | None = None,
) -> Measured:
    """What a report tells that needs the float model.

    Args:
        quantized: The model.
        source: Its float model.
        calls: Held-out calls.
        floats: The float graph in the form that was quantized.
        compared: Outputs against the float model's: of `"quantized"`, and of `"backend"` where that
            is something else.
        sensitivity: File of the sensitivities, where there is one.
    """
    batches = list(calls)
    own = compared["quantized"]
    missing: dict[str, str] = {}
    by_level = sqnr_by_layer(
        floats,
        _graph(quantized),
        [layer.name for layer in quantized.plan.layers],
        batches,
        own.levels,
        noise_argument=own.noise_argument,
    )
    if not own.levels:
        missing["levels"] = f"{source.name} is told no noise level"
    table = None
    if sensitivity is not None and Path(sensitivity).is_file():
        table = SensitivityTable.load(sensitivity)
    elif quantized.settings.allocation != "measured":
        mode = quantized.settings.allocation
        missing["sensitivity"] = f'allocation="{mode}" measures none'
    return Measured(
        quantized=own,
        backend=compared.get("backend"),
        by_level=by_level,
        kurtosis=kurtosis_of(floats, quantized.plan),
        sensitivity={} if table is None else sensitivity_of(table, quantized.plan),
        missing=missing,
    )


def _graph(quantized: QuantizedModel) -> fx.GraphModule:
    graph = quantized.graph_module
    assert isinstance(graph, fx.GraphModule)
    return graph


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
    measured: Measured,
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
    part: Part,
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


def with_command(record: ReportRecord, command: str | None) -> ReportRecord:
    """A record with the command that makes its folder again, or the sentence that says why not.

    Args:
        record: The record.
        command: The command; None if nobody knows it, or if no command line asks for the settings.
    """
    missing = {key: why for key, why in record.missing.items() if key != "command"}
    if command is None:
        missing["command"] = "no command line asks for these settings, or the folder is older"
    return record.model_copy(update={"command": command, "missing": missing})


def gallery_of_drawn(drawn: Drawn | None) -> Gallery | None:
    """What the page shows of pictures; None where there are none."""
    if drawn is None or not drawn.images:
        return None
    return gallery_of(drawn.images, labels=drawn.labels, note=drawn.note)
