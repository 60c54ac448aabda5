"""Write transposed convolutions as ordinary ones whose channels are the phases of the output.

A transposed convolution of stride s writes s outputs a pixel, each with kernel / s weights of its
own: an ordinary convolution with s times the channels, whose outputs are then interleaved
("sub-pixel convolution", arXiv 1609.07009). An ordinary convolution is a weight layer, which has
integer kernels everywhere and a scale for each of its rows. In the decoder of an audio autoencoder
more than half of the weights are transposed.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import insert_call, keep_fetched, replace_module
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["SubpixelConvolutions"]

_aten = torch.ops.aten

#: Transposed convolutions, and the ordinary ones that they become.
_ORDINARY: dict[type[nn.Module], type[nn.Module]] = {
    nn.ConvTranspose1d: nn.Conv1d,
    nn.ConvTranspose2d: nn.Conv2d,
}


@dataclass(frozen=True, kw_only=True)
class SubpixelConvolutions(GraphPass):
    """Turn `ConvTranspose1d` and `ConvTranspose2d` into a convolution and a permutation.

    1. The layer is ungrouped and not dilated, and its stride divides its kernel, so that all phases
       have equally many weights. Others stay as they are: a phase filled up with zeros would be
       rounded to levels that may have no zero.
    2. All its calls read an input with a batch axis and static sizes under one name.
    3. The new layer has the name of the old one and as many weights, in rows by output channel and
       then phase. Its bias is repeated for each phase.

    Each output is the same dot product as before; a backend may sum it in another order.
    """

    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every such layer; False if there was none."""
        calls = _calls(graph_module)
        weights: dict[object, nn.Parameter] = {}  # tied ones stay tied
        for conv, nodes in calls:
            layer = _subpixel(conv)
            key = (id(conv.weight), conv.stride)
            layer.weight = weights.setdefault(key, layer.weight)  # type: ignore[arg-type]
            keep_fetched(graph_module, str(nodes[0].target))
            replace_module(graph_module, str(nodes[0].target), layer)
            for node in nodes:
                _rewrite_call(graph_module, node, conv)
        return bool(calls)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """No transposed convolution is left that could be rewritten.

        Raises:
            DialectError: One is; names the layer.
        """
        for _, nodes in _calls(graph_module):
            raise DialectError(f"the transposed convolution {nodes[0].target} could be an ordinary")


_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d


def _calls(graph_module: fx.GraphModule) -> list[tuple[_Transposed, list[fx.Node]]]:
    """Transposed convolutions that fit, with their calls."""
    found: dict[int, tuple[_Transposed, list[fx.Node]]] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        if type(module) in _ORDINARY:
            assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
            found.setdefault(id(module), (module, []))[1].append(node)
    return [(conv, nodes) for conv, nodes in found.values() if _fits(conv, nodes)]


def _fits(conv: _Transposed, nodes: list[fx.Node]) -> bool:
    axes = _axes(conv)
    if conv.groups > 1 or any(step > 1 for step in conv.dilation) or conv._buffers:
        return False
    # what padding takes away behind is what output padding may give back
    if any(kernel % stride or extra > pad for kernel, stride, pad, extra in axes):
        return False
    return all(
        node.target == nodes[0].target
        and len(node.args) == 1
        and not node.kwargs
        and _is_batched(node, 2 + len(axes))
        for node in nodes
    )


def _axes(conv: _Transposed) -> list[tuple[int, int, int, int]]:
    """Kernel, stride, padding and output padding along each axis."""
    padding = conv.padding
    assert isinstance(padding, tuple)  # words are for ordinary convolutions
    return list(zip(conv.kernel_size, conv.stride, padding, conv.output_padding, strict=True))


def _is_batched(node: fx.Node, axes: int) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return False
    return len(sizes(source)) == axes and -1 not in sizes(source)[1:]


def _taps(conv: _Transposed) -> tuple[int, ...]:
    """Kernel of the ordinary convolution: weights of one phase along each axis."""
    return tuple(k // s for k, s in zip(conv.kernel_size, conv.stride, strict=True))


def _padding(conv: _Transposed) -> tuple[int, ...]:
    """Padding of the ordinary convolution: what makes all outputs, less whole pixels cut off."""
    return tuple(
        kernel // stride - 1 - min(kernel // stride - 1, (pad - extra) // stride)
        for kernel, stride, pad, extra in _axes(conv)
    )


def _subpixel(conv: _Transposed) -> nn.Module:
    """The ordinary convolution: one row for each output channel and phase."""
    ordinary = _ORDINARY[type(conv)]
    layer = ordinary(
        conv.in_channels,
        conv.out_channels * prod(conv.stride),
        _taps(conv),
        padding=_padding(conv),
        bias=False,
        device="meta",
    )
    trained = conv.weight.requires_grad
    layer.weight = nn.Parameter(_phase_weights(conv), requires_grad=trained)
    if conv.bias is not None:
        bias = conv.bias.detach().repeat_interleave(prod(conv.stride))
        layer.bias = nn.Parameter(bias, requires_grad=trained)
    return layer.train(conv.training)


def _phase_weights(conv: _Transposed) -> Tensor:
    """[inputs, outputs, *kernel] as [outputs * phases, inputs, *taps], each tap's order reversed.

    Output `stride * q + phase` sums `weight[stride * tap + phase] * input[q - tap]`.
    """
    rank = len(conv.stride)
    split = [n for pair in zip(_taps(conv), conv.stride, strict=True) for n in pair]
    weight = conv.weight.detach().reshape(conv.in_channels, conv.out_channels, *split)
    taps = [2 + 2 * axis for axis in range(rank)]
    phases = [3 + 2 * axis for axis in range(rank)]
    rows = weight.flip(taps).permute(1, *phases, 0, *taps)
    return rows.reshape(-1, conv.in_channels, *_taps(conv)).contiguous()


def _rewrite_call(graph_module: fx.GraphModule, call: fx.Node, conv: _Transposed) -> None:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=call)

    rank, stride = len(conv.stride), list(conv.stride)
    phases = insert_call(graph_module, str(call.target), call.args, anchor=call)
    pixels = sizes(phases)[2:]
    apart = emit(_aten.reshape.default, phases, [-1, conv.out_channels, *stride, *pixels])
    order = [axis for pair in range(rank) for axis in (2 + rank + pair, 2 + pair)]
    moved = emit(_aten.permute.default, apart, [0, 1, *order])
    full = [n * s for n, s in zip(pixels, stride, strict=True)]
    result = emit(_aten.reshape.default, moved, [-1, conv.out_channels, *full])
    wanted = sizes(call)[2:]
    for axis, (_, step, pad, _) in enumerate(_axes(conv)):
        size, kept = full[axis], wanted[axis]
        # of what padding cuts off in front, the convolution left out whole pixels already
        start = pad - step * (_taps(conv)[axis] - 1 - _padding(conv)[axis])
        if (start, kept) != (0, size):
            result = emit(_aten.slice.Tensor, result, 2 + axis, start, start + kept)
    call.replace_all_uses_with(result)
    graph_module.graph.erase_node(call)
