"""Write complex arithmetic in real numbers: rotary embeddings as products with cosines and sines.

Models turn pairs of numbers by `view_as_complex(x) * torch.polar(...)`. Neither XNNPACK nor
ExecuTorch's portable kernels (1.5.1) know complex products.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.graph.editing import add_tensor, insert_call
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.passes.base import GraphPass

__all__ = ["SplitComplex", "uncovered_complex"]

_aten = torch.ops.aten
#: Ops that move numbers about without looking at them: the same is done to both parts.
_MOVES = frozenset(
    {
        operator.getitem,
        _aten.alias.default,
        _aten.cat.default,
        _aten.chunk.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        _aten.expand.default,
        _aten.flatten.using_ints,
        _aten.gather.default,
        _aten.index.Tensor,
        _aten.index_select.default,
        _aten.pad_sequence.default,
        _aten.permute.default,
        _aten.repeat.default,
        _aten.repeat_interleave.self_int,
        _aten.reshape.default,
        _aten.resolve_conj.default,
        _aten.resolve_neg.default,
        _aten.select.int,
        _aten.select_scatter.default,
        _aten.slice.Tensor,
        _aten.slice_scatter.default,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.stack.default,
        _aten.transpose.int,
        _aten.unbind.int,
        _aten.unflatten.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)
#: Those of them whose first value alone says what dtype the result has.
_ONE_DTYPE = frozenset(
    {
        _aten.pad_sequence.default,
        _aten.select_scatter.default,
        _aten.slice_scatter.default,
    }
)
#: Those that convert real values which they join to complex ones.
_JOINS = frozenset({_aten.cat.default, _aten.stack.default})
_CASTS = frozenset({_aten.to.dtype, _aten.to.dtype_layout, _aten._to_copy.default})
_SUMS = frozenset({_aten.add.Tensor, _aten.sub.Tensor})
_CONJUGATES = frozenset({_aten._conj.default, _aten.conj.default, _aten.conj_physical.default})
_Emit = Callable[..., fx.Node]
_Pair = tuple[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SplitComplex(GraphPass):
    """Replace every complex value by its real and its imaginary part.

    1. Complex values come from inputs, constants, `view_as_complex`, `complex` and `polar`, and go
       into `view_as_real`, `real` and `imag`. In between they are moved, joined to real ones,
       added, negated, conjugated, taken to the power of e, and multiplied: (a + bi)(c + di) =
       (ac - bd) + (ad + bc)i. They may be divided by real numbers.
    2. An input stays complex and is split where it comes in.
    3. Where one operand has double precision and the other single, so have the results single: a
       rotary table is rounded before it is multiplied, and not the product after. What the graph
       then reads has the dtype that it had.
    4. If a complex value meets any other op, nothing is rewritten (`uncovered_complex` names it).

    Sums of two products are rounded once more where the complex product fuses them.
    """

    tolerance: ClassVar[float] = 1e-6

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite all complex values; False if there are none, or one meets an op not covered."""
        nodes = [n for n in graph_module.graph.nodes if _is_touched(n)]
        if not nodes or any(not _is_covered(n) for n in nodes):
            return False
        if all(_is_entry(n) for n in nodes):
            return False
        parts: dict[fx.Node, _Pair] = {}
        for node in nodes:
            if node.op == "placeholder":
                parts[node] = _split_input(graph_module, node)
            elif _is_complex(node):
                parts[node] = _split(graph_module, node, parts)
            elif not _is_entry(node):
                node.replace_all_uses_with(_real_result(graph_module, node, parts))
        for node in reversed(nodes):
            if node.op != "placeholder" and not node.users:
                graph_module.graph.erase_node(node)
        return True


