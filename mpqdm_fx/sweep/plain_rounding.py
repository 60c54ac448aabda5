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

__all__ = ["plain_activations", "plain_weights"]

_NUMBERS = 1 << 22  # of a weight, rounded at once


def plain_weights(graph_module: fx.GraphModule, plans: Iterable[LayerPlan]) -> fx.GraphModule:
    """Round every weight to the nearest of the uniform levels up to its row's largest.

    Args:
        graph_module: Normalized float graph; it is not changed.
        plans: Bits of the layers; their kind of levels does not matter.

    Returns:
        The rounded graph.
    """
    rounded = copy_graph_module(graph_module)
    layers = weight_layers(graph_module, embeddings=True)
    for plan in plans:
        module = layers[plan.name].module
        codes, scale = _nearest(layers[plan.name].weight.detach(), plan.bits_tensor())
        replace_module(rounded, plan.name, install_codes(module, codes.reshape(plan.shape), scale))
    return rounded


def _nearest(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of all rows, of so many at once: a table can be a large model's."""
    codes, scales, first = [], [], 0
    for block in row_blocks(weight, _NUMBERS):
        rows, widths = block.flatten(1).float(), bits[first : first + len(block)]
        levels = RowLevels(bits=widths, scale=torch.ones(len(rows)), tables=None).unclipped(rows)
        codes.append(levels.snap(rows).to(torch.int8))
        scales.append(levels.scale)
        first += len(rows)
    return torch.cat(codes), torch.cat(scales)


def plain_activations(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    settings: MPQConfig,
    shards: Shards,
    skipped: Collection[str] = (),
) -> dict[str, Activation]:
    """Quantize every input but that of the ends: dynamic, or static from smallest to largest value.

    Args:
        graph_module: Normalized float graph.
        calls: Calibration calls of this process.
        settings: Mode and widths.
        shards: Which calls are here.
        skipped: Layers that stay in float.

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
    if mode in ("dynamic", "measured"):
        return {name: DynamicActivation(bits=width) for name, width in bits.items()}
    extremes = _extremes(graph_module, calls, shards)
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


def _extremes(
    graph_module: fx.GraphModule, calls: Sequence[Mapping[str, Any]], shards: Shards
) -> dict[tuple[str, str], tuple[float, float]]:
    """Smallest and largest value that each layer reads and writes."""
    layer_of = {n: name for name, layer in weight_layers(graph_module).items() for n in layer.nodes}
    extremes: dict[tuple[str, str], tuple[float, float]] = {}
    walk = Walk(graph_module, calls, progress="plain rounding" if shards.rank == 0 else None)

    def add(key: tuple[str, str], values: Iterable[Tensor]) -> None:
        for low, high in shards.gather([tuple(map(float, torch.aminmax(v))) for v in values]):
            least, most = extremes.get(key, (low, high))
            extremes[key] = (min(least, low), max(most, high))

    written: fx.Node | None = None
    for node in walk:
        if written is not None and written in walk.alive:
            add((layer_of[written], "output"), walk.values(written))
        written = None
        if node in layer_of:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            add((layer_of[node], "input"), walk.values(source))
            written = node
    return extremes
