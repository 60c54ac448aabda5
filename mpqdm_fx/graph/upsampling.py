"""Nearest upsampling by whole factors: every pixel repeated, none computed."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

__all__ = ["nearest_factors"]

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


def nearest_factors(node: fx.Node) -> list[int] | None:
    """Integer factor of each spatial axis; None if the node is no such upsampling.

    Factors are read off the sizes. Factors that the call gives besides must agree, because they,
    and not the sizes, say which pixel is nearest.

    Args:
        node: Any node, with static values in `meta["val"]`.
    """
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
