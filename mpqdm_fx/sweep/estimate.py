"""Time, memory and disk of a sweep, told before it starts."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from mpqdm_fx.calibration.allocate import layer_limits
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.graph.cost import bind_sizes, node_cost, walk_memory
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.graph.quantizer_sites import quantizer_sites
from mpqdm_fx.numerics.gram import kept_rows
from mpqdm_fx.numerics.propagation import DAMPINGS
from mpqdm_fx.sweep.sweep import two_lanes

__all__ = ["Estimate", "estimate"]

_COLUMN = 6e-5  # seconds of interpreter and small kernels for one column of one rounding
_RANGE = 0.05  # seconds to search the range of one activation
_SEARCH = 60  # passes over the weights that fitting one level set takes, in units of 1e9 numbers/s
_BACKWARD = 2  # times the work of a forward run
_PROBES = 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a sweep is expected to take on this machine.

    Attributes:
        layers: Weight layers.
        weights: Their weights.
        calls: Calibration calls.
        forward_seconds: Both lanes, all calls.
        solve_seconds: Statistics, corrections and roundings.
        sensitivity_seconds: Jacobian probes and error tables of `allocation="measured"`.
        peak_bytes: Model, rounded copy, activations and the largest layer's statistics.
        activation_bytes: Of that, activations of all calls.
        smallest_limit: The smallest `max_memory` that activations can do with.
        disk_bytes: Solved layers of a resumable run, and activations beyond `max_memory`.
    """

    layers: int
    weights: int
    calls: int
    forward_seconds: float
    solve_seconds: float
    sensitivity_seconds: float
    peak_bytes: int
    activation_bytes: int
    smallest_limit: int
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.forward_seconds + self.solve_seconds + self.sensitivity_seconds

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types."""
        return {**asdict(self), "seconds": self.seconds}


def estimate(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    settings: MPQConfig,
    *,
    max_memory: int | None = None,
    half: bool = False,
) -> Estimate:
    """Estimate a sweep without running it; takes a second to measure this machine.

    Args:
        graph_module: Normalized graph.
        calls: Calibration calls; their values do not matter.
        settings: The run's settings.
        max_memory: Bytes of activations held in memory.
        half: Hold activations as float16.
    """
    flops, bandwidth = _speed()
    timesteps = [call.get("timestep") for call in calls]
    lanes, _ = two_lanes(graph_module, timesteps, settings)
    sizes = bind_sizes(graph_module, calls[0])
    macs = {node: node_cost(graph_module, node, sizes) for node in graph_module.graph.nodes}
    forward = 2 * sum(macs.values()) * len(calls) / flops
    peak, smallest = walk_memory(lanes, calls, half=half)
    held = peak if max_memory is None else min(peak, max_memory)
    skipped = layer_limits(graph_module, settings).skipped
    layers = {
        name: layer for name, layer in weight_layers(graph_module).items() if name not in skipped
    }
    seconds, gains, largest = 0.0, 0.0, 0
    for layer in layers.values():
        positions = macs[layer.nodes[0]] // max(1, layer.weight.numel()) * len(calls)
        work, columns, size = _layer_work(layer, positions, settings)
        seconds += work / flops + columns * _COLUMN
        gains += work / flops / 4 + columns * _COLUMN / 4  # a few channels, at all widths
        seconds += layer.weight.numel() * _SEARCH / bandwidth * _candidates(settings)
        largest = max(largest, size)
    seconds += len(quantizer_sites(lanes)) * _RANGE * _ranges(settings)
    weights = sum(layer.weight.numel() for layer in layers.values())
    sensitivity = 0.0
    if settings.allocation == "measured":
        sensitivity = forward * (0.5 + _PROBES * (1 + _BACKWARD) / 2)
        sensitivity += 8 * weights * _SEARCH / bandwidth + gains
    parameters = sum(t.numel() * t.element_size() for t in graph_module.state_dict().values())
    return Estimate(
        layers=len(layers),
        weights=weights,
        calls=len(calls),
        forward_seconds=forward,
        solve_seconds=seconds,
        sensitivity_seconds=sensitivity,
        peak_bytes=2 * parameters + weights + held + largest,
        activation_bytes=held,
        smallest_limit=smallest,
        disk_bytes=weights + max(0, peak - held),
    )


def _ranges(settings: MPQConfig) -> int:
    counts = {"static": 1, "timestep": settings.timestep_groups}
    return counts.get(settings.activation_mode, 0)


def _candidates(settings: MPQConfig) -> int:
    return 3 if settings.propagation == "auto" else 1


def _layer_work(layer: WeightLayer, positions: int, settings: MPQConfig) -> tuple[float, int, int]:
    """Multiply-adds, columns that are rounded, and bytes at the peak of one layer's solution."""
    channels = layer.weight.shape[0]
    width = layer.weight.numel() // channels
    groups = int(getattr(layer.module, "groups", 1))
    rows = max(1, kept_rows(width, positions, settings.max_rows))
    rounds = _candidates(settings)
    rounds += settings.refinements if settings.rounding == "gptq" else 0
    solves = len(DAMPINGS) if settings.propagation == "auto" else 1
    side = min(width, rows)
    if width <= rows:
        moments = rows * width**2 + (1 + solves) * side**3 // 3
        per_rounding = channels // groups * width**2
        size = 4 * 8 * width**2
    else:
        blocks = math.ceil(width / max(128, rows // 4))
        moments = rows**2 * width * (1 + solves) + solves * side**3 // 3
        per_rounding = channels // groups * width * rows * 2 + blocks * side**3 // 3
        size = 3 * 8 * rows**2 + 3 * 8 * rows * width
    work: float = groups * (moments + rounds * per_rounding)
    work += 3 * rows * width * channels * solves
    columns = groups * width * rounds if settings.rounding == "gptq" else 0
    return work, columns, size + 3 * 4 * rows * width * groups + 6 * 8 * channels * width


def _speed() -> tuple[float, float]:
    """Multiply-adds a second of a matrix product, and numbers a second of a plain sum."""
    a = torch.randn(1024, 1024)
    best, copy = math.inf, math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        middle = time.perf_counter()
        (a + a).sum()
        best, copy = min(best, middle - start), min(copy, time.perf_counter() - middle)
    return 1024**3 / best, 2 * 1024**2 / copy
