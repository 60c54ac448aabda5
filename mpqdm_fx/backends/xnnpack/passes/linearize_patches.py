"""Write 3-D convolutions over patches that do not overlap as linear layers over the patches.

Video transformers embed patches of frames by a `Conv3d`, for which neither XNNPACK nor ExecuTorch's
portable kernels (1.5.1) have anything. A patch is a row of numbers, and each weight meets one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from mpqdm_fx.graph.editing import insert_call, keep_fetched, replace_module
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.graph.nodes import rank, sizes
from mpqdm_fx.graph.reshaped_layers import ROUNDED_BUFFERS, with_numbers_of
from mpqdm_fx.passes.base import GraphPass

__all__ = ["LinearizePatches"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class LinearizePatches(GraphPass):
    """Turn `Conv3d` into a linear layer of the same name, between reshapes and permutations.

    1. The convolution is ungrouped, its stride is its kernel, without dilation and padding, and
       all its calls read static sizes under one name, which the kernel divides.
    2. No value has more than six axes, the most that XNNPACK takes.
    3. The integers and scales of a rounded layer stay with it.
    """

    # Sums over a patch run in another order; a later quantizer may take the neighbouring code.
    tolerance: ClassVar[float] = 1e-2

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every such convolution; False if there was none."""
        modified = False
        for name, layer in weight_layers(graph_module).items():
            if _fits(layer):
                kernel = layer.module.kernel_size
                keep_fetched(graph_module, name)
                replace_module(graph_module, name, _linear(layer.module))
                for call in layer.nodes:
                    _rewrite_call(graph_module, call, kernel)  # type: ignore[arg-type]
                modified = True
        return modified


def _fits(layer: WeightLayer) -> bool:
    conv = layer.module
    if type(conv) is not nn.Conv3d or conv.kernel_size != conv.stride or conv.groups > 1:
        return False
    if conv.padding not in ((0, 0, 0), "valid") or conv.dilation != (1, 1, 1):
        return False
    return set(conv._buffers) <= ROUNDED_BUFFERS and all(
        node.target == layer.name and not node.kwargs and _has_patches(node, conv.kernel_size)
        for node in layer.nodes
    )


def _has_patches(node: fx.Node, kernel: tuple[int, ...]) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node) or rank(source) != 5 or rank(node) != 5:
        return False
    shape = sizes(source)
    if -1 in shape[1:]:
        return False
    return not any(size % step for size, step in zip(shape[2:], kernel, strict=True))


def _linear(conv: nn.Module) -> nn.Linear:
    assert isinstance(conv, nn.Conv3d)
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=False, device="meta")
    return with_numbers_of(conv, linear, lambda weight: weight.flatten(1))


def _rewrite_call(graph_module: fx.GraphModule, call: fx.Node, kernel: tuple[int, ...]) -> None:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=call)

    source = call.args[0]
    assert isinstance(source, fx.Node)
    _, channels, *size = sizes(source)
    t, h, w = (n // k for n, k in zip(size, kernel, strict=True))
    kt, kh, kw = kernel
    rows = emit(_aten.reshape.default, source, [-1, h, kh, w, kw])
    rows = emit(_aten.permute.default, rows, [0, 1, 3, 2, 4])
    rows = emit(_aten.reshape.default, rows, [-1, channels, t, kt, h * w, kh * kw])
    rows = emit(_aten.permute.default, rows, [0, 2, 4, 1, 3, 5])
    rows = emit(_aten.reshape.default, rows, [-1, t * h * w, channels * kt * kh * kw])
    tokens = insert_call(graph_module, str(call.target), (rows,), anchor=call)
    volume = emit(_aten.permute.default, tokens, [0, 2, 1])
    result = emit(_aten.reshape.default, volume, [-1, *sizes(call)[1:]])
    call.replace_all_uses_with(result)
    graph_module.graph.erase_node(call)
