"""Operators that compute the same numbers whichever axis lies last, and their forms with it moved.

The label of a value says where the axis of the channels is as the graph writes the value: first
(axis 1) or last. *Turned*, it lies the other way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.backends.lowbit.axes import moves_nothing, permuted, to_first, to_last
from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.layers import called_module
from mpqdm_fx.graph.nodes import argument, sizes

__all__ = ["FIRST", "LAST", "LayoutFree", "has_layout", "is_free_turn", "layout_free", "turn"]

_aten = torch.ops.aten

FIRST, LAST = 0, 1

_UNARY = frozenset(
    getattr(getattr(_aten, name), overload)
    for overload, names in {
        "default": (
            "abs", "neg", "exp", "log", "sqrt", "rsqrt", "reciprocal", "relu", "sigmoid", "silu",
            "gelu", "tanh", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "softplus",
            "mish", "clamp", "clamp_min", "clamp_max", "sin", "cos", "square", "alias", "detach",
        ),
        "Tensor_Scalar": ("pow",),
        "Scalar": ("add", "sub", "mul", "div"),
        "dtype": ("to",),
    }.items()
    for name in names
)  # fmt: skip
#: They may also ask for a memory format, and are then bound to axes.
_COPIES = frozenset({_aten.clone.default, _aten.contiguous.default, _aten._to_copy.default})
_BINARY = frozenset(
    {
        _aten.add.Tensor,
        _aten.sub.Tensor,
        _aten.mul.Tensor,
        _aten.div.Tensor,
        _aten.pow.Tensor_Tensor,
        _aten.maximum.default,
        _aten.minimum.default,
    }
)
_MODULES = (
    nn.SiLU, nn.ReLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Identity, nn.LeakyReLU, nn.Hardswish,
    nn.Hardsigmoid, nn.ReLU6, nn.Mish, nn.ELU, nn.Softplus,
)  # fmt: skip
_VIEWS = frozenset(
    {
        _aten.reshape.default,
        _aten.view.default,
        _aten._unsafe_view.default,
        _aten.flatten.using_ints,
        _aten.unflatten.int,
    }
)

_Emit = Callable[..., fx.Node]


@dataclass(frozen=True, kw_only=True)
class LayoutFree:
    """A call that can be turned.

    Attributes:
        node: The call.
        links: Its inputs that are turned with it.
        broadcast: Its inputs of fewer axes, which stand for axes in front too.
        labels: The labels that its value, and those of the links, may have.
        write: Writes the call with its links turned, of a label.
    """

    node: fx.Node
    links: tuple[fx.Node, ...]
    broadcast: tuple[fx.Node, ...] = ()
    labels: frozenset[int] = frozenset({FIRST, LAST})
    write: Callable[[_Emit, Mapping[fx.Node, fx.Node], Sequence[int]], fx.Node]

    def turned(
        self, graph_module: fx.GraphModule, forms: Mapping[fx.Node, fx.Node], label: int
    ) -> fx.Node:
        """Insert the call with all its links turned, before the call.

        Args:
            graph_module: The copy to edit, in place.
            forms: The turned form of each link, and what stands for other inputs now.
            label: Of its value and the links.

        Returns:
            A node that computes the turned value.
        """
        order = turn(len(sizes(self.node)), label)

        def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return insert_call(graph_module, target, args, kwargs, anchor=self.node)

        whole = dict(forms)
        for operand in self.broadcast:
            shape = sizes(operand)
            padded = [1] * (len(order) - len(shape)) + shape
            image = emit(_aten.reshape.default, forms.get(operand, operand), padded)
            whole[operand] = permuted(graph_module, image, order, anchor=self.node)
        return self.write(emit, whole, order)


def turn(rank: int, label: int) -> list[int]:
    """The permutation that turns a value of a label."""
    return to_last(rank) if label == FIRST else to_first(rank)


def has_layout(node: object) -> bool:
    """Whether a node is one tensor with axes before, between and behind: of three or more."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() < 3:
        return False
    return all(isinstance(size, int) for size in value.shape)


def layout_free(graph_module: fx.GraphModule, node: fx.Node) -> LayoutFree | None:
    """How a call can be turned; None if it is bound to its axes."""
    if not has_layout(node):
        return None
    target = node.target
    if target in _BINARY:
        return _binary(node)
    if target is _aten.cat.default:
        return _cat(node)
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not has_layout(first):
        return None
    if _is_unary(graph_module, node):
        return _elementwise(node, (first,))
    if target is _aten.slice.Tensor:
        return _slice(node, first)
    if target in (_aten.constant_pad_nd.default, _aten.pad.default):
        return _pad(node, first)
    if target in _VIEWS:
        return _view(node, first)
    return None


