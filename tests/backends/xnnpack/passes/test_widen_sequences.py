"""1-D convolutions are 2-D ones over one row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounded_nets import round_to_grid
from torch import nn

from mpqdm_fx.backends.xnnpack.passes import WidenSequences
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers


@st.composite
def layers(draw):
    stride = draw(st.integers(1, 2))
    same = draw(st.booleans()) and stride == 1
    groups = draw(st.sampled_from([1, 2]))
    return nn.Conv1d(
        4,
        6,
        draw(st.integers(1, 3)),
        stride=stride,
        padding="same" if same else draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
    )


@given(layer=layers(), batch=st.integers(1, 2))
def test_it_computes_the_same_with_the_same_integers(layer, batch):
    x = torch.randn(batch, 4, 9, generator=torch.Generator().manual_seed(0))
    graph = round_to_grid(trace(nn.Sequential(layer).eval(), (x,)))
    result = WidenSequences()(graph)
    assert result.modified
    (old,), (new,) = (weight_layers(g).values() for g in (graph, result.graph_module))
    assert (new.name, type(new.module)) == (old.name, nn.Conv2d)
    assert torch.equal(new.module.weight_codes.squeeze(2), old.module.weight_codes)
    assert torch.equal(new.module.weight_scale, old.module.weight_scale)
    torch.testing.assert_close(result.graph_module(x), graph(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["circular", "without a batch"])
def test_others_stay_as_they_are(name):
    mode = "circular" if name == "circular" else "zeros"
    layer = nn.Conv1d(4, 4, 3, padding=1, padding_mode=mode)
    x = torch.randn(4, 9) if name == "without a batch" else torch.randn(2, 4, 9)
    graph = trace(nn.Sequential(layer).eval(), (x,), dynamic_batch=False)
    assert not WidenSequences()(graph).modified
