"""What executing a graph node by node costs: multiply-adds, bytes of values, peak memory.

All of it is read from `node.meta["val"]`, so a whole run can be estimated before it starts.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.utils import _pytree as pytree

from mpqdm_fx.graph.layers import WEIGHT_LAYERS, called_module
from mpqdm_fx.run.liveness import readers

__all__ = [
    "Sizes",
    "bind_calls",
    "bind_sizes",
    "elements",
    "multiply_adds",
    "node_cost",
    "per_call",
    "products",
    "shape_at",
    "tensor_bytes",
    "value_bytes",
    "walk_memory",
]

#: Values of the symbols in a graph's symbolic shapes, in practice the batch size.
Sizes = Mapping[sympy.Symbol, int]

_aten = torch.ops.aten
_MATRIX_PRODUCTS = (
    _aten.mm.default,
    _aten.bmm.default,
    _aten.matmul.default,
    _aten.addmm.default,
    _aten.baddbmm.default,
    _aten.linear.default,
)
_ATTENTION = (_aten.scaled_dot_product_attention.default,)


def bind_sizes(graph_module: fx.GraphModule, call: Mapping[str, Any]) -> dict[sympy.Symbol, int]:
    """Work out the symbols of a graph's shapes from one call's arguments.

    Args:
        graph_module: a traced graph.
        call: tensors, or containers of tensors, by placeholder name.

    Returns:
        Symbol to size; empty for a graph of fixed shapes.
    """
    sizes: dict[sympy.Symbol, int] = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if node.target in call:
            for extent, size in _matched(node, call[str(node.target)]):
                _solve(sizes, extent, size)
    return sizes


def bind_calls(graph_module: fx.GraphModule, calls: Iterable[Mapping[str, Any]]) -> list[Sizes]:
    """Work out the symbols for each call; calls of the same shapes share one object."""
    by_shape: dict[object, Sizes] = {}
    bound = []
    for call in calls:
        leaves = pytree.tree_leaves([call[name] for name in sorted(call)])
        shapes = tuple(leaf.shape if isinstance(leaf, torch.Tensor) else None for leaf in leaves)
        if shapes not in by_shape:
            by_shape[shapes] = bind_sizes(graph_module, call)
        bound.append(by_shape[shapes])
    return bound


def per_call(sizes: Sequence[Sizes], measure: Callable[[Sizes], int]) -> list[int]:
    """Measure once for each object among `sizes`; return the result for each call."""
    distinct = {id(binding): binding for binding in sizes}
    results = {key: measure(binding) for key, binding in distinct.items()}
    return [results[id(binding)] for binding in sizes]


def _matched(node: fx.Node, value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (symbolic size, size) of a placeholder's tensors; containers are read by getitem."""
    if "val" in node.meta:
        fakes, tensors = pytree.tree_leaves(node.meta["val"]), pytree.tree_leaves(value)
        for a, b in zip(fakes, tensors, strict=False):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                yield from zip(a.shape, b.shape, strict=False)
        return
    for user in node.users:
        if user.target is operator.getitem:
            yield from _matched(user, value[user.args[1]])


def _solve(sizes: dict[sympy.Symbol, int], extent: Any, size: int) -> None:
    if isinstance(extent, int):
        return
    expression = extent.node.expr
    unknown = expression.free_symbols - sizes.keys()
    if expression.is_Symbol:
        sizes[expression] = size
    elif len(unknown) == 1:  # a multiple of the batch
        (symbol,) = unknown
        for solution in sympy.solve(expression.subs(sizes) - size, symbol):
            sizes[symbol] = int(solution)


def _number(size: Any, sizes: Sizes) -> int:
    """Return a size as a number: what `sizes` say, else what the graph was traced with, else 1."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.free_symbols <= sizes.keys():
        return _evaluated(expression, tuple(sizes.items()))
    hint = getattr(size.node, "hint", None)
    return 1 if hint is None else int(hint)


# the same few expressions stand in the shapes of all nodes, and sympy is slow
@functools.lru_cache(maxsize=1024)
def _evaluated(expression: sympy.Expr, sizes: tuple[tuple[sympy.Symbol, int], ...]) -> int:
    return int(expression.subs(dict(sizes)))


def shape_at(value: torch.Tensor, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of a fake tensor as numbers.

    Args:
        value: `node.meta["val"]` of a node.
        sizes: see `bind_sizes`; a symbol that they lack is what the graph was traced with.
    """
    return tuple(_number(size, sizes) for size in value.shape)


def _shape_of(argument: Any, sizes: Sizes) -> tuple[int, ...] | None:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return shape_at(value, sizes) if isinstance(value, torch.Tensor) else None


def node_cost(graph_module: fx.GraphModule, node: fx.Node, sizes: Sizes | None = None) -> int:
    """Estimate the work of executing a node once.

    Args:
        graph_module: the graph's owner.
        node: a node with `meta["val"]`.
        sizes: see `bind_sizes`; by default those that the graph was traced with.

    Returns:
        Multiply-adds of a convolution, linear layer, matrix product or attention; the number of
        output elements of what else computes; at least 1.
    """
    binding = sizes or {}
    if node.op in ("placeholder", "get_attr", "output"):
        return 1
    multiplications = products(graph_module, node, binding)
    if multiplications is not None:
        return max(1, multiplications)
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(r.alias_info is not None for r in schema.returns)
    if is_view or node.target is operator.getitem:
        return 1
    return max(1, elements(node, binding))


