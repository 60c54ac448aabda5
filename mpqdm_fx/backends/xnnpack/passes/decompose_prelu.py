"""Write PReLU of what is no image in ops that XNNPACK delegates.

ExecuTorch (1.5.1) takes every PReLU for that of an image with its channels last, and its layout
pass fails on tokens and vectors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.editing import add_tensor, insert_call
from mpqdm_fx.graph.nodes import rank
from mpqdm_fx.graph.norms import constant, norm_name, take_over
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DecomposePrelu"]

_aten = torch.ops.aten
_IMAGE = 4  # axes


@dataclass(frozen=True, kw_only=True)
class DecomposePrelu(GraphPass):
    """Rewrite `nn.PReLU` and the aten op as `relu(x) - weight * relu(-x)`.

    1. The weight becomes a buffer `<module>_weight`, with an axis for each of the input's; its
       numbers are along the second one, or it has one number.
    2. Left alone: images, which XNNPACK takes, and weights that are computed.

    One of the two terms is zero, and the other exact: the same numbers.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rules cover; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            weight = _weight(graph_module, node)
            source = node.args[0] if node.args else None
            if weight is None or not isinstance(source, fx.Node):
                continue
            axes = rank(source)
            if axes is None or axes == _IMAGE or (axes < 2 and weight.numel() > 1):
                continue
            take_over(graph_module, node, _plain(graph_module, node, source, weight, axes))
            modified = True
        return modified


def _weight(graph_module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The weight of a call; None if it is no PReLU, or the weight is computed."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        stock = isinstance(module, nn.PReLU) and type(module).forward is nn.PReLU.forward
        return module.weight if stock and isinstance(module, nn.PReLU) else None
    if node.op != "call_function" or node.target is not _aten.prelu.default:
        return None
    weight = constant(graph_module, node.args[1])
    return weight if isinstance(weight, Tensor) else None


def _plain(
    graph_module: fx.GraphModule, node: fx.Node, source: fx.Node, weight: Tensor, axes: int
) -> fx.Node:
    def call(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    shape = [1] * axes
    if weight.numel() > 1:
        shape[1] = weight.numel()
    values = weight.detach().reshape(shape).clone()
    slope = add_tensor(graph_module, f"{norm_name(node)}_weight", values, anchor=node)
    negative = call(_aten.relu.default, call(_aten.neg.default, source))
    below = call(_aten.mul.Tensor, negative, slope)
    return call(_aten.sub.Tensor, call(_aten.relu.default, source), below)
