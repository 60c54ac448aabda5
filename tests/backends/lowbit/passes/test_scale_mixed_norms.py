"""Factors of channels behind a group norm become the norm's own."""

import pytest
import torch
from norm_cases import draw, traced
from torch import nn

from mpqdm_fx.backends.lowbit.passes import FuseNormQuantize, ScaleMixedNorms
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.testing import count

aten, mpqdm = torch.ops.aten, torch.ops.mpqdm
X = draw(3, 4, 5, 8).float()


class Scaled(nn.Module):
    """A norm, a product with a constant of `shape`, and codes."""

    def __init__(self, *shape, leaks=False, swapped=False, scaled=False):
        super().__init__()
        self.shape, self.leaks, self.swapped = shape, leaks, swapped
        self.register_buffer("factor", draw(max(shape), seed=3).float())
        self.register_buffer("weight", draw(8, seed=1).float())
        self.register_buffer("bias", draw(8, seed=2).float())
        self.register_buffer("inner", draw(8, seed=4).float() if scaled else torch.ones(8))

    def forward(self, x):
        y = mpqdm.group_norm_mixed(x, self.weight, self.bias, self.inner, 2, 1e-5, True)
        factor = self.factor.reshape(1, -1).reshape(self.shape)
        z = factor * y if self.swapped else y * factor
        return (*mpqdm.quantize_mixed(z, 3), *([y] if self.leaks else []))


@pytest.mark.parametrize("net", [Scaled(1, 1, 1, 8), Scaled(8), Scaled(1, 8, swapped=True)])
def test_the_norm_writes_the_codes_of_the_product(net):
    graph = traced(net, X, dynamic_batch=False)
    result = Pipeline(passes=(ScaleMixedNorms(), FuseNormQuantize()))(graph).graph_module
    assert count(result, mpqdm.group_norm_quantize_mixed.default) == 1
    assert count(result, aten.mul.Tensor) == 0
    for actual, expected in zip(result(X), graph(X), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "net",
    [
        Scaled(1, 1, 1, 8, leaks=True),
        Scaled(1, 1, 1, 8, scaled=True),  # two factors would be rounded otherwise
        Scaled(1, 1, 1, 1),
        Scaled(1, 1, 5, 1),
    ],
)
def test_other_products_stay(net):
    assert not ScaleMixedNorms()(traced(net, X, dynamic_batch=False)).modified


def test_a_product_with_a_value_stays():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("ones", torch.ones(8))

        def forward(self, x):
            normal = mpqdm.group_norm_mixed(x, self.ones, self.ones, self.ones, 2, 1e-5, True)
            return normal * x.mean((1, 2), keepdim=True)

    assert not ScaleMixedNorms()(traced(Gate(), X, dynamic_batch=False)).modified
