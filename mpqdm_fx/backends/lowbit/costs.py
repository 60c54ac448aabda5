"""How long own kernels take beside XNNPACK's, by class of CPU: a table of measurements.

Measured with ranges that are chosen at run time. Layers with fixed ranges were not measured: they
are taken to cost the same.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpqdm_fx.backends.names import CPUS, Cpu
from mpqdm_fx.errors import ConfigError

__all__ = ["CPUS", "Cpu", "Point", "check_cpu", "relative_time"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured shape.

    Attributes:
        kernel: 3 for 3x3 convolutions; 1 for linear layers and 1x1 convolutions.
        channels: Input channels.
        rows: Positions that the weights meet.
        time: By bits a weight, own time over XNNPACK's.
    """

    kernel: int
    channels: int
    rows: int
    time: Mapping[int, float]

    def time_at(self, bits: int) -> float:
        """Time at a width: between two measured ones on a straight line, else of the nearest."""
        below = max((width for width in self.time if width <= bits), default=min(self.time))
        above = min((width for width in self.time if width >= bits), default=max(self.time))
        share = (bits - below) / (above - below) if above > below else 0.0
        return self.time[below] * (1 - share) + self.time[above] * share


def check_cpu(cpu: str) -> None:
    """Refuse a class of CPUs that the table does not have.

    Raises:
        ConfigError: It has none of that name.
    """
    if cpu not in CPUS:
        raise ConfigError(f"cpu={cpu!r}: choose one of {', '.join(map(repr, CPUS))}")


def relative_time(
    cpu: Cpu, *, kernel: int, channels: int, rows: int, widths: Sequence[int]
) -> float:
    """Time of a layer in own kernels over its time in XNNPACK's.

    The nearest measured shape answers, by the ratios of channels and rows.

    Args:
        cpu: Class of CPUs.
        kernel: Height and width of the kernel; 1 for a linear layer.
        channels: Input channels.
        rows: Positions that the weights meet: output pixels or tokens, of the whole batch.
        widths: Bits of each block of weights.

    Returns:
        Below 1 where own kernels are faster.
    """

    def distance(point: Point) -> float:
        return math.hypot(math.log(point.channels / channels), math.log(point.rows / rows))

    points = [point for point in _table()[cpu] if point.kernel == kernel]
    nearest = min(points, key=distance)
    return sum(nearest.time_at(bits) for bits in widths) / len(widths)


@functools.cache
def _table() -> Mapping[Cpu, tuple[Point, ...]]:
    text = Path(__file__).with_name("costs.json").read_text(encoding="utf-8")
    cpus = json.loads(text)["cpus"]
    return {cpu: tuple(_point(entry) for entry in cpus[cpu]["points"]) for cpu in CPUS}


def _point(entry: Mapping[str, object]) -> Point:
    numbers = {name: entry[name] for name in ("kernel", "channels", "rows")}
    time = entry["time"]
    assert isinstance(time, dict)
    return Point(time={int(bits): float(value) for bits, value in time.items()}, **numbers)  # type: ignore[arg-type]
