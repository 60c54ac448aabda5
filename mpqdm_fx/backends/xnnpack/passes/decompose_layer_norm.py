"""Write layer norms and RMS norms out in the ops that XNNPACK delegates.

ExecuTorch (1.5.1) leaves `native_layer_norm` on a portable kernel, which cuts the program in two at
every norm. XNNPACK takes means over the last two of four axes only, so tokens are viewed as images
one pixel wide.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.editing import add_tensor, insert_call
from mpqdm_fx.graph.nodes import argument, sizes
from mpqdm_fx.graph.norms import NormCall, constant, norm_name, take_over
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DecomposeLayerNorm"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class DecomposeLayerNorm(GraphPass):
    """Rewrite `nn.LayerNorm`, `nn.RMSNorm` and the aten ops behind them.

    1. Input [N, ..., C] is viewed as [N, L, C, 1], where means over the last two axes are means
       over channels.
    2. d = x - mean(x), or x itself for an RMS norm; then d / sqrt(mean(d * d) + eps), viewed as
       the input was. The variance is that of centred numbers, never E[x^2] - E[x]^2.
    3. Weight and bias become buffers `<norm>_weight` and `<norm>_bias` [C]; every call has its own,
       because XNNPACK stores a constant in one layout.
    4. Left alone: norms over more than the last axis, other dtypes than float32 and float64,
       weights that are computed, empty inputs, and more than one dynamic axis.

    The same sums in another order; large means cost no accuracy (see the tests).
    """

    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rules cover; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            call = _norm(graph_module, node)
            if call is not None:
                take_over(graph_module, node, _plain(graph_module, node, call))
                modified = True
        return modified


@dataclass(frozen=True, kw_only=True)
class _LayerNormCall(NormCall):
    axes: int
    centre: bool


def _norm(graph_module: fx.GraphModule, node: fx.Node) -> _LayerNormCall | None:
    """Read a call off its node, or None if the rules do not cover it."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    shape: Any
    eps: Any
    weight: Tensor | fx.Node | None
    bias: Tensor | fx.Node | None = None
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return None
        if type(module).forward not in (nn.LayerNorm.forward, nn.RMSNorm.forward):
            return None
        centre = isinstance(module, nn.LayerNorm)
        shape, weight, eps = module.normalized_shape, module.weight, module.eps
        bias = module.bias if isinstance(module, nn.LayerNorm) else None
    elif node.target in (_aten.layer_norm.default, _aten.native_layer_norm.default):
        if node.target is _aten.native_layer_norm.default and any(
            user.args[1:] != (0,) for user in node.users
        ):
            return None  # its mean and deviation are read too
        centre, shape = True, node.args[1]
        weight = constant(graph_module, argument(node, 2, "weight", None))
        bias = constant(graph_module, argument(node, 3, "bias", None))
        eps = argument(node, 4, "eps", 1e-5)
    elif node.target is _aten.rms_norm.default:
        centre, shape = False, node.args[1]
        weight = constant(graph_module, argument(node, 2, "weight", None))
        eps = argument(node, 3, "eps", None)
    else:
        return None
    if eps is None:
        eps = torch.finfo(source.meta["val"].dtype).eps
    call = _LayerNormCall(
        source=source, weight=weight, bias=bias, eps=eps, axes=len(shape), centre=centre
    )
    return call if _is_covered(call) else None


def _is_covered(call: _LayerNormCall) -> bool:
    shape = sizes(call.source)
    return (
        call.is_float
        and call.axes == 1
        and shape[-1] != -1
        and 0 not in shape
        and shape.count(-1) <= 1
    )


def _plain(graph_module: fx.GraphModule, node: fx.Node, call: _LayerNormCall) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    def mean(x: fx.Node) -> fx.Node:
        return emit(_aten.mean.dim, x, [-2, -1], True)

    shape = sizes(call.source)
    first, middle = shape[:1] if len(shape) > 1 else [1], shape[1:-1]
    tokens = -1 if -1 in middle else torch.Size(middle).numel()
    x = emit(_aten.reshape.default, call.source, [*first, tokens, shape[-1], 1])
    d = emit(_aten.sub.Tensor, x, mean(x)) if call.centre else x
    square = mean(emit(_aten.mul.Tensor, d, d))
    inverse = emit(_aten.rsqrt.default, emit(_aten.add.Tensor, square, call.eps))
    y = emit(_aten.reshape.default, emit(_aten.mul.Tensor, d, inverse), shape)
    name = norm_name(node)
    for op, role, tensor in (
        (_aten.mul.Tensor, "weight", call.weight),
        (_aten.add.Tensor, "bias", call.bias),
    ):
        if isinstance(tensor, Tensor):
            copy = tensor.detach().clone()
            y = emit(op, y, add_tensor(graph_module, f"{name}_{role}", copy, anchor=node))
    return y
