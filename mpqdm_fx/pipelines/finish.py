"""The end of an export: pictures, measurements, and the numbers of `summary.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpqdm_fx.files import write_text
from mpqdm_fx.io.schema import plain
from mpqdm_fx.pipelines.inputs import PipelineInputs
from mpqdm_fx.pipelines.measure import draw_samples, drop_expanded, measure_parts
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.progress import stage
from mpqdm_fx.summary import SUMMARY

__all__ = ["finish"]

_UNMEASURED: Mapping[str, Any] = {"milliseconds": None, "peak_memory_bytes": None}


def finish(
    folder: Path,
    inputs: PipelineInputs,
    manifest: Mapping[str, Any],
    *,
    samples: int,
    measure: bool,
    root: Path | None,
) -> dict[str, Any]:
    """Draw, measure, and write `samples.png` and `summary.json` into an exported folder.

    Args:
        folder: The folder, whose manifest is written.
        inputs: The pipeline, and how its parts are called.
        manifest: The content of `pipeline.json`.
        samples: Columns of the picture; 0 draws none.
        measure: Measure times and peaks.
        root: The pipeline's folder; None for one in memory.

    Returns:
        The content of `summary.json`.
    """
    with stage("drawing" if samples else None):
        remark = draw_samples(folder, inputs, samples) if samples else None
    with stage("measuring" if measure else None):
        measured = measure_parts(folder, inputs, root=root) if measure else {}
    drop_expanded(folder)
    parts = {
        part.name: {
            **manifest["parts"][part.name],
            **_sizes(part, manifest),
            **measured.get(part.name, _UNMEASURED),
        }
        for part in inputs.layout.parts.values()
    }
    conditional = inputs.layout.kind != "unconditional"
    summary = {
        "pipeline": manifest["pipeline"],
        "bytes": sum(part["bytes"] for part in parts.values()),
        "float32_bytes": sum(part["float32_bytes"] for part in parts.values()),
        "denoiser_sqnr_db": manifest["parts"]["denoiser"]["quantized_sqnr_db"],
        "calls_per_step": 2 if inputs.guided else 1,
        "milliseconds_per_step": _step(parts["denoiser"]["milliseconds"], inputs.guided),
        "threads": torch.get_num_threads(),
        "parts": parts,
        "settings": manifest["quantization"],
        "size": list(inputs.size),
        "steps": inputs.steps,
        "guidance": inputs.guidance,
        "prompts": list(inputs.prompts) if conditional else [],
        "samples": 0 if remark else samples,
        "remarks": [remark] if remark else [],
        "versions": manifest["versions"],
    }
    write_text(folder / SUMMARY, json.dumps(plain(summary), indent=2, allow_nan=False))
    return summary


def _sizes(part: Part, manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a part's files, and of its parameters in float32."""
    names = {
        entry[key]
        for entry in manifest["methods"]
        for key in ("file", "weights")
        if entry["part"] == part.name and entry[key] is not None
    }
    return {
        "bytes": sum(int(manifest["files"][name]["bytes"]) for name in names),
        "parameters": part.parameters,
        "float32_bytes": 4 * part.parameters,
    }


def _step(times: Mapping[str, float] | None, guided: bool) -> dict[str, float] | None:
    """Milliseconds of a step: guidance calls the denoiser twice."""
    if times is None:
        return None
    return {form: times[form] * (2 if guided else 1) for form in ("float", "program")}
