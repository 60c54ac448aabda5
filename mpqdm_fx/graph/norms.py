"""Read norm calls off their nodes, and put other nodes in their place."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

__all__ = ["NormCall", "constant", "norm_name", "take_over"]

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
