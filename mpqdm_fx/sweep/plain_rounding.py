"""What a few lines of PyTorch would do: nearest rounding with scales that clip nothing.

It is what every recipe is compared with at the model's output, so it takes nothing from them: the
graph before channels are scaled, biases as they are, every input quantized with the range of what
was seen.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.bits.pinning import ends_in_float
from mpqdm_fx.graph.editing import copy_graph_module, replace_module
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.activations.ranges import affine_qparams
from mpqdm_fx.numerics.lazy_tensor import row_blocks
from mpqdm_fx.numerics.levels.int4 import INT4_BITS, nearest_int4
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.activations import (
    OUTPUT_BITS,
    Activation,
    ActivationRange,
    DynamicActivation,
    StaticActivation,
)
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.run.walk import Walk
from mpqdm_fx.sweep.shards import Shards

__all__ = ["Extremes", "plain_activations", "plain_weights", "reads_extremes"]

_NUMBERS = 1 << 22  # of a weight, rounded at once


def plain_weights(
    graph_module: fx.GraphModule, plans: Iterable[LayerPlan], *, lazy: bool = False
) -> fx.GraphModule:
    """Round every weight to the nearest of the levels that reach to its row's largest.

    Levels are uniform, or -8..7 where a plan has `"int4"`, which decides how a program stores them.

    Args:
        graph_module: Normalized float graph; it is not changed.
        plans: Bits of the layers; fitted levels become uniform ones.
        lazy: Hold codes, and compute float32 weights when they are read: for a graph that is run
            a few times beside others.

    Returns:
        The rounded graph.
    """
    rounded = copy_graph_module(graph_module)
    layers = weight_layers(graph_module, embeddings=True)
    for plan in plans:
        module = layers[plan.name].module
        codes, scale = _nearest(layers[plan.name].weight.detach(), plan)
        layer = install_codes(module, codes.reshape(plan.shape), scale, lazy=lazy)
        replace_module(rounded, plan.name, layer)
    return rounded


def _nearest(weight: Tensor, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """Codes and scales of all rows, of so many at once: a table can be a large model's."""
    codes, scales, first, bits = [], [], 0, plan.bits_tensor()
    for block in row_blocks(weight, _NUMBERS):
        rows, widths = block.flatten(1).float(), bits[first : first + len(block)]
        levels = RowLevels(bits=widths, scale=torch.ones(len(rows)), tables=None).unclipped(rows)
        nearest, scale = levels.snap(rows), levels.scale
        if plan.levels == "int4":
            four = (widths == INT4_BITS).nonzero()[:, 0]
            nearest[four], scale[four] = nearest_int4(rows[four])
        codes.append(nearest.to(torch.int8))
        scales.append(scale)
        first += len(rows)
    return torch.cat(codes), torch.cat(scales)


def reads_extremes(settings: MPQConfig) -> bool:
    """Whether plain ranges are fixed, from the smallest to the largest value."""
    return settings.activation_mode not in ("float", "dynamic", "measured")


def plain_activations(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    settings: MPQConfig,
    shards: Shards,
    skipped: Collection[str] = (),
    seen: "Extremes | None" = None,
) -> dict[str, Activation]:
    """Quantize every input but that of the ends: dynamic, or static from smallest to largest value.

    Args:
        graph_module: Normalized float graph.
        calls: Calibration calls of this process.
        settings: Mode and widths.
        shards: Which calls are here.
        skipped: Layers that stay in float.
        seen: What a walk over these calls has seen; None to walk here.

    Returns:
        Activation by layer.
    """
    mode = settings.activation_mode
    if mode == "float":
        return {}
    in_float = {*ends_in_float(graph_module, mode), *skipped}
    bits = {
        name: settings.activation_bits_of(name)
        for name in weight_layers(graph_module)
        if name not in in_float
    }
    if not reads_extremes(settings):
        return {name: DynamicActivation(bits=width) for name, width in bits.items()}
    if seen is None:
        seen = Extremes(graph_module)
        walk = Walk(graph_module, calls, progress="plain rounding" if shards.rank == 0 else None)
        for node in walk:
            seen.see(walk, node)
    extremes = seen.of_all_calls(shards)
    return {
        name: StaticActivation(
            input=_range(extremes[name, "input"], width),
            output=_range(extremes[name, "output"], OUTPUT_BITS),
        )
        for name, width in bits.items()
    }


def _range(extremes: tuple[float, float], bits: int) -> ActivationRange:
    scale, zero_point = affine_qparams(*extremes, bits)
    return ActivationRange(scale=scale, zero_point=zero_point, bits=bits)


class Extremes:
    """Smallest and largest value that each layer reads and writes, by the way of a walk.

    Args:
        graph_module: Normalized float graph; what is walked over has its nodes, by their names.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._wanted: dict[str, set[tuple[str, str]]] = {}
        for name, layer in weight_layers(graph_module).items():
            for call in layer.nodes:
                source = call.args[0]
                assert isinstance(source, fx.Node)
                self._wanted.setdefault(source.name, set()).add((name, "input"))
                self._wanted.setdefault(call.name, set()).add((name, "output"))
        self._calls: list[dict[tuple[str, str], tuple[float, float]]] = []
        self._last: fx.Node | None = None

    def see(self, walk: Walk, node: fx.Node) -> None:
        """Look at what was written last, before the walk executes the next node."""
        last, self._last = self._last, node
        if last is not None and last.name in self._wanted and last in walk.alive:
            self._add(self._wanted[last.name], walk.values(last))

    def _add(self, keys: Collection[tuple[str, str]], values: Iterable[Tensor]) -> None:
        for index, value in enumerate(values):
            if index == len(self._calls):
                self._calls.append({})
            low, high = map(float, torch.aminmax(value))
            for key in keys:
                least, most = self._calls[index].get(key, (low, high))
                self._calls[index][key] = (min(least, low), max(most, high))

    def of_all_calls(self, shards: Shards) -> dict[tuple[str, str], tuple[float, float]]:
        """Smallest and largest value by layer and side, "input" or "output".

        Args:
            shards: Which calls were walked over here.
        """
        calls = shards.gather(self._calls)
        return {
            key: (min(call[key][0] for call in calls), max(call[key][1] for call in calls))
            for key in calls[0]
        }
