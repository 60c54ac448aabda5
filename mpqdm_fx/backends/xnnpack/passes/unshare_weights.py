"""Give other readers of a layer's weight or bias a copy of their own.

XNNPACK packs what its layers multiply by and add when a program is loaded. In a program of
ExecuTorch (1.5.1) that reads the same tensor elsewhere in the delegate (a norm by the weight's
rows, attention that slices its projection), that reader finds no memory there: the process dies of
a segmentation fault.
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import add_tensor
from mpqdm_fx.graph.layers import EMBEDDINGS
from mpqdm_fx.passes.base import GraphPass

__all__ = ["UnshareWeights"]

_aten = torch.ops.aten
#: Operators that XNNPACK may take as layers; all their operands but the first may be packed.
_LAYERS = frozenset(
    {
        _aten.addmm.default,
        _aten.conv1d.default,
        _aten.conv1d.padding,
        _aten.conv2d.default,
        _aten.conv2d.padding,
        _aten.conv_transpose1d.default,
        _aten.conv_transpose2d.input,
        _aten.linear.default,
        _aten.matmul.default,
        _aten.mm.default,
    }
)
#: They read rows on a portable kernel; a copy of a table would be large.
_PORTABLE = frozenset({_aten.embedding.default})


@dataclass(frozen=True, kw_only=True)
class UnshareWeights(GraphPass):
    """Let nodes fetch a copy of a tensor that a layer multiplies by or adds too.

    1. Layers are modules with parameters, and operators that fetch weights of their own.
    2. All other readers of a tensor share one copy. What an embedding reads is not copied.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Copy every such tensor; False if there was none."""
        packed = _packed(graph_module)
        copies: dict[int, fx.Node] = {}
        for node in graph_module.graph.find_nodes(op="get_attr"):
            tensor = _fetched(graph_module, node)
            if tensor is None or id(tensor) not in packed:
                continue
            others = [u for u in node.users if not _packs(u, node) and u.target not in _PORTABLE]
            if others and id(tensor) not in copies:
                name = f"{node.target}_copy".replace(".", "_")
                copies[id(tensor)] = add_tensor(
                    graph_module, name, tensor.detach().clone(), anchor=node
                )
                copies[id(tensor)].meta["val"] = node.meta.get("val")
            for user in others:
                user.replace_input_with(node, copies[id(tensor)])
        return bool(copies)


def _packed(graph_module: fx.GraphModule) -> set[int]:
    """Tensors that layers pack, by identity."""
    called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
    modules = [graph_module.get_submodule(name) for name in sorted(called)]
    layers = [module for module in modules if not isinstance(module, EMBEDDINGS)]
    packed = {id(tensor) for module in layers for tensor in module.parameters()}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if any(_packs(user, node) for user in node.users):
            packed.add(id(_fetched(graph_module, node)))
    return packed


def _packs(user: fx.Node, node: fx.Node) -> bool:
    """Whether a layer multiplies by a node or adds it."""
    first = 1 if user.target is _aten.addmm.default else 0  # which operand is no weight
    operands = [operand for index, operand in enumerate(user.args) if index != first]
    return user.target in _LAYERS and node in operands and user.args[first] is not node


def _fetched(graph_module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    value = operator.attrgetter(str(node.target))(graph_module)
    return value if isinstance(value, Tensor) else None
