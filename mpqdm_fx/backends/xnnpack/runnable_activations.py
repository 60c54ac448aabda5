"""Which activations XNNPACK runs as they are, which layers fall back to float, and what is refused.

XNNPACK has static int8 kernels for every convolution and linear layer, but dynamic ones for linear
layers and ordinary 2-D convolutions alone (`Conv1d` is written as one): none for depthwise ones,
which in its terms are all with one input channel per group (also a plain one on a single channel).
"""

import logging
from collections.abc import Mapping

from torch import fx, nn

from mpqdm_fx.backends.observers import check_names, weight_grids
from mpqdm_fx.backends.torch_ao import check_ranges
from mpqdm_fx.errors import ConfigError, LoweringError
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.graph.nodes import rank
from mpqdm_fx.records.activations import (
    Activation,
    DynamicActivation,
    KernelActivation,
    StaticActivation,
    kernel_activations,
)

__all__ = ["dynamic_refusal", "runnable_activations", "split_activations"]

logger = logging.getLogger(__name__)

_BACKEND = "XNNPACK"


def runnable_activations(
    rounded: fx.GraphModule, activations: Mapping[str, Activation]
) -> tuple[dict[str, KernelActivation], dict[str, str]]:
    """Sort activations into those that integer kernels run and layers that stay in float.

    A layer that has no dynamic kernel stays in float with its rounded weights: that costs time and
    four bytes a weight, but no accuracy, and such layers are few and small (depthwise convolutions,
    a first convolution on one channel). It is logged, and reported in `XnnpackProgram`.

    Args:
        rounded: Module-level graph after `RoundWeights`.
        activations: By layer name.

    Returns:
        The activations that run, and the layers that stay in float with the reason for each.

    Raises:
        ConfigError: No layer is rounded, there are no activations, or one is of a layer that is not
            rounded.
        LoweringError: An activation is neither static nor dynamic, or not 8 bits wide; or no layer
            is left that would run as int8.
    """
    grids = weight_grids(rounded)
    if not activations:
        raise ConfigError(
            f"{_BACKEND} got no activation ranges, and weights alone have no int8 form there: "
            f'quantize with activation_mode="dynamic" or "static" (a model with "float" has no '
            f"ranges, nor have its end layers, and any that `slowdown` leaves in float), or lower "
            f"the float form, `lower_xnnpack_float(quantized.rounded, ...)`"
        )
    static, dynamic = split_activations(kernel_activations(activations, _BACKEND))
    if static:
        check_ranges(static, grids, _BACKEND)
    check_names(dynamic, grids)
    layers = weight_layers(rounded)
    floats: dict[str, str] = {}
    for name, activation in dynamic.items():
        if activation.bits != 8:
            raise LoweringError(
                f"{name}: its dynamic activation has {activation.bits} bits, but {_BACKEND} has 8 "
                f"only; quantize with activation_bits=8"
            )
        reason = dynamic_refusal(layers[name])
        if reason is not None:
            floats[name] = reason
    runnable = {name: a for name, a in (static | dynamic).items() if name not in floats}
    if not runnable:
        name, reason = next(iter(floats.items()))
        raise LoweringError(
            f"{name}: {reason}, and no other layer would run as int8 either; quantize with "
            f'activation_mode="static", which {_BACKEND} runs for such layers too'
        )
    for name, reason in floats.items():
        logger.warning(
            '%s: %s; it runs in float with its rounded weights (activation_mode="static" would run '
            "it as int8)", name, reason,
        )  # fmt: skip
    return {name: runnable[name] for name in activations if name in runnable}, floats


def split_activations(
    activations: Mapping[str, KernelActivation],
) -> tuple[dict[str, StaticActivation], dict[str, DynamicActivation]]:
    """The static and the dynamic ones."""
    static = {name: a for name, a in activations.items() if isinstance(a, StaticActivation)}
    dynamic = {name: a for name, a in activations.items() if isinstance(a, DynamicActivation)}
    return static, dynamic


def dynamic_refusal(layer: WeightLayer) -> str | None:
    """Why XNNPACK has no dynamic int8 kernel for a weight layer; None if it has one."""
    module = layer.module
    if isinstance(module, nn.Linear):
        return None
    kind = type(module).__name__
    no_kernel = f"{_BACKEND} has no dynamic int8 kernel for"
    if not isinstance(module, nn.Conv2d):
        return f"{no_kernel} {kind}, only for Conv2d and Linear"
    if module.in_channels == module.groups:
        return (
            f"{no_kernel} a depthwise {kind} ({module.in_channels} input channels in "
            f"{module.groups} groups: one channel each)"
        )
    if any(rank(node) == 3 for node in layer.nodes):
        return f"{no_kernel} a {kind} on an input without a batch axis"
    return None
