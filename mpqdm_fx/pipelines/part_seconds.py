"""About how long the parts of an export take, by what is known before any of them is traced."""

from collections.abc import Mapping

from mpqdm_fx.graph.layers import WEIGHT_LAYERS
from mpqdm_fx.model.feasibility import weights_of
from mpqdm_fx.pipelines.parts import Part

__all__ = ["lower_seconds", "part_stages"]

# Seconds of one core, measured on UNets of 0.1 and 860 M parameters: export, partitioning, writing.
_LOWER_LAYER = 0.9  # norms and attention between two layers included
_LOWER_WEIGHT = 3e-7
# The same of quantizing what runs in every step, which has many calls, and the rest.
_STEPPED = (0.4, 2e-6)
_ONCE = (0.3, 5e-7)
#: Parts of that; the sweep foretells its own stages anew when it has the graph and the calls.
_SHARES: Mapping[str, float] = {
    "float model's runs": 0.1,
    "tracing": 0.05,
    "recording calls": 0.05,
    "channels": 0.02,
    "ranges": 0.08,
    "sensitivities": 0.15,
    "rounding errors": 0.15,
    "rounding": 0.35,
    "judging": 0.05,
}


def lower_seconds(layers: int, weights: int) -> float:
    """Seconds of lowering a graph once.

    Args:
        layers: Its weight layers.
        weights: Their weights.
    """
    return layers * _LOWER_LAYER + weights * _LOWER_WEIGHT


def part_stages(part: Part, *, sizes: int, is_quantized: bool) -> dict[str, float]:
    """Seconds of one part by stage, in running order; stages that do not come are among them.

    Args:
        part: The part.
        sizes: Sizes of pictures that there are programs for.
        is_quantized: Whether it is quantized.
    """
    weights = weights_of(part.module)
    layers = sum(isinstance(module, WEIGHT_LAYERS) for module in part.module.modules())
    stages = {}
    if is_quantized:
        a_layer, a_weight = _STEPPED if part.stepped else _ONCE
        whole = layers * a_layer + weights * a_weight
        stages = {name: share * whole for name, share in _SHARES.items()}
    methods = sizes if part.sized else 1
    return stages | {"lowering": methods * lower_seconds(layers, weights)}
