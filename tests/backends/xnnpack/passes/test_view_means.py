"""Means over any axes become means over the last two of four, which XNNPACK takes."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import assert_close, draw, outputs, randomized, targets, traced
from torch import nn

from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.passes import ViewMeans

aten = torch.ops.aten


@given(data=st.data())
def test_every_mean_is_the_same_in_the_form_that_xnnpack_takes(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    axis = st.integers(-len(shape), len(shape) - 1)
    axes = data.draw(st.lists(axis, min_size=1, unique_by=lambda a: a % len(shape)))
    keeps = data.draw(st.booleans())
    x = draw(*shape).float()
    graph = traced(lambda m, x: x.mean(axes, keepdim=keeps) + 1, x, dynamic_batch=False)
    result = ViewMeans()(graph)
    assert_close(outputs(result.graph_module, x), outputs(graph, x), ViewMeans.tolerance)
    for node in result.graph_module.graph.nodes:
        if node.target is aten.mean.dim:
            assert node.args[0].meta["val"].dim() == 4
            assert node.args[1:] in (([2, 3], True), ([-2, -1], True))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m, x: x.mean(), (2, 3)),
        (lambda m, x: x.mean((-2, -1), keepdim=True), (2, 3, 4, 5)),
        (lambda m, x: x.mean(-1, dtype=torch.float64), (2, 3)),
        (lambda m, x: x.half().mean(-1), (2, 3)),
        (lambda m, x: x.mean(0), (2, 3)),  # the batch, which is dynamic
    ],
)
def test_other_means_are_left_alone(function, shape):
    assert not ViewMeans()(traced(function, draw(*shape).float())).modified


@pytest.mark.parametrize("batch", [1, 3])
def test_a_dynamic_batch_stays_dynamic(batch):
    graph = traced(
        lambda m, x: x.mean(1, keepdim=True) * x.mean((1, 2))[:, None, None], draw(2, 3, 4).float()
    )
    result = ViewMeans()(graph)
    assert result.modified
    x = draw(batch, 3, 4, seed=1).float()
    expected = x.mean(1, keepdim=True) * x.mean((1, 2))[:, None, None]
    assert_close(outputs(result.graph_module, x), expected)


class ImageNorm(nn.Module):
    """A norm over the channels of an image, as models write it."""

    def forward(self, x):
        d = x - x.mean(1, keepdim=True)
        return d / (d.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.image = nn.Conv2d(3, 8, 1), ImageNorm()
        self.mix, self.tokens = nn.Linear(8, 8), RMSNorm(8, 1e-6, bias=True)

    def forward(self, x):
        h = self.image(self.conv(x)).flatten(2).transpose(1, 2)
        return self.tokens(self.mix(h)).mean(1)


@pytest.mark.xnnpack
def test_norms_that_a_model_writes_itself_are_one_delegate(tmp_path):
    x = draw(2, 3, 5, 4).float()
    graph = traced(randomized(Norms()), x, dynamic_batch=False)
    assert aten.mean.dim in targets(graph)
    program = lower_xnnpack_float(graph, (x,), tmp_path / "norms.pte")
    assert (program.subgraphs, program.undelegated) == (1, 0), program.refusals
    assert program.sqnr_db > 100
