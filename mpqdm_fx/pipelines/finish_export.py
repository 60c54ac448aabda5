"""The end of an export: pictures, measurements, and the numbers of `summary.json`."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.progress import stage
from mpqdm_fx.io.schema import plain, validated
from mpqdm_fx.model.summary import SUMMARY
from mpqdm_fx.pipelines.measure_parts import drop_expanded, measure_parts
from mpqdm_fx.pipelines.part_inputs import PipelineInputs
from mpqdm_fx.pipelines.part_numbers import KeptPart
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.pictures import DrawnPictures, draw_pictures, write_samples
from mpqdm_fx.pipelines.report import write_export_report

__all__ = ["finish"]

logger = logging.getLogger(__name__)

_UNMEASURED: Mapping[str, Any] = {"milliseconds": None, "peak_memory_bytes": None}


def finish(
    folder: Path,
    inputs: PipelineInputs,
    manifest: Mapping[str, Any],
    parts: Mapping[str, Any],
    *,
    samples: int,
    measure: bool,
    root: Path | None,
    command: str | None,
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """Draw, measure, and write pictures, summary and report into an exported folder.

    Args:
        folder: The folder, whose manifest is written.
        inputs: The pipeline, and how its parts are called.
        manifest: The content of `pipeline.json`.
        parts: What each part left for the report, `KeptPart.to_dict`.
        samples: Columns of the picture; 0 draws none.
        measure: Measure times and peaks.
        root: The pipeline's folder; None for one in memory.
        command: The command line that makes the folder again; None if nobody knows.
        digests: Of the pipeline's parts, by which it is known again.

    Returns:
        The content of `summary.json`.
    """
    drawn, why_none = None, "no pictures were asked for (--samples 0)"
    with stage("drawing" if samples else None):
        if samples:
            drawn, why_none = _drawn(folder, inputs, samples)
    with stage("measuring" if measure else None):
        measured = measure_parts(folder, inputs, root=root) if measure else {}
    drop_expanded(folder)
    records = {name: validated(KeptPart, part, name) for name, part in parts.items()}
    summary = {
        **_summarise(inputs, manifest, measured, drawn),
        "seconds_to_quantize": sum(record.seconds for record in records.values()),
        "samples": 0 if drawn is None else samples,
        "remarks": [why_none] if samples and drawn is None else [],
        "digests": dict(digests),
        "model": None if root is None else str(root),
        "command": command,
    }
    write_text(folder / SUMMARY, json.dumps(plain(summary), indent=2, allow_nan=False))
    numbers = {name: record.numbers for name, record in records.items()}
    write_export_report(folder, numbers, summary, manifest, drawn, why_none=why_none)
    return summary


def _drawn(folder: Path, inputs: PipelineInputs, samples: int) -> tuple[DrawnPictures | None, str]:
    """Pictures or sounds, which are also written into the folder, or None and the reason."""
    try:
        drawn = draw_pictures(folder, samples, prompts=inputs.prompts, inputs=inputs)
    except ArtifactError as error:
        logger.warning("no samples are drawn: %s", error)
        return None, f"no samples are drawn: {error}"
    write_samples(folder, drawn)
    return drawn, ""


def _summarise(
    inputs: PipelineInputs,
    manifest: Mapping[str, Any],
    measured: Mapping[str, Any],
    drawn: DrawnPictures | None,
) -> dict[str, Any]:
    calls = inputs.calls_per_step
    parts = {
        part.name: {
            **manifest["parts"][part.name],
            **_sizes(part, manifest),
            **_programs(part, manifest),
            "calls_per_step": calls if part.stepped else 0,
            **measured.get(part.name, _UNMEASURED),
        }
        for part in inputs.layout.parts.values()
    }
    return {
        "pipeline": manifest["pipeline"],
        "bytes": sum(part["bytes"] for part in parts.values()),
        "float32_bytes": sum(part["float32_bytes"] for part in parts.values()),
        "denoiser_sqnr_db": manifest["parts"]["denoiser"]["quantized_sqnr_db"],
        "backend_denoiser_sqnr_db": None if drawn is None else drawn.backend_sqnr_db,
        "pictures": None if drawn is None else drawn.numbers().model_dump(),
        "calls_per_step": calls,
        "milliseconds_per_step": _step(parts, calls),
        "threads": torch.get_num_threads(),
        "parts": parts,
        "settings": manifest["quantization"],
        "size": list(inputs.size),
        "steps": inputs.steps,
        "guidance": inputs.guidance,
        "prompts": list(inputs.prompts) if inputs.takes_text else [],
        "trajectories": inputs.trajectories,
        "seed": inputs.seed,
        "versions": manifest["versions"],
    }


def _methods(part: Part, manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in manifest["methods"] if entry["part"] == part.name]


def _sizes(part: Part, manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a part's files, and of its parameters in float32."""
    names = {
        entry[key]
        for entry in _methods(part, manifest)
        for key in ("file", "weights")
        if entry[key] is not None
    }
    return {
        "bytes": sum(int(manifest["files"][name]["bytes"]) for name in names),
        "parameters": part.parameters,
        "float32_bytes": 4 * part.parameters,
    }


def _programs(part: Part, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The least exact of a part's methods, and the most delegates that one has."""
    methods = _methods(part, manifest)
    return {
        "program_sqnr_db": min(float(entry["program_sqnr_db"]) for entry in methods),
        "subgraphs": max(entry["subgraphs"] for entry in methods),
    }


def _step(parts: Mapping[str, Any], calls: int) -> dict[str, float] | None:
    """Milliseconds of a step: every call of it runs all stepped parts."""
    times = [part["milliseconds"] for part in parts.values() if part["calls_per_step"]]
    if None in times:
        return None
    return {form: calls * sum(time[form] for time in times) for form in ("float", "program")}
