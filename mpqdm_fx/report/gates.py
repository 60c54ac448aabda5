"""Gates: what a model must measure, written as `x0_sqnr>=20`, and every metric they can name.

A gate is a metric, a comparison and a bound: `x0_sqnr>=20`, `ms<=40`, `bytes<=2MB`. The comparison
goes the metric's own way, so that a gate never asks for worse numbers; a bound without a unit is in
the metric's own.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mpqdm_fx.errors import ConfigError

__all__ = [
    "METRICS",
    "Gate",
    "Metric",
    "Source",
    "Verdict",
    "catalogue",
    "check_measured",
    "expected_summary",
    "judge",
    "parse_gate",
    "parse_gates",
    "summary_metrics",
]

Source = Literal["evaluation", "summary"]
"""Where a metric comes from: `evaluate` measures it, or `summary.json` holds it."""

#: By unit of a metric, the units that can be written and how many of the metric's they are.
_UNITS: Mapping[str, Mapping[str, float]] = {
    "dB": {"dB": 1},
    "ms": {"ms": 1, "s": 1e3},
    "s": {"s": 1, "min": 60, "h": 3600},
    "bytes": {
        "bytes": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9,
        "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
    },
    "share": {"%": 0.01},
    "bits": {"bits": 1},
    "times": {"x": 1},
    "": {},
}  # fmt: skip

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number that can be asked for.

    Attributes:
        name: As a gate writes it.
        unit: Its own unit; "" for a plain number.
        higher_is_better: Its direction.
        meaning: One line.
        source: Where it comes from.
    """

    name: str
    unit: str
    higher_is_better: bool
    meaning: str
    source: Source


def _metrics() -> Iterable[Metric]:
    for name, unit, direction, source, meaning in (
        ("epsilon_sqnr", "dB", "up", "evaluation", "one call against float, same inputs"),
        ("x0_sqnr", "dB", "up", "evaluation", "samples against float, same noise"),
        ("x0_median_sqnr", "dB", "up", "evaluation", "the sample in the middle, same noise"),
        ("psnr", "dB", "up", "evaluation", "these samples as pictures, latents decoded"),
        ("ssim", "", "up", "evaluation", "likeness of these pictures, up to 1"),
        ("accuracy", "share", "up", "evaluation", "samples that show their class (digits)"),
        ("frechet_distance", "", "down", "evaluation", "FD of a classifier's features (digits)"),
        ("kernel_distance", "", "down", "evaluation", "KID of the same features (digits)"),
        ("inception_distance", "", "down", "evaluation", "FID, with --inception PATH"),
        ("inception_kernel_distance", "", "down", "evaluation", "KID, with --inception PATH"),
        ("lpips", "", "down", "evaluation", "perceptual distance, with --lpips PATH"),
        ("clip_score", "", "up", "evaluation", "pictures and prompts, with --clip PATH"),
        ("backend_sqnr", "dB", "up", "summary", "as epsilon_sqnr, of what the backend runs"),
        ("bytes", "bytes", "down", "summary", "program and its weights; else packed ones"),
        ("parameter_bytes", "bytes", "down", "summary", "codes, scales, tables, what is float"),
        ("effective_bits", "bits", "down", "summary", "stored bits a weight, all overhead"),
        ("ms", "ms", "down", "summary", "one call of the backend, batch 1"),
        ("speedup", "times", "up", "summary", "ms of the float model (eager) over ms"),
        ("peak_memory", "bytes", "down", "summary", "peak of loading and one call"),
        ("program_sqnr", "dB", "up", "summary", "program against the graph it was made of"),
        ("subgraphs", "", "down", "summary", "parts of the program that XNNPACK runs"),
        ("seconds", "s", "down", "summary", "wall time of quantizing"),
    ):
        yield Metric(
            name=name,
            unit=unit,
            higher_is_better=direction == "up",
            meaning=meaning,
            source=source,  # type: ignore[arg-type]
        )


METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _metrics()}
"""Every metric by its name."""


def catalogue(names: Iterable[str] | None = None) -> str:
    """The metrics as text of 80 columns, one a line: name, unit, direction, meaning.

    Args:
        names: The metrics; all by default.
    """
    lines = []
    for name in METRICS if names is None else names:
        metric = METRICS[name]
        sign = ">=" if metric.higher_is_better else "<="
        lines.append(f"  {name:<25} {sign} {metric.unit:<6} {metric.meaning}")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A bound that a metric must keep.

    Attributes:
        metric: Name of the metric.
        comparison: `>=`, `>`, `<=` or `<`.
        bound: In the metric's own unit.
    """

    metric: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        unit = METRICS[self.metric].unit
        number = repr(self.bound).removesuffix(".0")
        return f"{self.metric}{self.comparison}{number}{unit if unit in _UNITS[unit] else ''}"

    def passes(self, value: float) -> bool:
        """Whether a value keeps the bound; NaN does not."""
        return _OPERATORS[self.comparison](value, self.bound)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A gate and what was measured.

    Attributes:
        gate: The gate.
        measured: The metric's value.
    """

    gate: Gate
    measured: float

    @property
    def passed(self) -> bool:
        """Whether the gate was kept."""
        return self.gate.passes(self.measured)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, numbers in the metric's own unit."""
        return {
            "gate": str(self.gate),
            "metric": self.gate.metric,
            "comparison": self.gate.comparison,
            "wanted": self.gate.bound,
            "measured": self.measured,
            "unit": METRICS[self.gate.metric].unit,
            "passed": self.passed,
        }


