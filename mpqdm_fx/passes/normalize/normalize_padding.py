"""Give convolutions their padding in numbers, or take it out of them.

`padding="same"` exports as `conv2d.padding`, an op of its own which decompositions turn into a
convolution, with a pad before it where the two sides differ. Another padding mode than zeros is a
pad before the convolution always, which integer convolutions do not know. An integer kernel's input
would then be that pad, which no quantizer has seen. With numbers in the module, and the pad in the
graph, the convolution is the same op everywhere; XNNPACK delegates both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from mpqdm_fx.graph.editing import insert_call, replace_module, shallow_clone
from mpqdm_fx.graph.layers import called_module, padding_sides
from mpqdm_fx.graph.leaves import is_stock
from mpqdm_fx.passes.base import GraphPass

__all__ = ["NormalizePadding"]

_aten = torch.ops.aten
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class NormalizePadding(GraphPass):
    """Leave convolution modules with zeros alone around their input, as many as a number says.

    1. "valid" is 0 on every side. "same" is dilation * (kernel_size - 1) on each axis, half of it
       on either side; where that is symmetric on all axes it becomes the module's own padding.
    2. An odd amount puts one more behind than in front. All of it then becomes a constant pad
       before the convolution, which gets padding 0.
    3. Another padding mode than zeros becomes data movement before the convolution, which gets
       padding 0: `reflect` and `replicate` the pad op, `circular` slices and concatenations.
    4. Modules with hooks or a forward of their own are left alone.

    The module is replaced by one that shares its
    weight and buffers (codes and scales of a rounded layer too) at the same name. The products and
    their order are the same.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every module that the rules cover; False if there was none."""
        calls: dict[int, list[fx.Node]] = {}
        modules: dict[int, nn.modules.conv._ConvNd] = {}
        for node in graph_module.graph.nodes:
            module = called_module(graph_module, node, *_CONVOLUTIONS)
            if isinstance(module, _CONVOLUTIONS) and not _is_plain(module) and is_stock(module):
                calls.setdefault(id(module), []).append(node)
                modules[id(module)] = module
        modified = False
        for key, nodes in calls.items():
            modified |= _normalize(graph_module, modules[key], nodes)
        return modified


def _is_plain(conv: nn.modules.conv._ConvNd) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _normalize(
    graph_module: fx.GraphModule, conv: nn.modules.conv._ConvNd, nodes: Sequence[fx.Node]
) -> bool:
    if any(len(node.args) != 1 for node in nodes):
        return False
    sides = padding_sides(conv)  # last axis first, front and back
    front, back = sides[::2], sides[1::2]
    inside = conv.padding_mode == "zeros" and front == back
    numbers = tuple(reversed(front)) if inside else (0,) * len(front)
    # as the constructor of a convolution with numbers leaves it
    clone = shallow_clone(conv)
    clone.padding, clone.padding_mode = numbers, "zeros"
    clone._reversed_padding_repeated_twice = [n for n in reversed(numbers) for _ in range(2)]
    replace_module(graph_module, str(nodes[0].target), clone)
    if not inside and any(sides):
        for node in nodes:
            (value,) = node.args
            assert isinstance(value, fx.Node)
            node.args = (_pad(graph_module, value, sides, conv.padding_mode, anchor=node),)
    return True


def _pad(
    graph_module: fx.GraphModule, value: fx.Node, sides: list[int], mode: str, *, anchor: fx.Node
) -> fx.Node:
    if mode == "zeros":
        args: tuple[object, ...] = (value, sides, 0.0)
        return insert_call(graph_module, _aten.constant_pad_nd.default, args, anchor=anchor)
    if mode != "circular":
        return insert_call(graph_module, _aten.pad.default, (value, sides, mode), anchor=anchor)
    # the pad op wraps by copies into an empty tensor, which ExecuTorch does not run
    for axis, (front, back) in enumerate(zip(sides[::2], sides[1::2], strict=True), start=1):
        parts = [value]
        if front:
            args = (value, -axis, -front)
            parts.insert(0, insert_call(graph_module, _aten.slice.Tensor, args, anchor=anchor))
        if back:
            args = (value, -axis, 0, back)
            parts.append(insert_call(graph_module, _aten.slice.Tensor, args, anchor=anchor))
        if len(parts) > 1:
            args = (parts, -axis)
            value = insert_call(graph_module, _aten.cat.default, args, anchor=anchor)
    return value
