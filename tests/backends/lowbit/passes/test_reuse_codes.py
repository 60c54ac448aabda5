"""Readers of a value's own range read its codes; all others its numbers."""

import pytest
import torch
from norm_cases import traced
from torch import nn

from mpqdm_fx.backends.lowbit.passes import ReuseCodes
from mpqdm_fx.testing import count

mpqdm = torch.ops.mpqdm


class Chain(nn.Module):
    """Codes, their numbers, and codes of these on the same range or another."""

    def __init__(self, same, leaks=False, between=False):
        super().__init__()
        self.same, self.leaks, self.between = same, leaks, between
        self.register_buffer("scale", torch.tensor([0.1]))
        self.register_buffer("other", torch.tensor([0.2]))
        self.register_buffer("zero_point", torch.tensor([3], dtype=torch.int32))

    def forward(self, x):
        first = mpqdm.quantize_static_mixed(x, self.scale, self.zero_point)
        y = mpqdm.dequantize_mixed(first, self.scale, self.zero_point)
        z = torch.relu(y) if self.between else y
        scale = self.scale if self.same else self.other
        second = mpqdm.quantize_static_mixed(z, scale, self.zero_point)
        return (second, y) if self.leaks else (second,)


X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("leaks", [False, True])
def test_codes_of_one_range_are_read(leaks):
    graph = traced(Chain(same=True, leaks=leaks), X, dynamic_batch=False)
    result = ReuseCodes()(graph).graph_module
    assert count(result, mpqdm.quantize_static_mixed.default) == 1
    assert count(result, mpqdm.dequantize_mixed.default) == leaks
    for actual, expected in zip(result(X), graph(X), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("net", [Chain(same=False), Chain(same=True, between=True)])
def test_other_codes_are_computed(net):
    assert not ReuseCodes()(traced(net, X, dynamic_batch=False)).modified
