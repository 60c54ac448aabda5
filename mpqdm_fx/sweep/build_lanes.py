"""The graph that a sweep walks: quantizers whose ranges are still to be found, and two lanes."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx

from mpqdm_fx.bits.pinning import ends_in_float
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.quantize.carry_error_lane import CarryErrorLane
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import Activation, NoiseLevels, placeholder_activations
from mpqdm_fx.records.config import ActivationMode, MPQConfig
from mpqdm_fx.records.report import ActivationChoice

__all__ = ["range_groups", "two_lanes"]


def two_lanes(
    graph_module: fx.GraphModule,
    noise_levels: Sequence[Tensor | None],
    settings: MPQConfig,
    skipped: Collection[str] = (),
    choices: Sequence[ActivationChoice] = (),
) -> tuple[fx.GraphModule, NoiseLevels | None]:
    """The graph that the sweep walks: quantizers with unknown ranges, and the error's lane.

    Args:
        graph_module: Normalized graph.
        noise_levels: Those of the calibration calls (`noise_levels_of`), to be parted in groups.
        settings: The run's settings.
        skipped: Layers that stay in float, activations included.
        choices: Kind and width of each layer's activation; none for those of the settings.

    Returns:
        Graph of two lanes, before anything is rounded, and the groups of noise levels.

    Raises:
        CalibrationError: Ranges by noise level, and the model is told none.
    """
    levels = range_groups(graph_module, noise_levels, settings)
    mode = settings.activation_mode
    quantized: fx.GraphModule = graph_module
    if mode != "float":
        inputs = _chosen(choices) or _inputs_by_mode(graph_module, settings)
        ranges: dict[str, Activation] = {}
        for kind in {kind for kind, _ in inputs.values()} - {"float"}:
            widths = {
                name: inputs[name][1]
                for name in weight_layers(graph_module)
                if name not in skipped and name in inputs and inputs[name][0] == kind
            }
            ranges |= placeholder_activations(
                widths,
                kind,
                groups=levels.count if levels else 1,
                fitted=settings.fits_activation_levels,
            )
        quantized = QuantizeActivations(ranges=ranges, noise_levels=levels)(
            graph_module
        ).graph_module
    return CarryErrorLane()(quantized).graph_module, levels


def range_groups(
    graph_module: fx.GraphModule, noise_levels: Sequence[Tensor | None], settings: MPQConfig
) -> NoiseLevels | None:
    """Groups of noise levels that have ranges of their own; None where the mode has none.

    Args:
        graph_module: Normalized graph.
        noise_levels: Those of the calibration calls (`noise_levels_of`).
        settings: Mode and number of groups.

    Raises:
        CalibrationError: Ranges by noise level, and the model is told none.
    """
    if settings.activation_mode != "timestep":
        return None
    values = [level.flatten() for level in noise_levels if level is not None]
    if not values:
        arguments = [str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")]
        raise CalibrationError(
            f"activation_mode='timestep' needs a model that is told each sample's noise level "
            f"(`timestep`, `sigma`, ...), and this one takes ({', '.join(arguments)}); name "
            f"the argument with noise_argument=, or use 'static' or 'dynamic'"
        )
    return NoiseLevels.of(
        torch.cat(values), settings.timestep_groups, argument=settings.noise_argument
    )


def _chosen(choices: Sequence[ActivationChoice]) -> dict[str, tuple[ActivationMode, int]]:
    """Kind and width by layer."""
    return {name: (choice.kind, choice.bits) for choice in choices for name in choice.layers}


def _inputs_by_mode(
    graph_module: fx.GraphModule, settings: MPQConfig
) -> dict[str, tuple[ActivationMode, int]]:
    """One mode for all layers but the ends; where it is to be measured, what it will mostly be."""
    mode = settings.activation_mode
    ends = ends_in_float(graph_module, mode)
    mode = "dynamic" if mode == "measured" else mode
    return {
        name: ("float" if name in ends else mode, settings.activation_bits_of(name))
        for name in weight_layers(graph_module)
    }
