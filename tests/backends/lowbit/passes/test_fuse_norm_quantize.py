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
        y = mpqdm.group_norm_mixed(x, self.weight, self.bias, 2, 1e-5, True)
        values = [value for parts in self.parts for value in mpqdm.quantize_mixed(y, parts)]
        return (*values, *([y] if self.leaks else []))


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


@pytest.mark.parametrize(
    "net", [Quantized(60), Quantized(3, 60), Quantized(1), Quantized(3, leaks=True)]
)
def test_a_norm_that_something_else_reads_is_not(net):
    graph = traced(net, X, dynamic_batch=False)
    assert not FuseNormQuantize()(graph).modified
