"""Several folders of one float model, side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.progress import expect, stage
from mpqdm_fx.jobs.foretold import compare_stages
from mpqdm_fx.jobs.pictures import Drawn, draw_pictures
from mpqdm_fx.jobs.report import gallery_of_drawn
from mpqdm_fx.jobs.report_folder import FolderReport, open_report
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.pipelines.components import is_in_pipeline
from mpqdm_fx.records.validation import Count, Some, checked
from mpqdm_fx.report.page.compare import render_compare
from mpqdm_fx.report.record import ReportRecord
from mpqdm_fx.sources.denoisers import Denoiser

__all__ = ["compare_folders"]

_STEPS = 20  # where no folder says how many its pictures took


@checked
def compare_folders(
    directories: Sequence[Path],
    output: Path,
    *,
    model: str | None = None,
    samples: Some = 8,
    steps: Count | None = None,
) -> dict[str, ReportRecord]:
    """Write one page about several folders: a table of all numbers, and pictures from one noise.

    Args:
        directories: Folders written by `quantize` or `distill`, at least two, of one float model.
        output: The page, `.html`.
        model: The float model, if it is no longer where it was.
        samples: Pictures of each.
        steps: Steps of the scheduler; by default as the first folder's own pictures were drawn.

    Returns:
        The numbers by the name that a folder has on the page.

    Raises:
        ConfigError: There are fewer than two folders, or one is named twice.
        ArtifactError: A folder is damaged, or they come from different float models.
    """
    names = _names(directories)
    expect(
        lambda: compare_stages(
            len(names), samples=samples, in_pipeline=is_in_pipeline(directories[0], model)
        )
    )
    with stage("loading", len(names), unit="folder") as advance:
        reports = []
        for directory in directories:
            reports.append(open_report(directory, model=model))
            advance()
    _check_origins(directories, reports)
    drawn, why = _draw(names, reports, samples, steps)
    ratios = None
    if drawn is not None and "float" in drawn.samples:
        expected = drawn.samples["float"]
        ratios = [sqnr_db(expected, drawn.samples[name]) for name in names]
    with stage("page"):
        page = render_compare(
            names,
            [report.record for report in reports],
            gallery_of_drawn(drawn),
            x0_sqnr_db=ratios,
            why_no_gallery=why or (drawn.note if drawn is not None else ""),
        )
        write_text(output, page)
    return dict(zip(names, (report.record for report in reports), strict=True))


def _names(directories: Sequence[Path]) -> list[str]:
    """What folders are called: their last part where these differ, else as they were typed."""
    if len(directories) < 2:
        raise ConfigError("give at least two folders to compare")
    places = [directory.resolve() for directory in directories]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise ConfigError(f"{directories[index]} is given twice; give different folders")
    short = [place.name for place in places]
    names = short if len(set(short)) == len(short) else [str(place) for place in places]
    return [f"./{name}" if name == "float" else name for name in names]


def _check_origins(directories: Sequence[Path], reports: Sequence[FolderReport]) -> None:
    """Refuse folders whose errors are measured against different models."""
    origins = [_origin(report) for report in reports]
    for directory, origin in zip(directories[1:], origins[1:], strict=True):
        if origin != origins[0]:
            raise ArtifactError(
                f"{directories[0]} was made from {origins[0]}, and {directory} from {origin}: "
                f"errors against different float models cannot be compared; give folders of one"
            )


def _origin(report: FolderReport) -> str:
    origin, part = report.origin, report.record.parts[0]
    size = f"{part.model_class} of {part.float32_bytes // 4:,} parameters"
    if origin is None:
        return f"an unknown {size}"
    place = Path(origin.model)
    name = str(place.resolve()) if place.exists() else origin.model
    inner = [entry for entry in (origin.subfolder, origin.variant) if entry is not None]
    return f"{'/'.join([name, *inner])} ({size})"


def _draw(
    names: Sequence[str], reports: Sequence[FolderReport], samples: int, steps: int | None
) -> tuple[Drawn | None, str]:
    source = next((report.source for report in reports if report.source is not None), None)
    models: dict[str, Denoiser] = {} if source is None else {"float": source.model}
    if source is None:
        source = next((report.saved for report in reports if report.saved is not None), None)
    if samples == 0:
        return None, "no samples were asked for (--samples 0)"
    if source is None or source.scheduler is None:
        return None, "the model has no scheduler to draw with"
    denoisers: Mapping[str, Denoiser | None] = dict(
        zip(names, (report.denoiser for report in reports), strict=True)
    )
    for name, denoiser in denoisers.items():
        if denoiser is None:
            return None, f"{name} has neither weights nor a program that can be run here"
        models[name] = denoiser
    pictures = [report.record.pictures for report in reports]
    stored = [numbers.steps for numbers in pictures if numbers is not None]
    count = steps or (stored[0] if stored else _STEPS)
    return draw_pictures(source, models, num=samples, steps=count), ""
