"""Write nearest upsampling as concatenations of an image with itself.

ExecuTorch (1.5.1) leaves `upsample_nearest2d` on a portable kernel, and XNNPACK's only resize is
bilinear. Channels last, a pixel is a row of numbers and an image row a longer one, so repeating
pixels and rows is joining a matrix to itself side by side: long copies, no arithmetic. (A product
with ones that broadcasts took 1.2 times as long, a transposed convolution thirty times.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.graph.upsampling import nearest_factors
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DecomposeUpsample"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class DecomposeUpsample(GraphPass):
    """Rewrite nearest upsampling of [N, C, H, W] and [N, C, L] by integer factors.

    1. The axes are moved to [N, H, W, C]. The matrix [N * H * W, C] joined b times to itself gives
       each pixel b times in its row, and [N * H, b * W * C] joined a times each row a times.
    2. Every part of a concatenation is a view of its own: the partitioner counts different inputs
       and refuses to join one node to itself.
    3. Factors are read off the sizes. Factors that the call gives besides must agree, because they,
       and not the sizes, say which pixel is nearest.
    4. Left alone: other factors, dynamic height or width, empty images.

    Numbers are only moved: bit-equal, NaN and signed zeros included.
    """

    # But the result lies channels last, where a convolution that follows may sum in another order,
    # and a later quantizer may then take the neighbouring code.
    tolerance: ClassVar[float] = 1e-2

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every call that the rules cover; False if there was none."""
        modified = False
        for node in list(graph_module.graph.nodes):
            factors = nearest_factors(node)
            if factors is not None:
                node.replace_all_uses_with(_joined(graph_module, node, factors))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _joined(graph_module: fx.GraphModule, node: fx.Node, factors: Sequence[int]) -> fx.Node:
    def emit(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return insert_call(graph_module, target, args, anchor=node)

    source = node.args[0]
    assert isinstance(source, fx.Node)
    _, channels, *size = source.meta["val"].shape
    axes = len(size)
    x = emit(_aten.permute.default, source, [0, *range(2, axes + 2), 1])
    run = channels  # numbers in a row of the matrix
    for length, factor in zip(reversed(size), reversed(factors), strict=True):
        if factor > 1:
            parts = [emit(_aten.reshape.default, x, [-1, run]) for _ in range(factor)]
            x = emit(_aten.cat.default, parts, -1)
        run *= length * factor
    larger = [length * factor for length, factor in zip(size, factors, strict=True)]
    x = emit(_aten.reshape.default, x, [-1, *larger, channels])
    return emit(_aten.permute.default, x, [0, axes + 1, *range(1, axes + 1)])
