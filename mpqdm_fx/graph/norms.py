"""Read norm calls off their nodes, and put other nodes in their place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.nodes import argument

__all__ = ["GroupNormCall", "NormCall", "constant", "group_norm_call", "norm_name", "take_over"]

_aten = torch.ops.aten
_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class NormCall:
    """What a norm normalises and by which numbers.

    Attributes:
        source: the input node; it has a value in `meta["val"]`.
        weight: factor per channel, or None. An `fx.Node` if it is computed.
        bias: summand per channel, or None. An `fx.Node` if it is computed.
        eps: what is added to the variance.
    """

    source: fx.Node
    weight: Tensor | fx.Node | None
    bias: Tensor | fx.Node | None
    eps: float

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the input."""
        dtype: torch.dtype = self.source.meta["val"].dtype
        return dtype

    @property
    def is_float(self) -> bool:
        """Whether all is constant and in one of the dtypes that norms compute in as they are."""
        parts = [p for p in (self.weight, self.bias) if p is not None]
        return self.dtype in _FLOATS and all(
            isinstance(p, Tensor) and p.dtype == self.dtype for p in parts
        )


@dataclass(frozen=True, kw_only=True)
class GroupNormCall(NormCall):
    """A group norm.

    Attributes:
        groups: into how many groups its channels fall.
    """

    groups: int


def group_norm_call(graph_module: fx.GraphModule, node: fx.Node) -> GroupNormCall | None:
    """Read a call off its node: of `nn.GroupNorm`, or of one of the two operators.

    Returns:
        None if it is no group norm, one of a class that changed `forward`, one without a value, or
        one whose mean and variance are read too.
    """
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    groups: Any
    eps: Any
    weight: Tensor | fx.Node | None
    bias: Tensor | fx.Node | None
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if not isinstance(module, nn.GroupNorm) or type(module).forward is not nn.GroupNorm.forward:
            return None
        weight, bias, groups, eps = module.weight, module.bias, module.num_groups, module.eps
    elif node.target is _aten.group_norm.default:
        weight = constant(graph_module, argument(node, 2, "weight", None))
        bias = constant(graph_module, argument(node, 3, "bias", None))
        groups, eps = argument(node, 1, "num_groups", 1), argument(node, 4, "eps", 1e-5)
    elif node.target is _aten.native_group_norm.default:
        weight = constant(graph_module, argument(node, 1, "weight", None))
        bias = constant(graph_module, argument(node, 2, "bias", None))
        groups, eps = node.args[6], node.args[7]
        if any(user.args[1:] != (0,) for user in node.users):
            return None
    else:
        return None
    return GroupNormCall(source=source, weight=weight, bias=bias, groups=groups, eps=eps)


def constant(graph_module: fx.GraphModule, value: object) -> Tensor | fx.Node | None:
    """Return the tensor that a `get_attr` node fetches; None and other nodes as they are."""
    if not isinstance(value, fx.Node):
        return None
    if value.op != "get_attr":
        return value
    *path, field = str(value.target).split(".")
    tensor = getattr(graph_module.get_submodule(".".join(path)), field)
    return tensor if isinstance(tensor, Tensor) else value


def norm_name(node: fx.Node) -> str:
    """Name for what belongs to a call: the module's own, or that of the module around the op."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    around = next((entry[0] for entry in reversed(stack.values())), "")
    return f"{around}.{node.name}" if around else node.name


def take_over(graph_module: fx.GraphModule, node: fx.Node, result: fx.Node) -> None:
    """Let `result` serve a call's users, and erase the call.

    A call that returns a tuple is read by `getitem` nodes, which go too.
    """
    value = node.meta.get("val")
    readers = [node] if isinstance(value, Tensor) else list(node.users)
    for reader in readers:
        reader.replace_all_uses_with(result)
        if reader is not node:
            graph_module.graph.erase_node(reader)
    graph_module.graph.erase_node(node)
