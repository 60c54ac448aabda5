"""Values inside a `.pte` are those of the nodes that they are said to be, in whatever form."""

import pytest
import torch
from node_values import node_values
from rounded_nets import Attention, MovedOutput, Residual, SharedOutput, rounded, widen_inputs
from torch import nn
from torch.nn import functional

from mpqdm_fx.backends.xnnpack.inner_values import InnerValues
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.parity.fused_values import fused_value
from mpqdm_fx.parity.sites import WEIGHT_OPS, sites
from mpqdm_fx.records.activations import DynamicActivation

pytestmark = pytest.mark.xnnpack


class Cube(nn.Module):
    """Every axis behind the batch has one size, so that no shape tells the memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        h = functional.silu(self.first(x) + x.transpose(1, 3))
        return self.last(h * torch.sigmoid(self.mix(h)))

    @staticmethod
    def inputs():
        return {"x": torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(6))}


class Rectified(nn.Module):
    """Activations that ExecuTorch makes a part of the layer in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))

    @staticmethod
    def inputs():
        return {"x": torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(7))}


class Line(nn.Module):
    """A Conv1d, which XNNPACK runs as an image one pixel high."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.mix = nn.Conv1d(3, 4, 3, padding=1), nn.Linear(7, 5)

    def forward(self, x):
        return self.mix(torch.tanh(self.line(x)))

    @staticmethod
    def inputs():
        return {"x": torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(8))}


def lowered(net, folder, mode):
    graph, ranges, inputs = rounded(net)
    if mode == "dynamic":
        ranges = dict.fromkeys(ranges, DynamicActivation())
    elif mode == "mixed":
        ranges = {n: DynamicActivation() if i % 2 else r for i, (n, r) in enumerate(ranges.items())}
    elif mode == "widened":
        ranges = widen_inputs(ranges, ("after",))
    program = lower_xnnpack(graph, ranges, inputs, folder / "net.pte", keep_graphs=True)
    return program, tuple(inputs.values())


CASES = [
    pytest.param(Residual(), "static", id="residual, static"),
    pytest.param(Residual(), "dynamic", id="residual, dynamic", marks=pytest.mark.matrix),
    pytest.param(Residual(), "mixed", id="residual, mixed"),
    pytest.param(Attention(), "static", id="attention, static"),
    pytest.param(Attention(), "dynamic", id="attention, dynamic", marks=pytest.mark.matrix),
    pytest.param(SharedOutput(), "static", id="two delegates"),
    pytest.param(MovedOutput("relu"), "widened", id="relu of codes"),
    pytest.param(MovedOutput("cat"), "widened", id="concatenation of codes"),
    pytest.param(Rectified(), "static", id="activation in an int8 layer"),
    pytest.param(Rectified(), "dynamic", id="activation in a dynamic layer"),
    pytest.param(Cube(), "static", id="cube, static"),
    pytest.param(Cube(), "dynamic", id="cube, dynamic"),
    pytest.param(Line(), "static", id="line"),
]


@pytest.mark.parametrize(("net", "mode"), CASES)
def test_every_value_is_that_of_its_node(net, mode, tmp_path):
    program, inputs = lowered(net, tmp_path, mode)
    written = program.path.read_bytes()
    inner = InnerValues(program.path, None, program.graphs.edge)
    places = sites(program.graphs.edge)
    layers = [node for site, node in places.items() if site.op in WEIGHT_OPS]
    assert set(layers) <= set(inner.held)
    outputs, values = inner.run(inputs, inner.held)
    assert set(values) == set(inner.held)
    for ours, own in zip(outputs, XnnpackRunner(program.path)(*inputs), strict=True):
        assert torch.equal(ours, own)
    assert program.path.read_bytes() == written
    expected = node_values(program.graphs.edge, inputs)
    # per-tensor ranges of the edge graph stand for those per row that dynamic kernels have
    least = 25 if mode in ("dynamic", "mixed") else 80
    for node, value in values.items():
        same = fused_value(node, inner.held[node])
        assert same is not None
        assert sqnr_db(expected[same], value) > least, node


def test_what_is_rounded_or_clamped_in_the_program_says_so(tmp_path):
    program, _ = lowered(Rectified(), tmp_path, "static")
    inner = InnerValues(program.path, None, program.graphs.edge)
    held = {
        site.module: inner.held[node]
        for site, node in sites(program.graphs.edge).items()
        if site.op in WEIGHT_OPS
    }
    assert held["first"].codes is not None
    assert held["last"].codes[0] == torch.tensor(program.output_scale, dtype=torch.float32)


def test_only_the_wanted_values_are_shown(tmp_path):
    program, inputs = lowered(Residual(), tmp_path, "static")
    inner = InnerValues(program.path, None, program.graphs.edge)
    first, second, *_ = inner.held
    for nodes in ({first}, {second}, {first, second}, set()):
        assert set(inner.run(inputs, nodes)[1]) == nodes


def test_weights_in_a_file_of_their_own_are_read_there(tmp_path):
    graph, ranges, inputs = rounded(Residual())
    whole = lower_xnnpack(graph, ranges, inputs, tmp_path / "whole.pte", keep_graphs=True)
    parted = lower_xnnpack(
        graph, ranges, inputs, tmp_path / "net.pte", keep_graphs=True, external_weights=True
    )
    sides = []
    for program in (whole, parted):
        inner = InnerValues(program.path, program.weights_path, program.graphs.edge)
        values = inner.run(tuple(inputs.values()), inner.held)[1]
        sides.append({node.name: value for node, value in values.items()})
    assert sides[0].keys() == sides[1].keys()
    assert all(torch.equal(value, sides[1][name]) for name, value in sides[0].items())
