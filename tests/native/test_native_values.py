"""Values of own operators inside a program are those of the nodes that they are said to be."""

import pytest
import torch
from node_values import node_values
from rounded_nets import round_to_grid
from torch import nn
from torch.nn import functional

from mpqdm_fx.backends.lowbit.lower import lower_lowbit
from mpqdm_fx.backends.xnnpack.inner_values import InnerValues
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.parity.sites import matching_sites
from mpqdm_fx.records.activations import DynamicActivation

pytestmark = [pytest.mark.xnnpack, pytest.mark.usefixtures("runtime")]


class Branches(nn.Module):
    """Own layers of one shape on branches, which partitioning is free to reorder."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.twice = nn.Conv2d(8, 8, 1)
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, t):
        h = functional.silu(self.norm(x))
        shifts = [mix(t)[:, :, None, None] for mix in self.mixes]
        y = x
        for conv, shift in zip(self.convs, shifts, strict=True):
            y = y + torch.sigmoid(conv(h) + shift) * self.twice(y)
        return y


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 8, 6, 5), "t": torch.randn(2, 8)}
    graph = round_to_grid(trace(Branches().eval(), inputs), 3)
    return graph, dict.fromkeys(weight_layers(graph), DynamicActivation()), inputs


@pytest.mark.parametrize("apart", [False, True])
def test_own_layers_compute_inside_what_their_references_do(net, tmp_path, apart):
    graph, ranges, inputs = net
    program = lower_lowbit(
        graph,
        ranges,
        inputs,
        tmp_path / "net.pte",
        kernels="memory",
        keep_graphs=True,
        external_weights=apart,
    )
    assert set(program.own_layers) == set(ranges)
    mixed, edge = program.graphs.mixed, program.graphs.edge
    inner = InnerValues(program.path, program.weights_path, edge)
    pairs = matching_sites(mixed, edge)
    layers = {site: pair for site, pair in pairs.items() if site.op in ("convolution", "linear")}
    shown = {site.module for site, (_, node) in layers.items() if node in inner.held}
    assert shown == set(ranges) - {"twice"}  # its calls read the same weights
    _, values = inner.run(tuple(inputs.values()), inner.held)
    expected = node_values(mixed, tuple(inputs.values()))
    compared = [
        sqnr_db(expected[left], values[right])
        for left, right in pairs.values()
        if right in values and values[right].shape == expected[left].shape
    ]
    assert len(compared) > len(shown)
    assert min(compared) > 100
