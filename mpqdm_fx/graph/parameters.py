"""Whose tensor is whose: names of one tensor, and where a model's parameters are in its graph."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from mpqdm_fx.graph.fold_parametrizations import plain_names
from mpqdm_fx.numerics.lazy_tensor import LazyTensor

__all__ = [
    "ModelParameter",
    "first_names",
    "model_parameters",
    "note_folded",
    "note_parameters",
    "note_parts",
    "present_tensors",
]

_PARAMETERS, _PARTS, _FOLDED = "model_parameters", "layer_parts", "folded_layers"


@dataclass(frozen=True, kw_only=True)
class ModelParameter:
    """One name of a parameter of the float model.

    Attributes:
        name: The name, as in `named_parameters(remove_duplicate=False)`.
        numel: Elements; 0 for a second name of the same parameter object, so that the sum over all
            names is the sum over `model.parameters()`.
        shares: First name of a parameter with the same storage, shape and strides; None if this is
            the first.
        tensor: Name in the traced graph, its own where the graph has that; None if the graph does
            not read it.
        folded_into: Name in the traced graph of the plain weight that it was one factor of.
    """

    name: str
    numel: int
    shares: str | None = None
    tensor: str | None = None
    folded_into: str | None = None


def first_names(module: nn.Module, first: Iterable[str] = ()) -> dict[str, str]:
    """Group the names of a module's state by the tensor that they stand for.

    Args:
        module: Any module.
        first: Names that are the first of their group whatever comes before them.

    Returns:
        Every name in `state_dict`, and the first name of the same storage, shape and strides.
    """
    state = module.state_dict(keep_vars=True)
    groups: dict[Any, str] = {}
    for name in (*(name for name in first if name in state), *state):
        groups.setdefault(_identity(state[name]), name)
    return {name: groups[_identity(tensor)] for name, tensor in state.items()}


def _identity(tensor: Tensor) -> Any:
    """What two tensors have in common that hold the very same numbers in the same places."""
    if isinstance(tensor, LazyTensor):  # without a storage; tied ones are one object
        return id(tensor)
    address = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    if address == 0:  # empty, or on the meta device
        return id(tensor)
    return (address, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def model_parameters(model: nn.Module, traced: fx.GraphModule) -> tuple[ModelParameter, ...]:
    """Find every parameter of a model in its traced graph, by storage and not by name.

    Args:
        model: The float model as its owner has it.
        traced: Its graph, which shares the parameters, before any pass.

    Returns:
        One entry per name, in the model's order.
    """
    state = traced.state_dict(keep_vars=True)
    places = {_identity(tensor): name for name, tensor in reversed(state.items())}
    computed = plain_names(model)
    first: dict[Any, str] = {}
    seen: set[int] = set()
    directions: set[str] = set()  # plain weights that stand for one of their factors already
    parameters = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        identity = _identity(parameter)
        owner = first.setdefault(identity, name)
        has_name = name in state and _identity(state[name]) == identity
        tensor, folded = name if has_name else places.get(identity), None
        plain = computed.get(name)
        if tensor is None and plain in state:
            # of weight_norm's magnitude and direction, the direction has the weight's size
            alike = state[plain].shape == parameter.shape and plain not in directions
            tensor, folded = (plain, None) if alike else (None, plain)
            directions |= {plain} if alike else set()
        parameters.append(
            ModelParameter(
                name=name,
                numel=0 if id(parameter) in seen else parameter.numel(),
                shares=None if owner == name else owner,
                tensor=tensor,
                folded_into=folded,
            )
        )
        seen.add(id(parameter))
    return tuple(parameters)


def note_parameters(traced: fx.GraphModule, model: nn.Module) -> None:
    """Keep in a traced graph's meta where its model's parameters are, for `present_tensors`."""
    traced.meta[_PARAMETERS] = model_parameters(model, traced)


def note_parts(graph_module: fx.GraphModule, layer: str, parts: Iterable[str]) -> None:
    """Note that a pass cut a layer, every weight of it going to one of the new layers.

    Args:
        graph_module: The copy that the pass edits.
        layer: Name of the layer that was cut.
        parts: Names of the new ones.
    """
    _note(graph_module, _PARTS, layer, tuple(parts))


def note_folded(graph_module: fx.GraphModule, layer: str, into: str) -> None:
    """Note that a pass multiplied a layer's parameters into another layer.

    Args:
        graph_module: The copy that the pass edits.
        layer: Name of the layer that is gone.
        into: Name of the other one.
    """
    _note(graph_module, _FOLDED, layer, into)


def _note(graph_module: fx.GraphModule, key: str, layer: str, value: Any) -> None:
    # Meta is shared between copies: values are replaced, not written into.
    graph_module.meta[key] = {**graph_module.meta.get(key, {}), layer: value}


def present_tensors(
    graph_module: fx.GraphModule,
) -> list[tuple[ModelParameter, tuple[str, ...], str | None]]:
    """Follow every parameter through the passes that a graph went through.

    Args:
        graph_module: A traced graph after any passes.

    Returns:
        For every name of a parameter of the model: the parameter, the names of the graph's tensors
        that hold its numbers (none if there are none), and the layer or weight that it was folded
        into, or None. Without `note_parameters` the graph counts as the model.
    """
    parameters = graph_module.meta.get(_PARAMETERS)
    if parameters is None:
        parameters = model_parameters(graph_module, graph_module)
    present = graph_module.state_dict(keep_vars=True).keys()
    parts: Mapping[str, tuple[str, ...]] = graph_module.meta.get(_PARTS, {})
    folded: Mapping[str, str] = graph_module.meta.get(_FOLDED, {})

    def follow(name: str) -> tuple[str, ...]:
        if name in present:
            return (name,)
        layer, _, field = name.rpartition(".")
        return tuple(place for part in parts.get(layer, ()) for place in follow(f"{part}.{field}"))

    entries = []
    for parameter in parameters:
        name = parameter.tensor or ""
        into = parameter.folded_into or folded.get(name.rpartition(".")[0])
        entries.append((parameter, follow(name) if name else (), into))
    return entries
