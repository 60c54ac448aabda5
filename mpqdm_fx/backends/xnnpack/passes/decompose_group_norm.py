"""Write group norms out in the ops that XNNPACK delegates, in the layout it computes in.

ExecuTorch (1.5.1) leaves `native_group_norm` on a portable kernel, which cuts the program in two at
every norm. XNNPACK keeps images channels last; a view of the groups would transpose the image there
and back. So statistics are taken per channel, where no view is needed, and only those numbers,
[N, C, 1, 1], are gathered in groups.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import add_tensor, insert_call
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.graph.norms import GroupNormCall, group_norm_call, norm_name, take_over
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DecomposeGroupNorm"]

_aten = torch.ops.aten
_LAST_TWO = [-2, -1]


@dataclass(frozen=True, kw_only=True)
class DecomposeGroupNorm(GraphPass):
    """Rewrite `nn.GroupNorm` and the aten group norms.

    1. Input [N, C, ...] is viewed as [N, C, P, 1], an image [N, C, H, W] is taken as it is. Per
       channel: mean m, centred d = x - m, variance v = mean(d * d).
    2. Per group, over its channels: mean M of m, e = m - M, variance V = mean(v + e * e). Each
       step centres first; a difference of large squares, E[x^2] - E[x]^2, is never taken.
    3. The result is d * s + e * s + bias with s = weight / sqrt(V + eps): two numbers per channel.
    4. Weight and bias become buffers `<norm>_weight` and `<norm>_bias` [1, G, C / G, 1]; every call
       has its own, because XNNPACK stores a constant in one layout.
    5. Left alone: other dtypes than float32 and float64, weights that are computed, empty inputs,
       a dynamic number of channels, and more than one dynamic axis unless the input is an image.

    The same sums in another order; large means cost no accuracy (see the tests).
    """

    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rules cover; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            call = group_norm_call(graph_module, node)
            if call is not None and _is_covered(call):
                take_over(graph_module, node, _plain(graph_module, node, call))
                modified = True
        return modified


def _is_covered(call: GroupNormCall) -> bool:
    shape = sizes(call.source)
    dynamic = shape.count(-1) > 1 and len(shape) != 4
    return call.is_float and len(shape) >= 2 and shape[1] != -1 and 0 not in shape and not dynamic


def _plain(graph_module: fx.GraphModule, node: fx.Node, call: GroupNormCall) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    def mean(x: fx.Node) -> fx.Node:
        return emit(_aten.mean.dim, x, _LAST_TWO, True)

    def centred(x: fx.Node) -> tuple[fx.Node, fx.Node]:
        m = mean(x)
        return m, emit(_aten.sub.Tensor, x, m)

    shape = sizes(call.source)
    channels, width = shape[1], shape[1] // call.groups
    x = call.source
    if len(shape) != 4:
        # all axes behind the channels become one; at most one axis is dynamic
        static = -1 not in shape[2:]
        points = torch.Size(shape[2:]).numel() if static else -1
        x = emit(_aten.reshape.default, x, [-1 if static else shape[0], channels, points, 1])
    m, d = centred(x)
    v = mean(emit(_aten.mul.Tensor, d, d))
    grouped = [-1, call.groups, width, 1]
    _, e = centred(emit(_aten.reshape.default, m, grouped))
    between = emit(_aten.mul.Tensor, e, e)
    variance = mean(emit(_aten.add.Tensor, emit(_aten.reshape.default, v, grouped), between))
    inverse = emit(_aten.rsqrt.default, emit(_aten.add.Tensor, variance, call.eps))
    name = norm_name(node)
    # without a weight, ones spread the group's number over its channels
    weight = torch.ones(channels, dtype=call.dtype) if call.weight is None else call.weight
    s = _affine(graph_module, f"{name}_weight", weight, call, node)
    s = emit(_aten.mul.Tensor, inverse, s)
    t = emit(_aten.mul.Tensor, e, s)
    if call.bias is not None:
        bias = _affine(graph_module, f"{name}_bias", call.bias, call, node)
        t = emit(_aten.add.Tensor, t, bias)
    per_channel = [-1, channels, 1, 1]
    y = emit(_aten.mul.Tensor, d, emit(_aten.reshape.default, s, per_channel))
    y = emit(_aten.add.Tensor, y, emit(_aten.reshape.default, t, per_channel))
    return y if len(shape) == 4 else emit(_aten.reshape.default, y, shape)


def _affine(
    graph_module: fx.GraphModule,
    name: str,
    tensor: Tensor | fx.Node,
    call: GroupNormCall,
    node: fx.Node,
) -> fx.Node:
    assert isinstance(tensor, Tensor)  # what is computed is left alone
    folded = tensor.detach().reshape(1, call.groups, -1, 1).clone()
    return add_tensor(graph_module, name, folded, anchor=node)
