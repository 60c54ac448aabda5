"""Which node of a graph has the value that a program holds of an operator.

A program holds no value between an operator and what is fused into it: an activation, and the
rounding to int8 codes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from mpqdm_fx.backends.xnnpack.inner_values import HeldValue

__all__ = ["fused_value", "siblings"]


def fused_value(node: fx.Node, held: HeldValue) -> fx.Node | None:
    """The node whose value a program holds in the place of another one's.

    Args:
        node: A node of any graph of the model.
        held: What is fused into it in the program.

    Returns:
        The node itself where nothing is; else the activation or the dequantize node behind it.
        None if the graph has no such node.
    """
    if held.clamped:
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
    if held.codes is None:
        return node
    quantizers = [user for user in node.users if _operator(user).startswith("quantize")]
    # a value may be rounded anew for each reader; the program's own codes are the ones that count
    same = [q for q in quantizers if _float32(q.args[1:3]) == _float32(held.codes)] or quantizers
    return next((user for q in same for user in q.users if _is_dequantize(user)), None)


def siblings(node: fx.Node) -> Sequence[fx.Node]:
    """All dequantize nodes that restore the same codes as this one; other nodes are alone."""
    source = node.args[0] if _is_dequantize(node) else None
    if not isinstance(source, fx.Node):
        return (node,)
    return tuple(user for user in source.users if _is_dequantize(user))


def _is_dequantize(node: fx.Node) -> bool:
    return _operator(node).startswith("dequantize")


def _operator(node: fx.Node) -> str:
    schema: Any = getattr(node.target, "_schema", None)
    namespace, _, name = str(getattr(schema, "name", "")).partition("::")
    return name if namespace == "quantized_decomposed" else ""


def _float32(parameters: Sequence[Any]) -> tuple[Any, Any]:
    """Scale and zero point as a program stores them."""
    scale, zero_point = parameters
    return (np.float32(scale) if isinstance(scale, float) else scale), zero_point
