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
from torch import Tensor, fx

from mpqdm_fx.graph.editing import insert_call
from mpqdm_fx.passes.base import GraphPass

__all__ = ["DecomposeUpsample"]

_aten = torch.ops.aten

#: Ops that give an output size and one list of factors.
_LISTED = frozenset(
    {
        _aten.upsample_nearest1d.vec,
        _aten.upsample_nearest2d.vec,
        _aten._upsample_nearest_exact1d.vec,
        _aten._upsample_nearest_exact2d.vec,
    }
)
#: Ops that give an output size and each factor as an argument of its own.
_SEPARATE = frozenset(
    {
        _aten.upsample_nearest1d.default,
        _aten.upsample_nearest2d.default,
        _aten._upsample_nearest_exact1d.default,
        _aten._upsample_nearest_exact2d.default,
    }
)


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
            factors = _factors(node)
            if factors is not None:
                node.replace_all_uses_with(_joined(graph_module, node, factors))
                graph_module.graph.erase_node(node)
                modified = True
        return modified


def _factors(node: fx.Node) -> list[int] | None:
    """Integer factor of each spatial axis, or None if the rules do not cover the node."""
    source = node.args[0] if node.args else None
    if node.target not in _LISTED | _SEPARATE or not isinstance(source, fx.Node):
        return None
    image, result = source.meta.get("val"), node.meta.get("val")
    if not isinstance(image, Tensor) or not isinstance(result, Tensor):
        return None
    before, after = list(image.shape[2:]), list(result.shape[2:])
    if not all(isinstance(n, int) and n > 0 for n in (image.shape[1], *before, *after)):
        return None
    if any(new % old for old, new in zip(before, after, strict=True)):
        return None
    factors = [new // old for old, new in zip(before, after, strict=True)]
    return factors if _agree(_given(node), factors) else None


def _given(node: fx.Node) -> Sequence[object]:
    """Factors that the call itself gives."""
    if node.target in _SEPARATE:
        named = [v for k, v in node.kwargs.items() if k.startswith("scales")]
        return [*node.args[2:], *named]
    listed = node.args[2] if len(node.args) > 2 else node.kwargs.get("scale_factors")
    return listed if isinstance(listed, list | tuple) else []


def _agree(given: Sequence[object], factors: Sequence[int]) -> bool:
    if len(given) not in (0, len(factors)):
        return False
    return all(g is None or g == f for g, f in zip(given, factors, strict=False))


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