_GATE = re.compile(
    r"\s*(?P<name>[A-Za-z_]\w*)\s*(?P<sign>[<>]=?)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-z]+|%)?\s*"
)


def parse_gate(text: str, option: str = "--gate") -> Gate:
    """A gate of a text such as `bytes <= 2 MB`.

    Units are read without regard to case: `KB` is `kB`, 1000 bytes, and `KiB` are 1024.

    Args:
        text: What was typed.
        option: Where, for messages.

    Raises:
        ConfigError: It is no gate, or names a metric, direction or unit that is none; says which
            there are.
    """
    match = _GATE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{option} {text!r}: write METRIC>=NUMBER or METRIC<=NUMBER, for example x0_sqnr>=20 "
            f"or bytes<=2MB; metrics: {', '.join(METRICS)}"
        )
    name = match["name"]
    metric = METRICS.get(name)
    if metric is None:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"{option} {text!r}: there is no metric {name}; {hint}metrics: {', '.join(METRICS)}"
        )
    if (match["sign"][0] == ">") != metric.higher_is_better:
        better, sign = ("more", ">=") if metric.higher_is_better else ("less", "<=")
        raise ConfigError(
            f"{option} {text!r}: of {name} {better} is better; write {name}{sign}{match['number']}"
        )
    bound = float(match["number"]) * _factor(match["unit"], metric, f"{option} {text!r}")
    if not math.isfinite(bound):
        raise ConfigError(f"{option} {text!r}: the number is too large")
    return Gate(metric=name, comparison=match["sign"], bound=bound)


def _factor(unit: str | None, metric: Metric, where: str) -> float:
    if unit is None:
        return 1
    units = _UNITS[metric.unit]
    for name, factor in units.items():
        if name.lower() == unit.lower():
            return factor
    known = f"its units: {', '.join(units)}" if units else "it is a plain number"
    raise ConfigError(f"{where}: {metric.name} has no unit {unit}; {known}")


def parse_gates(texts: Iterable[str] | None, option: str = "--gate") -> tuple[Gate, ...]:
    """Gates of what was typed, in that order.

    Args:
        texts: One gate each; None for none.
        option: Where it was typed, for messages.

    Raises:
        ConfigError: As of `parse_gate`.
    """
    return tuple(parse_gate(text, option) for text in texts or ())


def check_measured(
    gates: Iterable[Gate], measured: Collection[str], subject: str, option: str = "--gate"
) -> None:
    """Refuse gates on metrics that will not be measured, before anything is.

    Args:
        gates: The gates.
        measured: Names of the metrics that will be there.
        subject: What is measured, for the message.
        option: Where gates were typed, for the message.

    Raises:
        ConfigError: A metric will not be there.
    """
    for gate in gates:
        if gate.metric not in measured:
            known = ", ".join(name for name in METRICS if name in measured)
            raise ConfigError(
                f"{option} {gate}: {gate.metric} ({METRICS[gate.metric].meaning}) is not measured "
                f"of {subject}; measured are: {known}"
            )


def judge(gates: Iterable[Gate], measured: Mapping[str, float]) -> tuple[Verdict, ...]:
    """Compare gates with what was measured.

    Args:
        gates: The gates.
        measured: Values by metric, each in its own unit.

    Raises:
        ConfigError: A metric was not measured.
    """
    known = tuple(gates)
    check_measured(known, measured.keys(), "this")
    return tuple(Verdict(gate=gate, measured=float(measured[gate.metric])) for gate in known)


def expected_summary(*, program: bool, drawn: bool) -> tuple[str, ...]:
    """Names of the metrics that the summary of a job to come will hold.

    Args:
        program: Whether the job writes one.
        drawn: Whether the source has a scheduler; else no peak of memory is measured.
    """
    without: set[str] = set() if program else {"program_sqnr", "subgraphs"}
    if not drawn:
        without.add("peak_memory")
    names = (metric.name for metric in METRICS.values() if metric.source == "summary")
    return tuple(name for name in names if name not in without)


def summary_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that a folder's summary holds.

    Args:
        summary: Content of `summary.json`.
    """
    backend, times = summary["backend"], summary["milliseconds_per_step"]
    files = summary["files"]
    shipped = [name for name in files if name.startswith(("unet.pte", "unet.ptd"))]
    peak = summary["peak_memory_bytes"]
    metrics: dict[str, float | None] = {
        "backend_sqnr": summary["backend_epsilon_sqnr_db"],
        "bytes": sum(files[name] for name in shipped or ["model.safetensors"]),
        "parameter_bytes": summary["weight_bytes"] + summary["float_remainder_bytes"],
        "effective_bits": summary["effective_bits"],
        "ms": times[backend],
        "speedup": times["float"] / times[backend] if times[backend] > 0 else None,
        "peak_memory": peak.get("pte", peak.get("packed")),
        "seconds": summary["seconds_to_quantize"],
    }
    if program := summary.get("program"):
        metrics |= {"program_sqnr": program["sqnr_db"], "subgraphs": program["subgraphs"]}
    return {name: float(value) for name, value in metrics.items() if value is not None}
