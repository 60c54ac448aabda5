"""The metrics of an exported pipeline, under the names that `--gate` knows."""

from collections.abc import Mapping
from typing import Any

__all__ = ["EXPORTED", "expected_export", "export_metrics"]

#: What a metric is of, where that is another thing than of one model.
EXPORTED: Mapping[str, str] = {
    "epsilon_sqnr": "the quantized denoiser, on held-out calls",
    "backend_sqnr": "its program, along the runs of samples.png in float",
    "x0_sqnr": "samples that samples.png shows, before decoding",
    "psnr": "the pictures of samples.png",
    "ssim": "the same pictures",
    "bytes": "all programs and their weights",
    "effective_bits": "the denoiser",
    "ms": "a step: with guidance two calls of the denoiser",
    "speedup": "a step in float (eager) over ms",
    "peak_memory": "the largest part, loaded and called alone",
    "program_sqnr": "the worst method of all programs",
    "subgraphs": "the method of the denoiser that has the most",
    "seconds": "wall time of quantizing all parts",
}


def expected_export(*, quantized: bool, drawn: bool, likened: bool, peaks: bool) -> tuple[str, ...]:
    """Names of the metrics that the summary of an export to come will hold.

    Args:
        quantized: Whether it is no export in float.
        drawn: Whether it draws pictures.
        likened: Whether the likeness of pictures can be measured.
        peaks: Whether peaks of memory can be.
    """
    without: set[str] = set() if quantized else {"epsilon_sqnr", "effective_bits", "seconds"}
    if not drawn:
        without |= {"backend_sqnr", "x0_sqnr"}
    if not drawn or not likened:
        without |= {"psnr", "ssim"}
    if not peaks:
        without.add("peak_memory")
    return tuple(name for name in EXPORTED if name not in without)


def export_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that the summary of an exported folder holds.

    Args:
        summary: Content of its `summary.json`.
    """
    parts, pictures = summary["parts"], summary["pictures"] or {}
    denoiser, step = parts["denoiser"], summary["milliseconds_per_step"] or {}
    program_peaks = [(part["peak_memory_bytes"] or {}).get("program") for part in parts.values()]
    peaks = [int(peak) for peak in program_peaks if peak is not None]
    metrics: dict[str, Any] = {
        "epsilon_sqnr": summary["denoiser_sqnr_db"],
        "backend_sqnr": summary["backend_denoiser_sqnr_db"],
        "x0_sqnr": pictures.get("x0_sqnr_db"),
        "psnr": pictures.get("psnr_db"),
        "ssim": pictures.get("ssim"),
        "bytes": summary["bytes"],
        "effective_bits": denoiser.get("effective_bits"),
        "ms": step.get("program"),
        "speedup": step["float"] / step["program"] if step.get("program") else None,
        "peak_memory": max(peaks) if len(peaks) == len(program_peaks) else None,
        "program_sqnr": min(float(part["program_sqnr_db"]) for part in parts.values()),
        "subgraphs": denoiser["subgraphs"],
        "seconds": summary["seconds_to_quantize"],
    }
    # ratios that JSON cannot hold are text
    return {name: float(value) for name, value in metrics.items() if value is not None}
