"""Which argument tells a model how much noise is in each sample, and what it says in each call.

Models of the diffusers library are told a timestep; others a sigma (Karras et al. 2022), a
logarithm of the signal-to-noise ratio (Kingma et al. 2021) or a time in 0..1. Whichever it is, it
is a number per sample, whole or not, and its order is the order of the noise levels, up or down.
Nothing here needs more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.noise_names import NOISE_NAMES, TIMESTEP_NAMES
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.records.config import MPQConfig

__all__ = ["find_noise_argument", "noise_arguments", "noise_levels_of"]


def find_noise_argument(graph_module: fx.GraphModule, name: str | None = None) -> fx.Node | None:
    """The placeholder that tells the model each sample's noise level.

    Args:
        graph_module: A traced graph.
        name: The argument's name, as of `MPQConfig.noise_argument`. None: a timestep, if the graph
            takes one, else the first argument with another of the field's names (`NOISE_NAMES`).

    Returns:
        A placeholder with a number per sample ([B], [B, 1, ...]) or a single one (0-d); None if
        no name is given and nothing is called so.

    Raises:
        ConfigError: The graph takes no such argument under the name that is given; lists those
            that it takes.
    """
    arguments = noise_arguments(graph_module)
    if name is None:
        for names in (TIMESTEP_NAMES, NOISE_NAMES):
            for argument, node in arguments.items():
                if argument in names:
                    return node
        return None
    if name in arguments:
        return arguments[name]
    placeholders = {str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")}
    signature: Signature | None = graph_module.meta.get("signature")
    constants = dict(signature.baked) if signature else {}
    why = "is no argument of this graph"
    if name in placeholders:
        why = "is no number per sample"
    elif name in constants:
        why = f"is the constant {constants[name]!r} in this graph (give a tensor of shape [batch])"
    raise ConfigError(
        f"noise_argument {name!r} {why}; arguments with a number per sample: "
        f"{', '.join(arguments) or 'none'}"
    )


def noise_arguments(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """All placeholders that could tell noise levels, by name: those with a real number per sample.

    Args:
        graph_module: A traced graph.
    """
    signature: Signature | None = graph_module.meta.get("signature")
    batch = None if signature is None else signature.batch
    shapes = {} if signature is None else {spec.name: spec.shape for spec in signature.inputs}
    arguments = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        name, value = str(node.target), node.meta.get("val")
        if value is None:  # a graph without shape information: the name has to do
            arguments[name] = node
            continue
        if not isinstance(value, Tensor) or value.is_complex() or value.dtype is torch.bool:
            continue
        shape = shapes.get(name, tuple(value.shape))
        single = all(size == 1 for size in shape[1:])
        if single and (not shape or batch is None or shape[0] in (1, batch)):
            arguments[name] = node
    return arguments


def noise_levels_of(
    graph_module: fx.GraphModule, calls: Sequence[Mapping[str, Any]], settings: MPQConfig
) -> list[Tensor | None]:
    """The noise level of each sample of each call, as the model is told it.

    Args:
        graph_module: A traced graph.
        calls: Inputs of the graph, by placeholder.
        settings: Says the argument's name, or None to find it.

    Returns:
        For each call float64 [B] on the CPU; all None if the model is told no noise level.

    Raises:
        ConfigError: See `find_noise_argument`.
        CalibrationError: A call's noise levels are not one per sample; names call and argument.
    """
    node = find_noise_argument(graph_module, settings.noise_argument)
    if node is None:
        return [None] * len(calls)
    name = str(node.target)
    levels: list[Tensor | None] = []
    for index, call in enumerate(calls):
        values = torch.as_tensor(call[name]).detach().flatten().to("cpu", torch.float64)
        batch = batch_size_of(call)
        if len(values) not in (1, batch):
            raise CalibrationError(
                f"calibration call {index}: input {name!r} has {len(values)} noise levels for "
                f"{batch} samples; give one for each sample"
            )
        levels.append(values.expand(batch))
    return levels
