"""Give convolutions their padding in numbers.

`padding="same"` exports as `conv2d.padding`, an op of its own which decompositions turn into a
convolution, with a pad before it where the two sides differ. An integer kernel's input would then
be that pad, which no quantizer has seen. With numbers in the module, and the pad in the graph, the
convolution is the same op everywhere; XNNPACK delegates both.
"""

from dataclasses import dataclass

import torch
from torch import fx, nn

from mpqdm_fx.graph.base import GraphPass
from mpqdm_fx.graph.editing import insert_call, replace_module, shallow_clone
from mpqdm_fx.graph.layers import called_module

__all__ = ["NormalizePadding"]

_aten = torch.ops.aten
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class NormalizePadding(GraphPass):
    """Write `padding="same"` and `padding="valid"` of convolution modules in numbers.

    1. "valid" is 0 on every side. "same" is dilation * (kernel_size - 1) on each axis, half of it
       on either side; where that is symmetric on all axes it becomes the module's own padding.
    2. An odd amount puts one more behind than in front. All of it then becomes a constant pad
       before the convolution, which gets padding 0.
    3. Odd amounts with another padding mode than zeros, and modules with hooks or a forward of
       their own, are left alone.

    The module is replaced by one that shares its weight and buffers (codes and scales of a rounded
    layer too) at the same name. The products and their order are the same.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every module that the rules cover; False if there was none."""
        calls: dict[int, list[fx.Node]] = {}
        modules: dict[int, nn.Module] = {}
        for node in graph_module.graph.nodes:
            module = called_module(graph_module, node, *_CONVOLUTIONS)
            if module is not None and isinstance(module.padding, str):
                calls.setdefault(id(module), []).append(node)
                modules[id(module)] = module
        modified = False
        for key, nodes in calls.items():
            modified |= _normalize(graph_module, modules[key], nodes)
        return modified


def _normalize(graph_module: fx.GraphModule, module: nn.Module, nodes: list[fx.Node]) -> bool:
    assert isinstance(module, _CONVOLUTIONS)
    stock = next(c for c in _CONVOLUTIONS if isinstance(module, c))
    if type(module).forward is not stock.forward:
        return False
    if type(module)._conv_forward is not stock._conv_forward:
        return False
    amounts = [0] * len(module.kernel_size)
    if module.padding == "same":
        sizes = zip(module.kernel_size, module.dilation, strict=True)
        amounts = [dilation * (kernel - 1) for kernel, dilation in sizes]
    symmetric = all(amount % 2 == 0 for amount in amounts)
    if not symmetric and module.padding_mode != "zeros":
        return False
    if not symmetric and any(len(node.args) != 1 for node in nodes):
        return False
    clone = shallow_clone(module)
    # as the constructor of a convolution with numbers leaves it
    numbers = tuple(amount // 2 if symmetric else 0 for amount in amounts)
    clone.padding = numbers
    clone._reversed_padding_repeated_twice = [n for n in reversed(numbers) for _ in range(2)]
    replace_module(graph_module, str(nodes[0].target), clone)
    if not symmetric:
        # last axis first, front and back
        pads = [side for n in reversed(amounts) for side in (n // 2, n - n // 2)]
        for node in nodes:
            args = (node.args[0], pads, 0.0)
            pad = insert_call(graph_module, _aten.constant_pad_nd.default, args, anchor=node)
            node.args = (pad,)
    return True
