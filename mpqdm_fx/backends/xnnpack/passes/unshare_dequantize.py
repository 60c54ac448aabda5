"""Give every user of a dequantized value its own dequantize node.

ExecuTorch's XNNPACK partitioner (1.5.1, `partition/config/generic_node_configs.py`) takes the
dequantize inputs of `dequantize -> op -> quantize` into the op and keeps their values as int8,
without looking for other users. A shared one then hands int8 codes to a reader that expects
float32: the program runs and its numbers are noise. Other graphs cannot be lowered ("Invalid
partition, found dependency cycles").
"""

from dataclasses import dataclass
from typing import Any

from torch import fx

from mpqdm_fx.graph.qdq import qdq_ops
from mpqdm_fx.passes.base import GraphPass

__all__ = ["UnshareDequantize"]


@dataclass(frozen=True, kw_only=True)
class UnshareDequantize(GraphPass):
    """Clone dequantize nodes until each has one user.

    1. Per-tensor (activations) and per-channel (weights of a layer called twice) alike.
    2. The first user keeps the node; each further one gets a copy right behind it.
    3. The result computes the same numbers: a dequantize node has no state.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Clone; False if no dequantize node was shared."""
        ops = qdq_ops()
        targets: tuple[Any, ...] = (
            ops.dequantize_per_tensor.default,
            ops.dequantize_per_channel.default,
        )
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target not in targets:
                continue
            for user in list(node.users)[1:]:
                with graph_module.graph.inserting_after(node):
                    clone = graph_module.graph.node_copy(node)
                user.replace_input_with(node, clone)
                modified = True
        return modified