def uncovered_complex(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes that keep `SplitComplex` from rewriting a graph, in running order."""
    return (n for n in graph_module.graph.nodes if _is_touched(n) and not _is_covered(n))


def _is_complex(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves)


def _is_touched(node: fx.Node) -> bool:
    return _is_complex(node) or any(_is_complex(source) for source in node.all_input_nodes)


def _is_entry(node: fx.Node) -> bool:
    """Whether a node is what remains of complex values: an input, split as the pass splits it."""
    if node.op == "placeholder":
        return all(user.target is _aten.view_as_real.default for user in node.users)
    source = node.args[0] if node.args else None
    entry = node.target is _aten.view_as_real.default and isinstance(source, fx.Node)
    return entry and source.op == "placeholder"  # type: ignore[union-attr]


def _is_covered(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return isinstance(node.meta["val"], Tensor)
    if node.op != "call_function":
        return False
    if node.target is _aten.mul.Tensor:
        return True
    if node.target in _CASTS:
        return _is_complex(node) and _is_complex(node.all_input_nodes[0])
    if node.target in _SUMS:
        numbers = any(isinstance(operand, complex) for operand in node.args)
        return bool(node.kwargs.get("alpha", 1) == 1) and not numbers
    if node.target is _aten.div.Tensor:
        by = node.args[1]
        return not (isinstance(by, complex) or (isinstance(by, fx.Node) and _is_complex(by)))
    if node.target is _aten.index.Tensor:
        return isinstance(node.args[0], fx.Node) and _is_complex(node.args[0])
    unary = (_aten.exp.default, _aten.neg.default)
    if node.target in _ONE_DTYPE:
        return all(_is_complex(source) for source in node.all_input_nodes)
    return node.target in {*_MOVES, *_CONJUGATES, *_SOURCES, *_RESULTS, *unary}


def _emitter(graph_module: fx.GraphModule, anchor: fx.Node) -> _Emit:
    def emit(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(graph_module, target, args, kwargs, anchor=anchor)

    return emit


def _split_input(graph_module: fx.GraphModule, node: fx.Node) -> _Pair:
    emit = _emitter(graph_module, node.next)
    pairs = emit(_aten.view_as_real.default, node)
    return emit(_aten.select.int, pairs, -1, 0), emit(_aten.select.int, pairs, -1, 1)


def _split(graph_module: fx.GraphModule, node: fx.Node, parts: dict[fx.Node, _Pair]) -> _Pair:
    """Real and imaginary part of a complex value."""
    emit = _emitter(graph_module, node)
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(graph_module)
        names = (f"{node.target}_{part}" for part in ("real", "imag"))
        tensors = (value.real.contiguous(), value.imag.contiguous())
        real, imag = (
            add_tensor(graph_module, name, tensor, anchor=node)
            for name, tensor in zip(names, tensors, strict=True)
        )
        for part, tensor in ((real, node.meta["val"].real), (imag, node.meta["val"].imag)):
            part.meta.setdefault("val", tensor)
        return real, imag
    if node.target in _SOURCES:
        return _SOURCES[node.target](emit, node)
    if node.target in _MOVES:
        return _moved(emit, node, parts)
    first = _parts(node.args[0], parts)
    if node.target in _CASTS:
        double = node.meta["val"].dtype is torch.complex128
        return first if double else (_single(emit, first[0]), _single(emit, first[1]))
    if node.target is _aten.exp.default:
        radius = emit(_aten.exp.default, first[0])
        return _polar(emit, radius, first[1])
    if node.target is _aten.neg.default:
        return emit(_aten.neg.default, first[0]), emit(_aten.neg.default, first[1])
    if node.target in _CONJUGATES:
        return first[0], emit(_aten.neg.default, first[1])
    second = _parts(node.args[1], parts)
    if len({_real_dtype(part) for part in (*first, *second)} - {None}) > 1:
        first, second = (tuple(_single(emit, p) for p in pair) for pair in (first, second))
    if node.target in _SUMS:
        return _sum(emit, node.target, first, second)
    if node.target is _aten.div.Tensor:
        return tuple(emit(_aten.div.Tensor, part, second[0]) for part in first)  # type: ignore[return-value]
    return _product(emit, first, second)


def _moved(emit: _Emit, node: fx.Node, parts: dict[fx.Node, _Pair]) -> _Pair:
    """The same done to both parts."""
    imaginary = dict(parts)
    args = node.args
    if node.target in _JOINS:
        reals = [n for n in node.all_input_nodes if n not in parts]
        zeros = {n: emit(_aten.zeros_like.default, n) for n in reals}
        imaginary |= {n: (n, zero) for n, zero in zeros.items()}
    if node.target is _aten.pad_sequence.default:
        args = (*args[:2], *(0.0 for _ in args[2:3]), *args[3:])  # padding is a real number
    real = emit(node.target, *_mapped(node.args, parts, 0), **_mapped(node.kwargs, parts, 0))
    return real, emit(node.target, *_mapped(args, imaginary, 1), **_mapped(node.kwargs, parts, 1))


def _parts(operand: Any, parts: dict[fx.Node, _Pair]) -> _Pair:
    """Parts of an operand; what is real has no imaginary part (None)."""
    if isinstance(operand, fx.Node):
        return parts.get(operand, (operand, None))
    return (operand.real, operand.imag) if isinstance(operand, complex) else (operand, None)


def _real_dtype(part: Any) -> torch.dtype | None:
    return part.meta["val"].dtype if isinstance(part, fx.Node) else None


def _single(emit: _Emit, part: Any) -> Any:
    double = _real_dtype(part) is torch.float64
    return emit(_aten.to.dtype, part, torch.float32) if double else part


def _mapped(arguments: Any, parts: dict[fx.Node, _Pair], index: int) -> Any:
    return fx.node.map_arg(arguments, lambda n: parts[n][index] if n in parts else n)


def _sum(emit: _Emit, target: Any, first: _Pair, second: _Pair) -> _Pair:
    real = emit(target, first[0], second[0])
    if second[1] is None:
        return real, emit(_aten.expand_as.default, first[1], real)
    if first[1] is None:
        imag = second[1] if target is _aten.add.Tensor else emit(_aten.neg.default, second[1])
        return real, emit(_aten.expand_as.default, imag, real)
    return real, emit(target, first[1], second[1])


def _product(emit: _Emit, first: _Pair, second: _Pair) -> _Pair:
    (a, b), (c, d) = first, second
    times = _aten.mul.Tensor
    if b is None or d is None:
        whole, real = (second, a) if b is None else (first, c)
        # a number, which stands on the right alone
        pairs = [(real, part) if isinstance(real, fx.Node) else (part, real) for part in whole]
        return emit(times, *pairs[0]), emit(times, *pairs[1])
    real = emit(_aten.sub.Tensor, emit(times, a, c), emit(times, b, d))
    return real, emit(_aten.add.Tensor, emit(times, a, d), emit(times, b, c))


def _columns(emit: _Emit, node: fx.Node) -> _Pair:
    x = node.args[0]
    return emit(_aten.select.int, x, -1, 0), emit(_aten.select.int, x, -1, 1)


def _from_parts(emit: _Emit, node: fx.Node) -> _Pair:
    real, imag = node.args
    assert isinstance(real, fx.Node)
    assert isinstance(imag, fx.Node)
    if sizes(real) == sizes(imag):
        return real, imag
    # the op broadcasts: a product with ones has the size of both and the numbers of one
    spread = [
        emit(_aten.mul.Tensor, part, emit(_aten.ones_like.default, other))
        for part, other in ((real, imag), (imag, real))
    ]
    return spread[0], spread[1]


def _polar(emit: _Emit, radius: fx.Node, angle: fx.Node) -> _Pair:
    real, imag = (emit(op, angle) for op in (_aten.cos.default, _aten.sin.default))
    return emit(_aten.mul.Tensor, radius, real), emit(_aten.mul.Tensor, radius, imag)


def _from_polar(emit: _Emit, node: fx.Node) -> _Pair:
    radius, angle = node.args[:2]
    assert isinstance(radius, fx.Node)
    assert isinstance(angle, fx.Node)
    return _polar(emit, radius, angle)


_SOURCES: dict[Any, Callable[[_Emit, fx.Node], _Pair]] = {
    _aten.view_as_complex.default: _columns,
    _aten.complex.default: _from_parts,
    _aten.polar.default: _from_polar,
}


def _real_result(
    graph_module: fx.GraphModule, node: fx.Node, parts: dict[fx.Node, _Pair]
) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    emit = _emitter(graph_module, node)
    result = _RESULTS[node.target](emit, *parts[source])
    dtype = node.meta["val"].dtype
    same = result.meta["val"].dtype is dtype
    return result if same else emit(_aten.to.dtype, result, dtype)


_RESULTS: dict[Any, Callable[[_Emit, fx.Node, fx.Node], fx.Node]] = {
    _aten.view_as_real.default: lambda emit, a, b: emit(_aten.stack.default, [a, b], -1),
    _aten.real.default: lambda emit, a, b: a,
    _aten.imag.default: lambda emit, a, b: b,
}
