"""The graph that a sweep walks: quantizers whose ranges are still to be found, and two lanes."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from mpqdm_fx.bits.activation_choice import ends_in_float
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.quantize.carry_error_lane import CarryErrorLane
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import Activation, NoiseLevels, placeholder_activations
from mpqdm_fx.records.config import ActivationMode, MPQConfig

__all__ = ["two_lanes"]


def two_lanes(
    graph_module: fx.GraphModule,
    noise_levels: Sequence[Tensor | None],
    settings: MPQConfig,
    skipped: Collection[str] = (),
    chosen: Mapping[str, ActivationMode] | None = None,
) -> tuple[fx.GraphModule, NoiseLevels | None]:
    """The graph that the sweep walks: quantizers with unknown ranges, and the error's lane.

    Args:
        graph_module: Normalized graph.
        noise_levels: Those of the calibration calls (`noise_levels_of`), to be parted in groups.
        settings: The run's settings.
        skipped: Layers that stay in float, activations included.
        chosen: Kind of each layer's activation; None for the settings' mode.

    Returns:
        Graph of two lanes, before anything is rounded, and the groups of noise levels.

    Raises:
        CalibrationError: Ranges by noise level, and the model is told none.
    """
    levels = None
    mode = settings.activation_mode
    if mode == "timestep":
        values = [level.flatten() for level in noise_levels if level is not None]
        if not values:
            arguments = [str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")]
            raise CalibrationError(
                f"activation_mode='timestep' needs a model that is told each sample's noise level "
                f"(`timestep`, `sigma`, ...), and this one takes ({', '.join(arguments)}); name "
                f"the argument with noise_argument=, or use 'static' or 'dynamic'"
            )
        levels = NoiseLevels.of(
            torch.cat(values), settings.timestep_groups, argument=settings.noise_argument
        )
    quantized: fx.GraphModule = graph_module
    if mode != "float":
        kinds = chosen or _kinds_by_mode(graph_module, mode)
        ranges: dict[str, Activation] = {}
        for kind in {*kinds.values()} - {"float"}:
            widths = {
                name: settings.activation_bits_of(name)
                for name in weight_layers(graph_module)
                if name not in skipped and kinds.get(name) == kind
            }
            ranges |= placeholder_activations(widths, kind, groups=levels.count if levels else 1)
        quantized = QuantizeActivations(ranges=ranges, noise_levels=levels)(
            graph_module
        ).graph_module
    return CarryErrorLane()(quantized).graph_module, levels


def _kinds_by_mode(graph_module: fx.GraphModule, mode: ActivationMode) -> dict[str, ActivationMode]:
    """One mode for all layers but the ends; where it is to be measured, what it will mostly be."""
    ends = ends_in_float(graph_module, mode)
    mode = "dynamic" if mode == "measured" else mode
    return {name: "float" if name in ends else mode for name in weight_layers(graph_module)}
