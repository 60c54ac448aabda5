"""Gradients through `detach`, for layers that no other gradient reaches."""

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["DetachGate"]

_DETACH = (
    torch.Tensor.detach,
    torch.detach,
    torch.ops.aten.detach.default,
)


class DetachGate:
    """Computes `detach` nodes so that gradients pass them while it is open.

    A value behind `detach` is as large as the one in front of it, so errors pass it. Models write
    it to shape training alone: in ``z + (q - z).detach()``, the straight-through estimator of a
    vector quantizer, the closed gate gives z the gradient of the result and q none, the open one
    gives q the gradient and z none.

    Attributes:
        is_open: Whether gradients pass.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.is_open = False
        self._nodes = {node for node in graph_module.graph.nodes if _is_detach(node)}

    def __bool__(self) -> bool:
        """Whether there is any such node."""
        return bool(self._nodes)

    def __contains__(self, node: fx.Node) -> bool:
        """Whether a node is to be computed by `detached`."""
        return node in self._nodes

    def detached(self, value: Tensor) -> Tensor:
        """The value as it is."""
        result: Tensor = _Gate.apply(value, self)  # type: ignore[no-untyped-call]
        return result


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: DetachGate) -> Tensor:
        ctx.gate = gate
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return (gradients[0] if ctx.gate.is_open else None), None


def _is_detach(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "detach"
    return node.op == "call_function" and node.target in _DETACH
