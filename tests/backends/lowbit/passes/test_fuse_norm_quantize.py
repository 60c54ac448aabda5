"""A group norm and the quantizer behind it become one operator that gives the same codes."""

import pytest
import torch
from norm_cases import draw, traced
from torch import nn

from mpqdm_fx.backends.lowbit.passes import FuseNormQuantize
from mpqdm_fx.testing import count

mpqdm = torch.ops.mpqdm


class Quantized(nn.Module):
    """Codes of a norm, quantized once for each number of parts."""

    def __init__(self, *parts, leaks=False):
        super().__init__()
        self.parts, self.leaks = parts, leaks
        self.register_buffer("weight", draw(8, seed=1).float())
        self.register_buffer("bias", draw(8, seed=2).float())

    def forward(self, x):
        y = mpqdm.group_norm_mixed(x, self.weight, self.bias, self.weight, 2, 1e-5, True)
        values = [value for parts in self.parts for value in mpqdm.quantize_mixed(y, parts)]
        return (*values, *([y] if self.leaks else []))


class Known(nn.Module):
    """Codes of a norm on known ranges."""

    def __init__(self, *scales, parts=()):
        super().__init__()
        self.norm, self.names = Quantized(*parts), [f"scale{i}" for i in range(len(scales))]
        for name, scale in zip(self.names, scales, strict=True):
            self.register_buffer(name, torch.tensor([scale]))
        self.register_buffer("zero_point", torch.tensor([-7], dtype=torch.int32))

    def forward(self, x):
        y = mpqdm.group_norm_mixed(
            x, self.norm.weight, self.norm.bias, self.norm.weight, 2, 1e-5, True
        )
        codes = [
            mpqdm.quantize_static_mixed(y, scale, self.zero_point)
            for scale in [getattr(self, name) for name in self.names] + [self.scale0]
        ]
        return (*codes, *[v for parts in self.norm.parts for v in mpqdm.quantize_mixed(y, parts)])


X = draw(3, 4, 5, 8).float()


@pytest.mark.parametrize("parts", [(3,), (3, 3)])
def test_quantizers_of_samples_are_fused(parts):
    graph = traced(Quantized(*parts), X, dynamic_batch=False)
    result = FuseNormQuantize()(graph).graph_module
    assert count(result, mpqdm.group_norm_quantize_mixed.default) == 1
    assert count(result, mpqdm.group_norm_mixed.default) == 0
    assert count(result, mpqdm.quantize_mixed.default) == 0
    for actual, expected in zip(result(X), graph(X), strict=True):
        assert torch.equal(actual, expected)


def test_readers_of_one_known_range_are_fused():
    graph = traced(Known(0.02), X, dynamic_batch=False)
    result = FuseNormQuantize()(graph).graph_module
    assert count(result, mpqdm.group_norm_quantize_static_mixed.default) == 1
    assert count(result, mpqdm.group_norm_mixed.default) == 0
    assert count(result, mpqdm.quantize_static_mixed.default) == 0
    for actual, expected in zip(result(X), graph(X), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("net", [Known(0.02, 0.03), Known(0.02, parts=(3,))])
def test_readers_of_several_ranges_are_not(net):
    assert not FuseNormQuantize()(traced(net, X, dynamic_batch=False)).modified


@pytest.mark.parametrize(
    "net", [Quantized(60), Quantized(3, 60), Quantized(1), Quantized(3, leaks=True)]
)
def test_a_norm_that_something_else_reads_is_not(net):
    graph = traced(net, X, dynamic_batch=False)
    assert not FuseNormQuantize()(graph).modified
