"""Compute once what depends on no input.

The frequencies of a timestep embedding are made of `arange` in every call. ExecuTorch (1.5.1) has a
portable kernel for it only, and what follows cannot join the program's main delegate.

T5 rounds logarithms of distances down to numbers of buckets: some are whole numbers but for the
last bit, in which CPUs differ. Computed here, every CPU has the same buckets.
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
#: Most numbers that are worth storing: of floats; and of integers and truth values, which may have
#: been rounded from floats. No more than that is computed here either.
_MOST_FLOATS, _MOST = 1 << 16, 1 << 20


@dataclass(frozen=True, kw_only=True)
class FoldConstants(GraphPass):
    """Replace nodes that compute the same tensor in every call by buffers.

    1. A constant is a buffer, or a call of an aten op that draws nothing at random, writes into
       nothing and reads nothing but constants. Parameters are none: they may be trained, shared or
       quantized. What is filled with one number in the size of another value (`ones_like`) reads
       nothing; what is not filled (`empty_like`) is zero.
    2. The last constants of a chain become buffers, named after the module they stand in; what is
       read by constants alone goes.
    3. Floats of more than 65536 numbers are computed for the integers that are made of them, and
       not stored. Larger tensors of integers than 1048576, and what depends on a dynamic size, are
       left alone.

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
        ends = [node for node in _read(values) if _is_stored(node, values[node])]
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
    if sum(part.numel() for part in parts) > _MOST:
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


def _read(values: dict[fx.Node, Any]) -> list[fx.Node]:
    """Constants that something else reads, or a constant that is read and not stored."""
    read: set[fx.Node] = set()
    for node in reversed(values):
        if any(u not in values or (u in read and not _is_stored(u, values[u])) for u in node.users):
            read.add(node)
    return [node for node in values if node in read and node.op != "get_attr"]


def _is_stored(node: fx.Node, value: object) -> bool:
    if node.op == "get_attr":
        return True
    if not isinstance(value, Tensor):
        return False
    rounded = value.dtype in (torch.bool, torch.int32, torch.int64)
    return value.numel() <= (_MOST if rounded else _MOST_FLOATS)
