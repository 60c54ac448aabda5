"""Compute once what depends on no input.

The frequencies of a timestep embedding are made of `arange` in every call. ExecuTorch (1.5.1) has a
portable kernel for it only, and what follows cannot join the program's main delegate.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.editing import add_tensor
from mpqdm_fx.graph.operators import is_pure
from mpqdm_fx.passes.base import GraphPass

__all__ = ["FoldConstants"]

_aten = torch.ops.aten
#: Ops that read no more of their input than its size and dtype.
_FILLED = frozenset(
    {
        _aten.empty_like.default,
        _aten.full_like.default,
        _aten.new_full.default,
        _aten.new_ones.default,
        _aten.new_zeros.default,
        _aten.ones_like.default,
        _aten.zeros_like.default,
    }
)
#: Largest result that is worth storing, in numbers.
_LARGEST = 1 << 16


@dataclass(frozen=True, kw_only=True)
class FoldConstants(GraphPass):
    """Replace nodes that compute the same tensor in every call by buffers.

    1. A constant is a buffer, or a call of an aten op that draws nothing at random, writes into
       nothing and reads nothing but constants. Parameters are none: they may be trained, shared or
       quantized. What is filled with one number in the size of another value (`ones_like`) reads
       nothing; what is not filled (`empty_like`) is zero.
    2. The last constants of a chain become buffers, named after the module they stand in; what is
       read by constants alone goes.
    3. Tensors of more than 65536 numbers, and what depends on a dynamic size, are left alone.

    Computed here by the same ops: bit-equal.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fold every chain; False if there was none."""
        values: dict[fx.Node, Any] = {}
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                buffer = operator.attrgetter(str(node.target))(graph_module)
                if isinstance(buffer, Tensor) and not isinstance(buffer, nn.Parameter):
                    values[node] = buffer
            elif _is_constant(node, values):
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
    if node.op != "call_function" or not is_pure(node.target):
        return False
    parts = node.meta.get("val")
    parts = parts if isinstance(parts, list | tuple) else [parts]
    if not all(isinstance(p, Tensor) and all(isinstance(n, int) for n in p.shape) for p in parts):
        return False
    if sum(part.numel() for part in parts) > _LARGEST:
        return False
    if node.target in _FILLED:
        return isinstance(node.args[0], fx.Node) and node.all_input_nodes == [node.args[0]]
    return all(source in values for source in node.all_input_nodes)


def _compute(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    assert callable(node.target)
    if node.target in _FILLED:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = source.meta["val"]
        values = {**values, source: torch.zeros(value.shape, dtype=value.dtype)}
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    if not isinstance(result, Tensor):
        return result
    if node.target is _aten.empty_like.default:
        result = torch.zeros_like(result)
    return result.clone(memory_format=torch.contiguous_format)


def _is_end(node: fx.Node, value: object, values: dict[fx.Node, Any]) -> bool:
    if node.op == "get_attr":
        return False
    return isinstance(value, Tensor) and any(user not in values for user in node.users)
