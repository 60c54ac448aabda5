"""Quantize/dequantize nodes: the `quantized_decomposed` ops, recognised and inserted.

A q/dq pair is `quantize_per_tensor` followed by `dequantize_per_tensor` with the same parameters
`(scale, zero_point, quant_min, quant_max, dtype)`. Weights have `dequantize_per_channel`.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from mpqdm_fx.graph.editing import inherit_meta

__all__ = [
    "insert_pair",
    "is_dequantize",
    "is_quantize",
    "qdq_ops",
    "qdq_parameters",
    "quick_form",
]


@functools.cache
def qdq_ops() -> Any:
    """The op namespace `torch.ops.quantized_decomposed`, with its ops registered."""
    # torch registers them when torch.ao is imported, which one module does; it belongs to a higher
    # layer, hence its name instead of an import statement.
    importlib.import_module("mpqdm_fx.backends.ao")
    return torch.ops.quantized_decomposed


def is_quantize(node: fx.Node) -> bool:
    """Whether the node quantizes per tensor."""
    return node.target is qdq_ops().quantize_per_tensor.default


def is_dequantize(node: fx.Node) -> bool:
    """Whether the node dequantizes per tensor."""
    return node.target is qdq_ops().dequantize_per_tensor.default


def qdq_parameters(node: fx.Node) -> tuple[Any, ...]:
    """`(scale, zero_point, quant_min, quant_max, dtype)` of a per-tensor q or dq node."""
    return tuple(node.args[1:6])


def quick_form(target: object) -> Callable[..., Tensor] | None:
    """A function that gives a per-tensor op's bits in a third of its time; None for other targets.

    torch's forms allocate a tensor for each of their steps; these work in place on the first one.
    (`torch.fake_quantize_per_tensor_affine`, which does both at once, is slower than even those,
    and maps NaN to another level.)
    """
    if getattr(target, "namespace", None) != "quantized_decomposed":
        return None  # before the ops are registered, which takes a second
    ops = qdq_ops()
    if target is ops.quantize_per_tensor.default:
        return _quantize
    return _dequantize if target is ops.dequantize_per_tensor.default else None


def _quantize(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    steps = x.to(torch.float32) * (1.0 / scale)
    return steps.round_().add_(zero_point).clamp_(quant_min, quant_max).to(dtype)


def _dequantize(
    codes: Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return codes.to(out_dtype or torch.float32).sub_(zero_point).mul_(scale)


def insert_pair(
    graph_module: fx.GraphModule,
    source: fx.Node,
    parameters: tuple[Any, ...],
    *,
    after: fx.Node | None = None,
) -> fx.Node:
    """Insert quantize and dequantize of a value, without redirecting its users.

    Args:
        graph_module: Private copy to edit, in place.
        source: The value, floating point. The new nodes inherit its provenance.
        parameters: `(scale, zero_point, quant_min, quant_max, dtype)`.
        after: Node to insert behind; default `source`, or the last placeholder if `source` is one,
            so that placeholders stay together.

    Returns:
        The dequantize node.
    """
    graph = graph_module.graph
    if after is None:
        after = source
        if source.op == "placeholder":
            after = graph.find_nodes(op="placeholder")[-1]
    dtype = getattr(source.meta.get("val"), "dtype", torch.float32)
    # the op restores float32 unless told otherwise
    kwargs = {} if dtype == torch.float32 else {"out_dtype": dtype}
    ops = qdq_ops()
    with graph.inserting_after(after):
        codes = graph.call_function(ops.quantize_per_tensor.default, (source, *parameters))
    with graph.inserting_after(codes):
        restored = graph.call_function(
            ops.dequantize_per_tensor.default, (codes, *parameters), kwargs
        )
    for node in (codes, restored):
        inherit_meta(node, source)
    value = source.meta.get("val")
    if isinstance(value, FakeTensor):  # what running them would give, without their many ops
        with torch.no_grad(), value.fake_mode:
            codes.meta["val"] = value.to(parameters[-1])
            restored.meta["val"] = codes.meta["val"].to(dtype)
    return restored
