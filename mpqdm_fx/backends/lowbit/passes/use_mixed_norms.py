"""Let own kernels run the group norms in front of own layers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

import mpqdm_fx.backends.lowbit.ops  # noqa: F401 - registers the operators
from mpqdm_fx.backends.lowbit.axes import moved_axes, permuted, to_first, to_last
from mpqdm_fx.backends.lowbit.layout_free import layout_free
from mpqdm_fx.graph.editing import add_tensor, insert_call
from mpqdm_fx.graph.layers import called_module
from mpqdm_fx.graph.nodes import sizes
from mpqdm_fx.graph.norms import GroupNormCall, group_norm_call, norm_name
from mpqdm_fx.passes.base import GraphPass

__all__ = ["UseMixedNorms"]

_aten = torch.ops.aten
_mpqdm = torch.ops.mpqdm
_QUANTIZERS = frozenset({_mpqdm.quantize_mixed.default, _mpqdm.quantize_static_mixed.default})
_VIEWS = frozenset(
    {_aten.reshape.default, _aten.view.default, _aten.flatten.using_ints, _aten.unflatten.int}
)


@dataclass(frozen=True, kw_only=True)
class UseMixedNorms(GraphPass):
    """Turn group norms, with a SiLU behind them, into `mpqdm::group_norm_mixed`.

    1. A norm is taken if all that reads it, through permutations, views and what computes alike
       in both layouts, is `mpqdm::quantize_mixed` or `quantize_static_mixed`: then its result lies
       channels last for own layers. A SiLU that alone reads it goes with it.
    2. Its value is [B, C, H, W], or [B, C, L], which is an image of one row; float32, of known
       sizes, with constant weights.
    3. The norm reads a permutation and its users read one of its result; `MoveLayouts` takes
       away the pairs that cancel.
    """

    # The same sums in another order; codes behind it may be the neighbouring ones.
    tolerance: ClassVar[float] = 1e-2

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every norm that the rules cover; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            call = group_norm_call(graph_module, node)
            if call is None or not _is_covered(node, call):
                continue
            if _feeds_own_layers(graph_module, node):
                _rewrite(graph_module, node, call)
                modified = True
        return modified


def _is_covered(node: fx.Node, call: GroupNormCall) -> bool:
    shape = sizes(call.source)
    known = isinstance(node.meta.get("val"), Tensor) and len(shape) in (3, 4) and min(shape) >= 1
    return known and call.is_float and call.dtype == torch.float32


def _feeds_own_layers(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether all that reads a value at last are quantizers of own layers."""
    waiting, seen, found = [node], {node}, False
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if user.target in _QUANTIZERS:
                found = True
            elif not _passes_on(graph_module, user, value):
                return False
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return found


def _passes_on(graph_module: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Whether a node computes the same wherever the channels of a value lie, or moves them."""
    if node.target in _VIEWS or moved_axes(node) is not None:
        return node.args[0] is value
    call = layout_free(graph_module, node)
    return call is not None and value in call.links


def _is_silu(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    module = called_module(graph_module, node, nn.SiLU)
    if module is not None:
        return not module.inplace
    return node.target is _aten.silu.default


def _rewrite(graph_module: fx.GraphModule, node: fx.Node, call: GroupNormCall) -> None:
    only = next(iter(node.users)) if len(node.users) == 1 else node
    silu = only is not node and _is_silu(graph_module, only)
    shape = sizes(call.source)
    last = permuted(graph_module, call.source, to_last(len(shape)), anchor=node)
    if len(shape) == 3:
        row = [shape[0], 1, shape[2], shape[1]]
        last = insert_call(graph_module, _aten.reshape.default, (last, row), anchor=node)
    weight = _affine(graph_module, node, call, "weight")
    bias = _affine(graph_module, node, call, "bias")
    ones = torch.ones(shape[1])
    factor = add_tensor(graph_module, f"{norm_name(node)}_factor", ones, anchor=node)
    args = (last, weight, bias, factor, call.groups, call.eps, silu)
    result = insert_call(graph_module, _mpqdm.group_norm_mixed.default, args, anchor=node)
    if len(shape) == 3:
        tokens = [shape[0], shape[2], shape[1]]
        result = insert_call(graph_module, _aten.reshape.default, (result, tokens), anchor=node)
    result = permuted(graph_module, result, to_first(len(shape)), anchor=node)
    replaced = [only, node] if silu else [node]
    replaced[0].replace_all_uses_with(result)
    for old in replaced:
        graph_module.graph.erase_node(old)


def _affine(graph_module: fx.GraphModule, node: fx.Node, call: GroupNormCall, name: str) -> fx.Node:
    tensor = getattr(call, name)
    if tensor is None:
        channels = sizes(call.source)[1]
        tensor = torch.ones(channels) if name == "weight" else torch.zeros(channels)
    assert isinstance(tensor, Tensor)  # `is_float` lets no other through
    fqn = f"{norm_name(node)}_{name}"
    return add_tensor(graph_module, fqn, tensor.detach().clone(), anchor=node)
