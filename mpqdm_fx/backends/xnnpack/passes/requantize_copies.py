"""Bring the inputs of a data-moving op to the parameters of the quantize node behind it.

XNNPACK runs `dequantize.. -> op -> quantize` as one int8 op. For an op that only moves numbers
(cat, view, permute, slice) its kernel moves codes, so all inputs and the output must have the same
scale and zero point. ExecuTorch (1.5.1) sees to that for a slice alone: a portable kernel runs it,
which parts the program in two. With the others the program fails to load, or (relu) rounds
otherwise.
"""

from dataclasses import dataclass

import torch
from torch import fx

from mpqdm_fx.graph.qdq import insert_pair, is_dequantize, is_quantize, qdq_parameters
from mpqdm_fx.passes.base import GraphPass

__all__ = ["RequantizeCopies"]

_aten = torch.ops.aten

#: Ops that move numbers or pick among them, in an order that quantizing keeps: `q(op(x)) =
#: op(q(x))` exactly. All overloads.
MOVING_OPS = frozenset(
    {
        _aten.cat,
        _aten.clamp,
        _aten.clamp_max,
        _aten.clamp_min,
        _aten.clone,
        _aten.contiguous,
        _aten.expand,
        _aten.flatten,
        _aten.hardtanh,
        _aten.max_pool2d,
        _aten.permute,
        _aten.relu,
        _aten.relu6,
        _aten.reshape,
        _aten.select,
        _aten.slice,
        _aten.squeeze,
        _aten.t,
        _aten.transpose,
        _aten.unflatten,
        _aten.unsqueeze,
        _aten.view,
    }
)


@dataclass(frozen=True, kw_only=True)
class RequantizeCopies(GraphPass):
    """Requantize in front of moving ops, so that they move codes of one kind.

    1. A moving op (`MOVING_OPS`) is meant whose tensor inputs are all dequantize nodes and whose
       only user is a quantize node.
    2. Each input with other parameters than that user gets quantize and dequantize with the
       user's parameters.
    3. The result computes the same numbers: what the user would have rounded is rounded earlier,
       and rounding a number that is on the grid changes nothing.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Insert the pairs; False if all parameters agreed."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if getattr(node.target, "overloadpacket", None) not in MOVING_OPS:
                continue
            users = list(node.users)
            if len(users) != 1 or not is_quantize(users[0]):
                continue
            inputs = node.all_input_nodes
            if not all(is_dequantize(source) for source in inputs):
                continue
            parameters = qdq_parameters(users[0])
            for source in inputs:
                if qdq_parameters(source) != parameters:
                    node.replace_input_with(source, insert_pair(graph_module, source, parameters))
                    modified = True
        return modified