def multiply_adds(graph_module: fx.GraphModule, sizes: Sizes | None = None) -> int:
    """Count the multiply-adds of one call of a graph: what a step costs.

    Convolutions, linear layers, matrix products and attention count; what works element by element
    does not, and neither do biases.

    Args:
        graph_module: a graph whose nodes have `meta["val"]`.
        sizes: see `bind_sizes`; by default those that the graph was traced with.
    """
    binding = sizes or {}
    counts = (products(graph_module, node, binding) for node in graph_module.graph.nodes)
    return sum(count for count in counts if count is not None)


def elements(node: fx.Node, sizes: Sizes) -> int:
    """Numbers in a node's value, or in its values together.

    Args:
        node: Any node.
        sizes: Symbols of the graph's shapes; see `bind_sizes`.
    """
    return sum(
        prod(shape_at(leaf, sizes))
        for leaf in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(leaf, torch.Tensor)
    )


def products(graph_module: fx.GraphModule, node: fx.Node, sizes: Sizes) -> int | None:
    """Count the multiply-adds of a node.

    Args:
        graph_module: the graph's owner.
        node: a node with `meta["val"]`.
        sizes: see `bind_sizes`.

    Returns:
        None if it is neither weight layer, matrix product nor attention.
    """
    layer = called_module(graph_module, node, *WEIGHT_LAYERS)
    if layer is not None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return elements(node, sizes) * weight[0].numel()
    if node.target in _MATRIX_PRODUCTS:
        operand = node.args[1] if node.target in _BIAS_FIRST else node.args[0]
        shape = _shape_of(operand, sizes)
        return elements(node, sizes) * (shape[-1] if shape else 1)
    if node.target in _ATTENTION:
        query, key = (_shape_of(argument, sizes) for argument in node.args[:2])
        if query and key:  # scores, then their product with the values
            return prod(query) * key[-2] + elements(node, sizes) * key[-2]
    return None


_BIAS_FIRST = (_aten.addmm.default, _aten.baddbmm.default)


def tensor_bytes(value: Any) -> int:
    """Count the bytes of the tensors in a nested value; a view counts as much as a copy."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    leaves = pytree.tree_leaves(value)
    return sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))


def value_bytes(node: fx.Node, sizes: Sizes | None = None, *, half: bool = False) -> int:
    """Count the bytes of the tensors that a node returns for one call.

    Args:
        node: a node; without `meta["val"]` it counts as 0.
        sizes: see `bind_sizes`.
        half: count float32 as 2 bytes, as it is held in half precision.
    """
    total = 0
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(leaf, torch.Tensor):
            size = 2 if half and leaf.dtype == torch.float32 else leaf.element_size()
            total += prod(shape_at(leaf, sizes or {})) * size
    return total


def walk_memory(
    graph_module: fx.GraphModule, calls: Sequence[Mapping[str, Any]], *, half: bool = False
) -> tuple[int, int]:
    """Predict the memory of a `run.walk.Walk` over these calls, without executing anything.

    Args:
        graph_module: the graph.
        calls: tensors by placeholder name, one mapping per call.
        half: as of `Walk`.

    Returns:
        The most bytes of values that are held at once, all calls together, if memory is not
        limited; and the smallest limit that can hold, one call's inputs and outputs of a node.
    """
    sizes = bind_calls(graph_module, calls)

    def bytes_of(node: fx.Node) -> list[int]:
        if node.op == "placeholder":
            return [_placeholder_bytes(node, call, half) for call in calls]
        return per_call(sizes, lambda binding: value_bytes(node, binding, half=half))

    alive: dict[fx.Node, list[int]] = {}
    executed: set[fx.Node] = set()
    live = peak = smallest = 0
    for node in graph_module.graph.nodes:
        executed.add(node)
        if node.op == "get_attr":
            continue
        inputs = [alive[source] for source in node.all_input_nodes if source in alive]
        output = [0] * len(calls) if node.op == "output" else bytes_of(node)
        alive[node] = output
        ending = [n for n in alive if _over(graph_module, n, executed)]
        for index, produced in enumerate(output):
            live += produced
            peak = max(peak, live)
            smallest = max(smallest, produced + sum(row[index] for row in inputs))
            live -= sum(alive[n][index] for n in ending)
        for n in ending:
            del alive[n]
    return peak, smallest


def _over(graph_module: fx.GraphModule, node: fx.Node, executed: set[fx.Node]) -> bool:
    return all(reader in executed for reader in readers(graph_module, node))


def _placeholder_bytes(node: fx.Node, call: Mapping[str, Any], half: bool) -> int:
    value = call.get(str(node.target))
    if not half:
        return tensor_bytes(value)
    return sum(
        leaf.numel() * (2 if leaf.dtype == torch.float32 else leaf.element_size())
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, torch.Tensor)
    )
