"""Stages that `convert` and `load` share: the same model goes through the same passes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.editing import copy_graph_module, prune, replace_module
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.graph.parameters import first_names
from mpqdm_fx.model.packed import PackedWeights
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.passes import NORMALIZE, SplitSkipConcat
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.passes.quantize.scale_inputs import ScaleInputs, factors_of
from mpqdm_fx.records.config import MPQConfig

__all__ = ["in_form_of", "normalized", "positional_inputs", "restore"]


def normalized(
    model: nn.Module,
    example_inputs: Any,
    settings: MPQConfig,
    *,
    fractional_timesteps: bool = False,
) -> fx.GraphModule:
    """Trace a model and bring it into the form that is quantized.

    Args:
        model: The float model; it is not changed.
        example_inputs: Keyword arguments (dict) or positional arguments (tuple) of one call.
        settings: The run's settings.
        fractional_timesteps: As of `trace`.

    Raises:
        TraceError: The model cannot be traced.
        ConfigError: It takes no argument of the name of the noise level's.
    """
    passes = NORMALIZE
    if not settings.split_skips:
        passes = tuple(entry for entry in passes if not isinstance(entry, SplitSkipConcat))
    traced = trace(model, example_inputs, fractional_timesteps=fractional_timesteps)
    graph_module: fx.GraphModule = Pipeline(passes=passes)(traced).graph_module
    # What the model computes and drops (the last layer of an encoder whose last but one state is
    # taken) is no layer to quantize: passes behind would remove it and leave its range behind. By
    # default torch.fx keeps a dead attention, which could draw random numbers for its dropout.
    if graph_module.graph.eliminate_dead_code(is_impure_node=_has_effect):
        prune(graph_module)
        graph_module.recompile()
    find_noise_argument(graph_module, settings.noise_argument)  # refuses a wrong name
    return graph_module


def in_form_of(quantized: QuantizedModel, model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Trace the float model of a quantized one into the form that was quantized.

    Args:
        quantized: The quantized model.
        model: Its float model; it is not changed.
        example_inputs: As of `normalized`.

    Raises:
        TraceError: The model cannot be traced.
        DialectError: It is another model.
    """
    graph_module = normalized(model, example_inputs, quantized.settings)
    scale = ScaleInputs(factors=factors_of(quantized.rounded))
    result: fx.GraphModule = scale(graph_module).graph_module
    return result


def _has_effect(node: fx.Node) -> bool:
    return node.is_impure(impure_random=False)


def positional_inputs(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Inputs by name in the order in which a graph takes them."""
    nodes = graph_module.graph.find_nodes(op="placeholder")
    return tuple(inputs[str(node.target)] for node in nodes)


def restore(graph_module: fx.GraphModule, weights: PackedWeights) -> fx.GraphModule:
    """Put saved codes and tensors into a normalized graph of the same architecture.

    Args:
        graph_module: Result of `normalized` on a model that nobody else holds: tensors are
            replaced in its modules.
        weights: What the packed file held.

    Raises:
        ArtifactError: The graph has other layers or other shapes than the file.
    """
    restored = copy_graph_module(graph_module)
    for planned in weights.plan.layers:
        try:
            module = restored.get_submodule(planned.name)
        except AttributeError:
            raise ArtifactError(f"the model has no layer {planned.name!r}") from None
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or tuple(weight.shape) != planned.shape:
            raise ArtifactError(
                f"{planned.name}: the file holds shape {planned.shape}, the model has "
                f"{tuple(weight.shape) if isinstance(weight, Tensor) else type(module).__name__}"
            )
        codes, scale = weights.codes[planned.name], weights.scales[planned.name]
        replace_module(restored, planned.name, install_codes(module, codes, scale))
    _install_floats(restored, weights)
    return restored


def _install_floats(graph_module: fx.GraphModule, weights: PackedWeights) -> None:
    """Give every remaining parameter and buffer its saved value."""
    owned = {name for planned in weights.plan.layers for name in planned.tensors}
    floats = dict(weights.floats)
    for name, first in weights.shared.items():
        if first in floats:
            floats[name] = floats[first]
    # A layer under two names is one module here as well, or its second name is missing below.
    names = first_names(graph_module, sorted(owned))
    owned |= {name for name, first in names.items() if first in owned}
    try:
        # assign: the saved tensors themselves become the parameters, with their dtypes.
        keys = graph_module.load_state_dict(floats, strict=False, assign=True)
    except RuntimeError as error:
        raise ArtifactError(str(error).replace("\n\t", " ")) from None
    missing = sorted(set(keys.missing_keys) - owned)
    if missing or keys.unexpected_keys:
        raise ArtifactError(
            f"the file and the model have different tensors: missing {missing[:3]}, "
            f"unexpected {keys.unexpected_keys[:3]}"
        )
    graph_module.requires_grad_(False)
