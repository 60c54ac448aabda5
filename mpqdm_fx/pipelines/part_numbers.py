"""A report's numbers of one part of an export: those that need its model, then what it costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqdm_fx.backends.names import ProgramBackend
from mpqdm_fx.graph.calling import example_call
from mpqdm_fx.io.schema import Strict, plain
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.stages import in_form_of
from mpqdm_fx.pipelines import parts
from mpqdm_fx.pipelines.programs import JudgedPart, WrittenMethod
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.against_float import graph_of, measured_of
from mpqdm_fx.report.gather import PartMeasurements, kurtosis_of, part_of, program_of
from mpqdm_fx.report.layer_levels import running_sqnr
from mpqdm_fx.report.record import FloatPart, PartRecord

__all__ = ["KeptPart", "kept_part", "with_costs"]

_UNMEASURED = "times and peaks of memory were not to be measured (measure=False)"


class KeptPart(Strict):
    """What a finished part leaves for the report; its costs are measured with those of all others.

    `seconds` are those of quantizing it, whether that was good enough or not.
    """

    seconds: float
    numbers: PartRecord | FloatPart

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        content: dict[str, Any] = plain(self.model_dump())
        return content


def kept_part(
    part: parts.Part,
    judged: JudgedPart,
    written: Sequence[WrittenMethod],
    config: MPQConfig | None,
    *,
    bound: float,
    sensitivity: str | Path | None,
    backend: ProgramBackend = "xnnpack",
) -> KeptPart:
    """The numbers of a part whose programs are written.

    Args:
        part: The part.
        judged: What it was lowered from.
        written: Its methods.
        config: Settings of the denoiser; None if all stays in float.
        bound: Least signal-to-noise ratio of the other parts, in dB.
        sensitivity: File of the denoiser's sensitivities.
        backend: What its programs are for.
    """
    often = next((method for method in written if method.entry["size"] is not None), written[0])
    methods = tuple(program_of(method.to_dict()) for method in written if method is not often)
    quantized = judged.quantized
    if quantized is None:
        numbers: PartRecord | FloatPart = FloatPart(
            name=part.name,
            model_class=type(part.module).__name__,
            float32_bytes=4 * part.parameters,
            files={},
            milliseconds=None,
            float_milliseconds=None,
            threads=None,
            peak_bytes=None,
            float_peak_bytes=None,
            program=program_of(often.to_dict()),
            missing={},
            why=_why_float(judged, config, bound),
            quantized_sqnr_db=judged.sqnr_db,
        )
    else:
        numbers = part_of(
            part.name,
            quantized.signature.model_class,
            plan=quantized.plan,
            report=quantized.report,
            settings=quantized.settings.to_dict(),
            measured=_measured(part, quantized, judged, sensitivity),
            summary={
                "backend": backend,
                "program": often.to_dict(),
                "epsilon_sqnr_db": judged.sqnr_db,
            },
        )
    return KeptPart(seconds=judged.seconds, numbers=numbers.model_copy(update={"methods": methods}))


def _why_float(judged: JudgedPart, config: MPQConfig | None, bound: float) -> str:
    if config is None:
        return "all parts were to stay in float (--float)"
    return (
        f"quantized to {judged.bits} bits its output has {judged.sqnr_db:.1f} dB on held-out "
        f"inputs, less than the {bound:g} dB of --minimum-sqnr"
    )


def _measured(
    part: parts.Part, quantized: QuantizedModel, judged: JudgedPart, sensitivity: str | Path | None
) -> PartMeasurements:
    """What is told that needs the float part; of what runs once per image its weights alone."""
    floats = in_form_of(quantized, part.module, example_call(quantized.signature))
    if judged.comparison is not None:
        return measured_of(
            quantized,
            f"the {part.name}",
            judged.held_out,
            floats=floats,
            compared={"quantized": judged.comparison},
            sensitivity=sensitivity,
        )
    once, names = "it runs once per image", [layer.name for layer in quantized.plan.layers]
    return PartMeasurements(
        running=running_sqnr(floats, graph_of(quantized), names, judged.held_out),
        kurtosis=kurtosis_of(floats, quantized.plan),
        missing={
            "levels": f"{once} and is told no noise level",
            "sensitivity": f"{once}, and none is measured of that",
        },
    )


def with_costs(
    numbers: PartRecord | FloatPart,
    costs: Mapping[str, Any],
    *,
    files: Mapping[str, int],
    threads: int,
) -> PartRecord | FloatPart:
    """The numbers of a part with what its program and its float model were measured to take.

    Args:
        numbers: Of `kept_part`.
        costs: The part in the summary of the export.
        files: Bytes of its files.
        threads: Of torch.
    """
    calls, times, peaks = costs["calls_per_step"], costs["milliseconds"], costs["peak_memory_bytes"]
    update: dict[str, Any] = {"calls_per_step": calls, "files": dict(files)}
    missing = dict(numbers.missing)
    if times is None:
        missing |= {"speed": _UNMEASURED}
    else:
        runs = max(1, calls)
        update["milliseconds"] = runs * times["program"]
        update["float_milliseconds"] = runs * times["float"]
        update["threads"] = threads
        update["peak_bytes"], update["float_peak_bytes"] = peaks["program"], peaks["float"]
        if peaks["program"] is None:
            missing["memory"] = "this system does not tell peaks (no /proc)"
    return numbers.model_copy(update={**update, "missing": missing})
