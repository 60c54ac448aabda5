"""Time, memory and disk of a sweep, told before it starts."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from mpqdm_fx.bits.activation_choice import options_of
from mpqdm_fx.bits.allocate import layer_limits
from mpqdm_fx.bits.parted_probe import backward_bytes
from mpqdm_fx.bits.probes import PROBES
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.graph.quantizer_sites import quantizer_sites
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.validation import Bytes, checked
from mpqdm_fx.run.cost import bind_sizes, node_cost, walk_memory
from mpqdm_fx.sweep.build_lanes import two_lanes
from mpqdm_fx.sweep.layer_work import layer_work

__all__ = ["Estimate", "estimate", "row_seconds", "stage_seconds"]

_COLUMN = 8e-5  # seconds of interpreter and small kernels for one column of one rounding
_RANGE = 0.05  # seconds to search the range of one activation
_TABLE = 0.08  # seconds of interpreter and small kernels for the error table of one layer
_ERRORS = 120  # times that measuring rounding errors at all widths goes over a layer's weights
_BACKWARD = 2  # times the work of a forward run
_JUDGED = 0.5  # two ways to round, on a quarter of the calls
# Convolutions, factorisations and tall products against one square product in the cache, and passes
# over a large layer against a sum in the cache; fitted to the 310 layers of an 860 M UNet.
_PRODUCT_SHARE = 0.5
_PASS_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a sweep is expected to take on this machine.

    Attributes:
        layers: Weight layers.
        weights: Their weights.
        calls: Calibration calls.
        forward_seconds: Both lanes, all calls, and the comparison with plain rounding.
        solve_seconds: Statistics, corrections and roundings.
        sensitivity_seconds: Jacobian probes, error tables of `allocation="measured"`, and what is
            measured to choose how inputs are quantized.
        row_seconds: One row through the float model.
        peak_bytes: Model, rounded copy, activations and the largest layer's statistics; or model
            and what backward passes hold.
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
    row_seconds: float
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


@checked
def estimate(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    settings: MPQConfig,
    *,
    max_memory: Bytes | None = None,
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
    # as many noise levels as asked for: what the calls hold does not matter
    levels = [torch.arange(settings.timestep_groups)]
    has_level = find_noise_argument(graph_module, settings.noise_argument) is not None
    skipped = layer_limits(graph_module, settings).skipped
    lanes, _ = two_lanes(graph_module, levels if has_level else [], settings, skipped)
    sizes = bind_sizes(graph_module, calls[0])
    macs = {node: node_cost(graph_module, node, sizes) for node in graph_module.graph.nodes}
    forward = 2 * sum(macs.values()) * len(calls) / flops
    peak, smallest = walk_memory(lanes, calls, half=half)
    held = peak if max_memory is None else min(peak, max_memory)
    layers = {
        name: layer for name, layer in weight_layers(graph_module).items() if name not in skipped
    }
    seconds, gains, largest = 0.0, 0.0, 0
    for layer in layers.values():
        positions = macs[layer.nodes[0]] // max(1, layer.weight.numel()) * len(calls)
        work = layer_work(layer, positions, settings)
        rounding = work.products / flops + work.columns * _COLUMN
        seconds += rounding + work.numbers / bandwidth
        gains += rounding / 8  # a few channels, at all widths
        largest = max(largest, work.bytes)
    seconds += len(quantizer_sites(lanes)) * _RANGE * _ranges(settings)
    weights = sum(layer.weight.numel() for layer in layers.values())
    one_lane = forward / 2
    sensitivity = 0.0
    if settings.allocation == "measured":
        tables = weights * _ERRORS / bandwidth + len(layers) * _TABLE
        sensitivity = one_lane + tables + gains
    options = options_of(settings)
    by_level = has_level and settings.row_weights == "output"
    probed = 0
    if options or settings.allocation == "measured" or by_level:
        sensitivity += one_lane * PROBES * (1 + _BACKWARD)
        probed = backward_bytes(graph_module, calls[0])
    if options:  # sizes of channels, with static ranges if they are wanted
        sensitivity += one_lane
    if settings.judge:
        forward += one_lane * (_JUDGED + (settings.activation_mode == "static"))
    parameters = sum(t.numel() * t.element_size() for t in graph_module.state_dict().values())
    return Estimate(
        layers=len(layers),
        weights=weights,
        calls=len(calls),
        forward_seconds=forward,
        solve_seconds=seconds,
        sensitivity_seconds=sensitivity,
        row_seconds=one_lane / len(calls) / batch_size_of(calls[0]),
        peak_bytes=parameters + max(parameters + weights + held + largest, probed),
        activation_bytes=held,
        smallest_limit=smallest,
        disk_bytes=weights + max(0, peak - held),
    )


def row_seconds(graph_module: fx.GraphModule, call: Mapping[str, Any]) -> float:
    """Seconds that a graph takes for one row of a call, told by its multiply-adds."""
    sizes = bind_sizes(graph_module, call)
    macs = sum(node_cost(graph_module, node, sizes) for node in graph_module.graph.nodes)
    return macs / _speed()[0] / batch_size_of(call)


def stage_seconds(forecast: Estimate, settings: MPQConfig) -> dict[str, float]:
    """Seconds by stage of a sweep, as progress names them.

    Args:
        forecast: The estimate.
        settings: The run's settings.
    """
    shares = {"channels": 2.0, "ranges": 6.0, "sensitivities": 11.0, "rounding errors": 19.0}
    if settings.allocation != "measured":
        del shares["rounding errors"]
    fixed = any(option.is_fixed for option in options_of(settings))
    del shares["channels" if fixed else "ranges"]  # one walk finds both
    part = forecast.sensitivity_seconds / sum(shares.values())
    judging = 0.2 * forecast.forward_seconds if settings.judge else 0.0
    return {
        **{name: part * share for name, share in shares.items()},
        "rounding": forecast.forward_seconds + forecast.solve_seconds - judging,
        "judging": judging,
    }


def _ranges(settings: MPQConfig) -> int:
    counts = {"static": 1, "timestep": settings.timestep_groups}
    return counts.get(settings.activation_mode, 0)


def _speed() -> tuple[float, float]:
    """Multiply-adds a second of the kernels that a sweep runs, and numbers of its plain passes."""
    a = torch.randn(1024, 1024)
    best, copy = math.inf, math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        middle = time.perf_counter()
        (a + a).sum()
        best, copy = min(best, middle - start), min(copy, time.perf_counter() - middle)
    return _PRODUCT_SHARE * 1024**3 / best, _PASS_SHARE * 2 * 1024**2 / copy