def _is_unary(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    module = called_module(graph_module, node, *_MODULES)
    if module is not None:
        return len(node.args) == 1 and not node.kwargs
    if any(isinstance(argument, fx.Node) for argument in node.args[1:]):
        return False
    if node.target in _COPIES:
        return node.kwargs.get("memory_format") in (None, torch.preserve_format)
    return node.target in _UNARY


def _elementwise(node: fx.Node, links: tuple[fx.Node, ...]) -> LayoutFree:
    def write(emit: _Emit, forms: Mapping[fx.Node, fx.Node], order: Sequence[int]) -> fx.Node:
        args = [forms.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
        target = str(node.target) if node.op == "call_module" else node.target
        return emit(target, *args, **node.kwargs)

    return LayoutFree(node=node, links=links, write=write)


def _binary(node: fx.Node) -> LayoutFree | None:
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if any(isinstance(v, fx.Node) for v in node.kwargs.values()):
        return None
    links: list[fx.Node] = []
    broadcast: list[fx.Node] = []
    for operand in dict.fromkeys(operands):
        value = operand.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(n, int) for n in value.shape):
            return None
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue  # a number stands for itself in every layout
        (links if value.dim() == len(sizes(node)) else broadcast).append(operand)
    if not links:
        return None
    return replace(_elementwise(node, tuple(links)), broadcast=tuple(broadcast))


def _cat(node: fx.Node) -> LayoutFree | None:
    parts = node.args[0]
    assert isinstance(parts, Sequence)
    rank = len(sizes(node))
    if not all(has_layout(part) and len(sizes(part)) == rank for part in parts):  # type: ignore[arg-type]
        return None
    axis = argument(node, 1, "dim", 0)
    assert isinstance(axis, int)

    def write(emit: _Emit, forms: Mapping[fx.Node, fx.Node], order: Sequence[int]) -> fx.Node:
        turned = [forms[part] for part in parts]  # type: ignore[index]
        return emit(_aten.cat.default, turned, list(order).index(axis % rank))

    return LayoutFree(node=node, links=tuple(dict.fromkeys(parts)), write=write)  # type: ignore[arg-type]


def _slice(node: fx.Node, source: fx.Node) -> LayoutFree | None:
    if any(isinstance(a, fx.Node) for a in node.args[1:]) or node.kwargs:
        return None
    axis = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(axis, int)

    def write(emit: _Emit, forms: Mapping[fx.Node, fx.Node], order: Sequence[int]) -> fx.Node:
        moved = list(order).index(axis % len(order))
        return emit(_aten.slice.Tensor, forms[source], moved, *node.args[2:])

    return LayoutFree(node=node, links=(source,), write=write)


def _pad(node: fx.Node, source: fx.Node) -> LayoutFree | None:
    pads, number = node.args[1], argument(node, 2, "value", 0)
    if node.target is _aten.pad.default:
        if argument(node, 2, "mode", "constant") != "constant":
            return None
        number = argument(node, 3, "value", None) or 0
    if not isinstance(pads, Sequence) or not all(isinstance(n, int) for n in pads):
        return None
    rank = len(sizes(node))
    # Pairs stand for axes from the last one on.
    given = list(zip(pads[::2], pads[1::2], strict=True))
    by_axis = [(0, 0)] * (rank - len(given)) + given[::-1]

    def write(emit: _Emit, forms: Mapping[fx.Node, fx.Node], order: Sequence[int]) -> fx.Node:
        moved = [n for axis in reversed(order) for n in by_axis[axis]]
        return emit(_aten.constant_pad_nd.default, forms[source], moved, number)

    return LayoutFree(node=node, links=(source,), write=write)


def _view(node: fx.Node, source: fx.Node) -> LayoutFree | None:
    """A view that keeps batch and channels apart from the other axes."""
    before, after = sizes(source), sizes(node)
    labels = {
        FIRST: before[:2] == after[:2],
        LAST: (before[0], before[-1]) == (after[0], after[-1]),
    }
    allowed = frozenset(label for label, fits in labels.items() if fits)
    if not allowed:
        return None

    def write(emit: _Emit, forms: Mapping[fx.Node, fx.Node], order: Sequence[int]) -> fx.Node:
        return emit(_aten.reshape.default, forms[source], [after[axis] for axis in order])

    return LayoutFree(node=node, links=(source,), labels=allowed, write=write)


def is_free_turn(node: fx.Node, label: int) -> bool:
    """Whether turning a value moves no number in memory."""
    shape = sizes(node)
    return moves_nothing(shape, turn(len(shape), label))
