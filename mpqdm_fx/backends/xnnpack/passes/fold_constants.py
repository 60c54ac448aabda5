"""Compute once what depends on no input.

The frequencies of a timestep embedding are made of `arange` in every call. ExecuTorch (1.5.1) has a
portable kernel for it only, and what follows cannot join the program's main delegate.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.editing import add_tensor
from mpqdm_fx.passes.base import GraphPass

__all__ = ["FoldConstants"]

#: Largest result that is worth storing, in numbers.
_LARGEST = 1 << 16


@dataclass(frozen=True, kw_only=True)
class FoldConstants(GraphPass):
    """Replace nodes that compute the same tensor in every call by buffers.

    1. A constant is a call of an aten op that draws nothing at random, writes into nothing and
       reads nothing but constants. Parameters are none: they may be trained, shared or quantized.
    2. The last constants of a chain become buffers, named after the module they stand in; what is
       read by constants alone goes.
    3. Tensors of more than 65536 numbers, and what depends on a dynamic size, are left alone.

    Computed here by the same ops: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fold every chain; False if there was none."""
        values: dict[fx.Node, Any] = {}
        for node in graph_module.graph.nodes:
            if _is_constant(node, values):
                values[node] = _compute(node, values)
        ends = [n for n, v in values.items() if _is_end(n, v, values)]
        for node in ends:
            stack = node.meta.get("nn_module_stack") or {}
            around = next((entry[0] for entry in reversed(stack.values())), "")
            name = f"{around}.{node.name}" if around else node.name
            buffer = add_tensor(graph_module, name, values[node], anchor=node)
            if isinstance(node.meta.get("val"), Tensor):
                buffer.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(buffer)
            graph_module.graph.erase_node(node)
        return bool(ends)


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape):
        return False
    if value.numel() > _LARGEST or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    if node.target.namespace != "aten" or node.target._schema.is_mutable:
        return False
    return all(source in values for source in node.all_input_nodes)


def _compute(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    assert callable(node.target)
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result.clone(memory_format=torch.contiguous_format)


def _is_end(node: fx.Node, value: object, values: dict[fx.Node, Any]) -> bool:
    return isinstance(value, Tensor) and any(user not in values for user in node.users)
