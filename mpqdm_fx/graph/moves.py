"""Operators that move numbers about without looking at them."""

import torch

__all__ = ["MOVES"]

_aten = torch.ops.aten

#: They rearrange, repeat, join or pick numbers.
MOVES = frozenset(
    {
        _aten.cat.default,
        _aten.expand.default,
        _aten.flatten.using_ints,
        _aten.permute.default,
        _aten.repeat.default,
        _aten.repeat_interleave.self_int,
        _aten.reshape.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.squeeze.dim,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)
