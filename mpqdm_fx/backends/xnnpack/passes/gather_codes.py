"""Read rows of large rounded embeddings as the integers that they are.

No kernel multiplies by an embedding, so a program would hold its rounded weight in float32: of a
CLIP text encoder 152 MB for 38, of Gemma 2's 2.4 GB for 0.6. ExecuTorch's (1.5.1) portable kernel
copies rows of any dtype.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.editing import add_tensor, insert_call
from mpqdm_fx.graph.layers import EMBEDDINGS, WeightLayer, weight_layers
from mpqdm_fx.passes.base import GraphPass

__all__ = ["GatherCodes"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class GatherCodes(GraphPass):
    """Replace calls of a rounded embedding by rows of its codes times rows of its scale.

    A weight is its code times its channel's scale exactly (`RoundWeights`), so this is bit-equal.

    Attributes:
        least: Smallest number of weights; a small table is not worth three more operators.
    """

    least: int = 1 << 16

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Tables of any size."""
        return (cls(least=1),)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every such call; False if there was none."""
        modified = False
        for name, layer in weight_layers(graph_module, embeddings=True).items():
            if self._fits(layer):
                codes, scale = layer.module.weight_codes, layer.module.weight_scale
                assert isinstance(codes, Tensor)
                assert isinstance(scale, Tensor)
                for call in layer.nodes:
                    _rewrite_call(graph_module, call, name, codes, scale)
                modified = True
        return modified

    def _fits(self, layer: WeightLayer) -> bool:
        module = layer.module
        return (
            isinstance(module, EMBEDDINGS)
            and isinstance(module, nn.Embedding)
            and {"weight_codes", "weight_scale"} <= set(module._buffers)
            and module.max_norm is None
            and module.weight.numel() >= self.least
            and module.weight.dtype == torch.float32
            and all(len(node.args) == 1 and not node.kwargs for node in layer.nodes)
        )


def _rewrite_call(
    graph_module: fx.GraphModule, call: fx.Node, name: str, codes: Tensor, scale: Tensor
) -> None:
    ids = call.args[0]
    rows = []
    for kind, table in (("codes", codes), ("scale", scale[:, None].contiguous())):
        stored = add_tensor(graph_module, f"{name}_{kind}", table, anchor=call)
        rows.append(insert_call(graph_module, _aten.embedding.default, (stored, ids), anchor=call))
    whole, step = rows
    numbers = insert_call(
        graph_module, _aten._to_copy.default, (whole,), {"dtype": torch.float32}, anchor=call
    )
    result = insert_call(graph_module, _aten.mul.Tensor, (numbers, step), anchor=call)
    call.replace_all_uses_with(result)
    graph_module.graph.erase_node(call)
