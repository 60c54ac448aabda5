"""Chains that quantize at run time: choose_qparams, quantize, dequantize, as PT2E writes them.

    value -> choose_qparams.tensor -> getitem 0 (scale), getitem 1 (zero point)
    value, scale, zero point -> quantize_per_tensor.tensor -> dequantize_per_tensor.tensor

Backends look for this pattern in front of a layer and run it, together with the layer, as one
dynamic int8 kernel.
"""

import operator
from dataclasses import dataclass
from typing import Self

import torch
from torch import fx

from mpqdm_fx.graph.editing import infer_val, inherit_meta
from mpqdm_fx.graph.qdq import qdq_ops

__all__ = ["DynamicChain", "insert_dynamic_chain"]

# Smallest step that `choose_qparams` gives; the one of ExecuTorch's XNNPACK quantizer. The graph
# only names the kernel: XNNPACK chooses the step itself and has no smallest one.
EPS = 2.0**-12


@dataclass(frozen=True, kw_only=True)
class DynamicChain:
    """The nodes of one chain, in graph order.

    Attributes:
        choose: `choose_qparams.tensor`.
        scale: First result of `choose`.
        zero_point: Second result of `choose`.
        quantize: `quantize_per_tensor.tensor`.
        dequantize: `dequantize_per_tensor.tensor`, which the layer reads.
    """

    choose: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    quantize: fx.Node
    dequantize: fx.Node

    @classmethod
    def behind(cls, node: object) -> Self | None:
        """The chain that ends in `node`, or None if `node` is no dequantize node of one."""
        ops = qdq_ops()
        if not isinstance(node, fx.Node) or node.target is not ops.dequantize_per_tensor.tensor:
            return None
        quantize, scale, zero_point = node.args[:3]
        nodes = (quantize, scale, zero_point)
        if not all(isinstance(entry, fx.Node) for entry in nodes):
            return None
        assert isinstance(quantize, fx.Node)
        assert isinstance(scale, fx.Node)
        assert isinstance(zero_point, fx.Node)
        if quantize.target is not ops.quantize_per_tensor.tensor:
            return None
        if scale.target is not operator.getitem or zero_point.target is not operator.getitem:
            return None
        choose = scale.args[0]
        if not isinstance(choose, fx.Node) or choose.target is not ops.choose_qparams.tensor:
            return None
        return cls(
            choose=choose, scale=scale, zero_point=zero_point, quantize=quantize, dequantize=node
        )

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All five."""
        return (self.choose, self.scale, self.zero_point, self.quantize, self.dequantize)

    @property
    def value(self) -> fx.Node:
        """The float value that is quantized."""
        value = self.quantize.args[0]
        assert isinstance(value, fx.Node)
        return value

    @property
    def is_private(self) -> bool:
        """Whether one node reads the result and nobody else any node of the chain."""
        inside = set(self.nodes)
        outside = {user for node in self.nodes for user in node.users} - inside
        return len(outside) == 1 == len(self.dequantize.users)


def insert_dynamic_chain(
    graph_module: fx.GraphModule, value: fx.Node, *, after: fx.Node | None = None
) -> DynamicChain:
    """Insert an int8 chain of a value, without redirecting the value's users.

    Args:
        graph_module: Private copy to edit, in place.
        value: What is quantized, float. The new nodes inherit its provenance.
        after: Node to insert behind; default `value`, or the last placeholder if `value` is one.
    """
    graph, ops = graph_module.graph, qdq_ops()
    if after is None:
        after = value
        if value.op == "placeholder":  # placeholders stay together
            after = graph.find_nodes(op="placeholder")[-1]
    limits = (-128, 127)
    with graph.inserting_after(after):
        choose = graph.call_function(ops.choose_qparams.tensor, (value, *limits, EPS, torch.int8))
    with graph.inserting_after(choose):
        scale = graph.call_function(operator.getitem, (choose, 0))
    with graph.inserting_after(scale):
        zero_point = graph.call_function(operator.getitem, (choose, 1))
    qparams = (scale, zero_point, *limits, torch.int8)
    with graph.inserting_after(zero_point):
        quantize = graph.call_function(ops.quantize_per_tensor.tensor, (value, *qparams))
    with graph.inserting_after(quantize):
        dequantize = graph.call_function(ops.dequantize_per_tensor.tensor, (quantize, *qparams))
    chain = DynamicChain(
        choose=choose, scale=scale, zero_point=zero_point, quantize=quantize, dequantize=dequantize
    )
    for node in chain.nodes:
        inherit_meta(node, value)
        infer_val(graph_module, node)
    return chain
