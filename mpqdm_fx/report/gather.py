"""From what a quantized model and its folder hold to the numbers of a report."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.bits.sensitivity_table import SensitivityTable
from mpqdm_fx.numerics.lazy_tensor import row_blocks
from mpqdm_fx.numerics.solve.outliers import kurtosis
from mpqdm_fx.records.plan import BitPlan, LayerPlan
from mpqdm_fx.records.report import LayerReport, QuantizationReport
from mpqdm_fx.report.comparison import Comparison, LevelSqnr
from mpqdm_fx.report.record import (
    ActivationNumbers,
    BytesByKind,
    JudgedRecipe,
    LayerNumbers,
    LevelNumbers,
    PartRecord,
    Place,
    ProgramNumbers,
    ReportRecord,
    Spread,
    TrainingNumbers,
)

__all__ = [
    "PartMeasurements",
    "kurtosis_of",
    "part_of",
    "program_of",
    "sensitivity_of",
    "training_of",
    "with_command",
]

_BLOCK = 1 << 20  # weights whose kurtosis is taken at once

#: Numbers that programs of the backend `lowbit` have.
_OWN = (
    "own_layers",
    "left_layers",
    "own_operators",
    "crossings",
    "layout_copies",
    "layout_copy_bytes",
)


@dataclass(frozen=True, kw_only=True)
class PartMeasurements:
    """What is measured with the float model at hand; empty where it was not.

    Attributes:
        quantized: Outputs of the fake-quantized graph against the float model's.
        backend: The same of what the backend runs.
        by_level: Each layer's SQNR at each noise level of `quantized`, by its name.
        running: Each layer's SQNR in the running model, where that is told no noise level.
        kurtosis: Kurtosis of each channel's float weights by layer, float64 [O].
        sensitivity: Sensitivity of each channel by layer, float64 [O].
        missing: Why something was not measured, by what it is called on the page.
    """

    quantized: Comparison | None = None
    backend: Comparison | None = None
    by_level: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    running: Mapping[str, float] = field(default_factory=dict)
    kurtosis: Mapping[str, Tensor] = field(default_factory=dict)
    sensitivity: Mapping[str, Tensor] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def kurtosis_of(floats: fx.GraphModule, plan: BitPlan) -> dict[str, Tensor]:
    """Kurtosis of the float weights of every channel, by layer.

    Args:
        floats: Float graph in the form that was quantized.
        plan: Names the layers.
    """
    kurtoses = {}
    for layer in plan.layers:
        weight = floats.get_parameter(f"{layer.name}.weight")
        # block by block: a large table takes gigabytes in float64
        blocks = row_blocks(weight.detach(), _BLOCK)
        kurtoses[layer.name] = torch.cat([kurtosis(block.flatten(1)) for block in blocks])
    return kurtoses


def sensitivity_of(table: SensitivityTable, plan: BitPlan) -> dict[str, Tensor]:
    """Sensitivities of the channels of the layers that a plan has, by layer.

    Args:
        table: What was measured; of another model's layers nothing is taken.
        plan: Names the layers.
    """
    return {
        layer.name: layer.sensitivity
        for layer in table.layers
        if layer.name in plan and plan.layer(layer.name).shape == layer.shape
    }


def part_of(
    name: str,
    model_class: str,
    *,
    plan: BitPlan,
    report: QuantizationReport,
    settings: Mapping[str, Any],
    measured: PartMeasurements,
    summary: Mapping[str, Any] | None = None,
) -> PartRecord:
    """The numbers of one quantized model.

    Args:
        name: What the model is in its pipeline, for example `unet`.
        model_class: Its class.
        plan: Its bits.
        report: What quantization did.
        settings: The run's settings.
        measured: What was measured with the float model.
        summary: Its folder's summary; None where there is none.
    """
    content: Mapping[str, Any] = summary or {}
    backend = content.get("backend")
    times, peaks = content.get("milliseconds_per_step", {}), content.get("peak_memory_bytes", {})
    own_peaks = [size for form, size in peaks.items() if form != "float"]
    program = content.get("program")
    missing = dict(measured.missing)
    if summary is None:
        why = "the folder has no summary: it was written by save, which measures nothing"
        missing |= dict.fromkeys(("speed", "memory", "disk", "delegation"), why)
    elif program is None:
        missing["delegation"] = f"there is no program: the folder was made for {backend}"
    if peaks and None in own_peaks:
        missing["memory"] = "no peak was measured: the model has no scheduler, or no /proc is here"
    if not measured.sensitivity:
        missing.setdefault(
            "sensitivity", "a folder does not keep sensitivities; give the file of --sensitivity"
        )
    ratios = _ratios(measured, content)
    return PartRecord(
        name=name,
        model_class=model_class,
        backend=backend,
        settings=dict(settings),
        mean_bits=plan.mean_bits,
        effective_bits=plan.effective_bits,
        num_weights=plan.num_weights,
        float32_bytes=4 * plan.num_parameters,
        bytes=_bytes_of(plan),
        files=dict(content.get("files", {})),
        milliseconds=times.get(backend),
        float_milliseconds=times.get("float"),
        threads=content.get("threads"),
        peak_bytes=own_peaks[0] if own_peaks else None,
        float_peak_bytes=peaks.get("float"),
        seconds_to_quantize=report.seconds,
        calibration_calls=report.calibration_calls,
        epsilon_sqnr_db=ratios[0],
        backend_epsilon_sqnr_db=ratios[1],
        noise_argument=None if measured.quantized is None else measured.quantized.noise_argument,
        levels=_levels(measured, backend),
        layers=_layers(plan, report, measured),
        activations=tuple(
            ActivationNumbers(
                layers=choice.layers,
                chosen=choice.told,
                quantized_cost=choice.quantized_cost,
                cost=choice.cost,
                slowdown=choice.slowdown,
            )
            for choice in report.activations
        ),
        judged=tuple(
            JudgedRecipe(
                recipe=score.recipe,
                sqnr_db=score.decibels,
                by_group=score.sqnr_db,
                chosen=score.chosen,
            )
            for score in report.judged
        ),
        program=None if program is None else program_of(program),
        trained=training_of(content.get("distilled")),
        remarks=(*content.get("remarks", plan.remarks), *_origin(report)),
        missing=missing,
    )


def _origin(report: QuantizationReport) -> list[str]:
    """Where codes are from, if not all of this run."""
    if not report.taken:
        return []
    solved = f"{report.solved} of {len(report.layers)} layers were solved"
    return [f"{solved}; the others, whose weights are as they were, have an earlier run's codes"]


def _ratios(
    measured: PartMeasurements, summary: Mapping[str, Any]
) -> tuple[float | None, float | None]:
    """SQNR of the noise: what the folder says, else what was measured now."""
    ratios = []
    for key, comparison in (
        ("epsilon_sqnr_db", measured.quantized),
        ("backend_epsilon_sqnr_db", measured.backend),
    ):
        ratios.append(summary.get(key, None if comparison is None else comparison.sqnr_db))
    return ratios[0], ratios[1]


def _levels(measured: PartMeasurements, backend: str | None) -> tuple[LevelNumbers, ...]:
    comparison = measured.quantized
    if comparison is None:
        return ()
    backend_points: Sequence[LevelSqnr | None] = [None] * len(comparison.levels)
    if measured.backend is not None:
        backend_points = measured.backend.levels
    elif backend in (None, "packed"):  # which run the graph itself
        backend_points = comparison.levels
    return tuple(
        LevelNumbers(
            level=point.level,
            samples=point.samples,
            sqnr_db=point.sqnr_db,
            backend_sqnr_db=None if backend_point is None else backend_point.sqnr_db,
        )
        for point, backend_point in zip(comparison.levels, backend_points, strict=True)
    )


def _layers(
    plan: BitPlan, report: QuantizationReport, measured: PartMeasurements
) -> tuple[LayerNumbers, ...]:
    reports = {layer.name: layer for layer in report.layers}
    is_unet = any(layer.name.startswith(("down_blocks.", "up_blocks.")) for layer in plan.layers)
    last = plan.layers[-1].name if plan.layers else ""
    return tuple(
        _layer(
            layer, reports[layer.name], measured, _place(layer.name, last) if is_unet else "model"
        )
        for layer in plan.layers
    )


def _layer(
    planned: LayerPlan, report: LayerReport, measured: PartMeasurements, place: Place
) -> LayerNumbers:
    # codes of an entropy coder have no width
    counts = Counter(planned.bits if planned.coded is None else ())
    return LayerNumbers(
        name=planned.name,
        kind=planned.kind,
        place=place,
        shape=planned.shape,
        mean_bits=planned.mean_bits,
        bits={str(width): counts[width] for width in sorted(counts)},
        bytes=report.bytes,
        sqnr_db=report.sqnr_db,
        base_sqnr_db=report.base_sqnr_db,
        alpha=report.alpha,
        beta=report.beta,
        rows=report.rows,
        refitted=report.refitted,
        reason=report.reason,
        by_level=measured.by_level.get(planned.name),
        kurtosis=_spread(measured.kurtosis.get(planned.name)),
        sensitivity=_spread(measured.sensitivity.get(planned.name)),
        running_sqnr_db=measured.running.get(planned.name),
    )


def _place(name: str, last: str) -> Place:
    """Where a layer is in a UNet of diffusers, by its name."""
    for prefix, place in (("down_", "down"), ("mid_", "mid"), ("up_", "up")):
        if name.startswith(prefix):
            return place  # type: ignore[return-value]
    return "exit" if name.startswith("conv_out") or name == last else "entry"


def _spread(values: Tensor | None) -> Spread | None:
    if values is None or not len(values):
        return None
    points = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    quantiles = torch.quantile(values.double(), points).tolist()
    if not all(map(math.isfinite, quantiles)):
        return None
    return Spread(
        smallest=quantiles[0],
        lower=quantiles[1],
        middle=quantiles[2],
        upper=quantiles[3],
        largest=quantiles[4],
    )


def _bytes_of(plan: BitPlan) -> BytesByKind:
    kinds = ("codes", "scales", "tables", "widths")
    sums = {
        kind: sum(-(-getattr(layer.storage, kind) // 8) for layer in plan.layers) for kind in kinds
    }
    floats = sum(t.numel * t.bits // 8 for t in plan.float_weights)
    return BytesByKind(**sums, float_weights=floats, float_remainder=plan.float_bytes)


def program_of(program: Mapping[str, Any]) -> ProgramNumbers:
    """The numbers of a lowered method.

    Args:
        program: `XnnpackProgram.to_dict()`, and `method` where it is not the file's only one.
    """
    return ProgramNumbers(
        file=program["path"],
        bytes=program["bytes"],
        weights_bytes=program["weights_bytes"],
        subgraphs=program["subgraphs"],
        delegated=program["delegated"],
        undelegated=program["undelegated"],
        outside=dict(program["refusals"]),
        float_layers=dict(program["float_layers"]),
        eight_bit_layers=dict(program["eight_bit_layers"]),
        four_bit_layers=tuple(program["four_bit_layers"]),
        sqnr_db=program["sqnr_db"],
        max_lsb=program["max_lsb"],
        seconds=program["seconds"],
        method=program.get("method", "forward"),
        **{name: program[name] for name in _OWN if name in program},
    )


def training_of(training: Mapping[str, Any] | None) -> TrainingNumbers | None:
    """What a summary says of a training; None if there was none."""
    if training is None:
        return None
    names = TrainingNumbers.model_fields
    return TrainingNumbers(**{name: training[name] for name in names})


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
