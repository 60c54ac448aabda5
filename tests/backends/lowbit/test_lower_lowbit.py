"""Programs with own operators beside XNNPACK: written, partitioned, counted and run."""

import json
import sys

import pytest
import torch
from rounded_nets import Attention, Residual, measured_ranges, round_to_grid
from torch import nn
from torch.nn import functional

from mpqdm_fx.backends.kernel_library import calls_own_operators, has_kernels
from mpqdm_fx.backends.lowbit.lower import lower_lowbit, lower_lowbit_methods
from mpqdm_fx.backends.lowbit.method import LowbitMethod
from mpqdm_fx.backends.lowbit.passes import MoveLayouts
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ConfigError, LoweringError
from mpqdm_fx.graph.editing import copy_graph_module, replace_module
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.activations import (
    ActivationRange,
    DynamicActivation,
    StaticActivation,
    TimestepActivation,
)
from mpqdm_fx.testing import count

pytestmark = pytest.mark.xnnpack

EXACT_DB = 120.0
mpqdm = torch.ops.mpqdm


class Block(nn.Module):
    """A block of a UNet between layers that stay with XNNPACK."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1)
        self.time = nn.Linear(8, 16)
        self.norm2 = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 16, 1)
        self.conv_out = nn.Conv2d(16, 6, 5, padding=2)

    def forward(self, x, t):
        h = self.conv_in(x)
        y = self.conv1(functional.silu(self.norm(h))) + self.time(t)[:, :, None, None]
        y = self.conv2(functional.silu(self.norm2(y)))
        y = functional.interpolate(y, scale_factor=2.0) + self.shortcut(h)
        return self.conv_out(torch.cat([y, y * 0.5], 1)[:, 8:24])

    @staticmethod
    def inputs():
        generator = torch.Generator().manual_seed(1)
        return {
            "x": torch.randn(2, 3, 6, 10, generator=generator),
            "t": torch.randn(2, 8, generator=generator),
        }


def rounded(net):
    torch.manual_seed(0)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    graph = round_to_grid(trace(net.eval(), net.inputs()), 3)
    return graph, dict.fromkeys(weight_layers(graph), DynamicActivation()), net.inputs()


@pytest.fixture(scope="module")
def block():
    return rounded(Block())


@pytest.fixture(scope="module")
def written(block, tmp_path_factory):
    path = tmp_path_factory.mktemp("block") / "block.pte"
    return lower_lowbit(*block, path, kernels="memory")


def test_own_layers_stand_beside_layers_of_xnnpack(written):
    assert written.own_layers == ("conv1", "time", "conv2", "shortcut")
    assert written.left_layers.keys() == {"conv_in", "conv_out"}
    assert written.own_operators == {
        "mpqdm.conv2d_mixed.default": 2,
        "mpqdm.group_norm_quantize_mixed.default": 2,
        "mpqdm.linear_mixed.default": 2,
        "mpqdm.quantize_mixed.default": 2,
    }
    assert written.refusals == {}
    assert written.sqnr_db > EXACT_DB
    assert written.executed is has_kernels()


def test_crossings_and_copies_are_counted(written):
    # XNNPACK hands over the first image, for norm and shortcut alike, and the sum for the second
    # norm; each of the four own layers hands back what it gives.
    assert written.layout_copies == 2  # behind the first convolution, in front of the last
    assert written.layout_copy_bytes == 4 * 2 * 6 * 10 * (8 + 16)
    assert written.crossings == 6
    assert written.subgraphs == 3


def test_a_shortcut_in_float_reads_pixels_where_they_lie(block):
    graph, activations, inputs = block
    quantized = {name: a for name, a in activations.items() if name != "shortcut"}
    method = LowbitMethod(graph, inputs, quantized, kernels="memory")
    # as a convolution XNNPACK would copy its image to channels last, and the result back
    assert count(method.lowered, torch.ops.aten.linear.default) == 1
    assert count(method.lowered, torch.ops.aten.conv2d.default) == 2  # the first and the last


def test_the_record_is_plain_json(written):
    record = json.loads(json.dumps(written.to_dict()))
    assert record["own_layers"] == list(written.own_layers)
    assert record["left_layers"] == written.left_layers
    assert record["crossings"] == written.crossings
    assert record["executed"] is written.executed


def test_weights_are_stored_at_their_bits(tmp_path, block, written):
    stock = lower_xnnpack(*block, tmp_path / "stock.pte")
    assert written.bytes < stock.bytes
    assert calls_own_operators(written.path).startswith("mpqdm::")
    assert calls_own_operators(stock.path) is None


def test_without_the_library_the_program_is_refused(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpqdm_kernels", None)
    with pytest.raises(LoweringError, match=r"calls mpqdm::\w+_mixed, .*pip install"):
        XnnpackRunner(written.path)


@pytest.mark.parametrize("net", [Residual(), Attention()], ids=["residual", "attention"])
def test_small_nets(net, tmp_path):
    program = lower_lowbit(*rounded(net), tmp_path / "net.pte", kernels="memory")
    assert program.own_layers
    assert program.sqnr_db > EXACT_DB


@pytest.mark.parametrize(
    ("net", "own"),
    [
        (Block, ("conv1", "time", "conv2", "shortcut")),
        (Residual, ("conv1", "shortcut", "conv_out")),
        (Attention, ("to_q", "to_k", "to_v", "to_out")),
    ],
)
def test_fixed_ranges(net, own, tmp_path):
    graph, _, inputs = rounded(net())
    ranges = measured_ranges(graph, inputs)
    program = lower_lowbit(graph, ranges, inputs, tmp_path / "net.pte", kernels="memory")
    assert program.own_layers == own
    assert program.sqnr_db > EXACT_DB
    assert "mpqdm.quantize_mixed.default" not in program.own_operators


def test_norms_in_front_of_fixed_ranges_give_codes(tmp_path, block):
    graph, _, inputs = block
    ranges = measured_ranges(graph, inputs)
    method = LowbitMethod(graph, inputs, ranges, kernels="memory")
    assert count(method.prepared, mpqdm.group_norm_quantize_static_mixed.default) == 2
    left, read = weight_layers(method.prepared), method.choice.own
    assert set(left) == {"conv_in", "conv_out"}
    assert set(read) == {"conv1", "time", "conv2", "shortcut"}


class Shared(nn.Module):
    """A layer of XNNPACK (5x5) that is called on an own layer's output, and on a value before."""

    def __init__(self, bias):
        super().__init__()
        self.own, self.twin = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.wide = nn.Conv2d(8, 8, 5, padding=2, bias=bias)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.last(self.wide(self.own(x)) + self.wide(torch.relu(self.twin(x)) * 3.0))

    @staticmethod
    def inputs():
        return {"x": torch.randn(2, 8, 6, 7, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dynamic", [(), ("twin", "last"), ("wide",)])
def test_ranges_that_own_layers_and_xnnpack_s_share(tmp_path, bias, dynamic):
    graph, kinds, inputs = rounded(Shared(bias))
    ranges = measured_ranges(graph, inputs) | {name: kinds[name] for name in dynamic}
    with torch.no_grad():
        method = LowbitMethod(graph, inputs, ranges, kernels="memory")
        assert method.choice.own == ("own", "twin", "last")
        actual, expected = method.prepared(*method.inputs), method.quantized(*method.inputs)
    assert sqnr_db(expected, actual) > EXACT_DB
    split = {"wide", "wide_call"} if "wide" not in dynamic else {"wide"}
    assert set(weight_layers(method.prepared)) == split
    program = lower_lowbit(graph, ranges, inputs, tmp_path / "net.pte", kernels="memory")
    assert program.sqnr_db > method.expected.bound_db


def test_own_layers_keep_biases_and_channels_that_integers_cannot_hold(tmp_path, block):
    graph, _, inputs = block
    ranges = measured_ranges(graph, inputs)
    tiny = weight_layers(graph)["conv1"].module
    tiny = install_codes(tiny, tiny.weight_codes, tiny.weight_scale * 1e-9)
    graph = copy_graph_module(graph)
    replace_module(graph, "conv1", tiny)
    method = LowbitMethod(graph, inputs, ranges, kernels="memory")
    layers = weight_layers(method.quantized)
    assert torch.equal(layers["conv1"].module.weight_codes, tiny.weight_codes)
    assert torch.equal(layers["conv1"].module.bias, tiny.bias)
    conv_in = weight_layers(graph)["conv_in"].module
    assert not torch.equal(layers["conv_in"].module.bias, conv_in.bias)
    with torch.no_grad():
        actual, expected = method.prepared(*method.inputs), method.quantized(*method.inputs)
    assert sqnr_db(expected, actual) > EXACT_DB


def test_ranges_by_noise_level_are_refused_by_name(tmp_path, block):
    graph, activations, inputs = block
    grid = ActivationRange(scale=0.05, zero_point=3)
    pair = StaticActivation(input=grid, output=grid)
    mixed = activations | {"conv1": TimestepActivation(groups=(pair, pair))}
    with pytest.raises(LoweringError, match=r'conv1: .* noise level.*activation_mode="static"'):
        lower_lowbit(graph, mixed, inputs, tmp_path / "net.pte", kernels="memory")


@pytest.mark.matrix
def test_without_own_layers_the_program_is_that_of_xnnpack(tmp_path, block):
    own = lower_lowbit(*block, tmp_path / "own.pte", kernels="xnnpack")
    stock = lower_xnnpack(*block, tmp_path / "stock.pte")
    assert own.executed
    assert (own.own_layers, own.own_operators, own.crossings) == ((), {}, 0)
    assert (own.bytes, own.subgraphs, own.refusals) == (
        stock.bytes,
        stock.subgraphs,
        stock.refusals,
    )


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x):
        return {"h": torch.relu(self.conv(x))}


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, h):
        return self.last(h)


@pytest.mark.parametrize("apart", [False, True])
def test_methods_and_weights_in_a_file_of_their_own(tmp_path, apart):
    x = {"x": torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1))}
    torch.manual_seed(0)
    head = round_to_grid(trace(Head().eval(), x), 2)
    tail = round_to_grid(trace(Tail().eval(), {"h": torch.randn(2, 8, 5, 7)}), 2)
    programs = lower_lowbit_methods(
        {"head": head, "tail": tail},
        {"head": x},
        tmp_path / "both.pte",
        ranges=dict.fromkeys(["conv", "last"], DynamicActivation()),
        kernels="memory",
        external_weights=apart,
    )
    assert [program.own_layers for program in programs.values()] == [("conv",), ("last",)]
    assert all(program.sqnr_db > EXACT_DB for program in programs.values())
    assert (programs["head"].weights_path is not None) is apart


def test_other_numbers_are_refused(tmp_path, block, monkeypatch):
    def wrong(self, graph_module):
        (layer, *_) = graph_module.graph.find_nodes(
            op="call_function", target=torch.ops.mpqdm.conv2d_mixed.default
        )
        (scale,) = [node for node in layer.all_input_nodes if node is layer.args[1]]
        with graph_module.graph.inserting_before(layer):
            twice = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (scale, 2.0))
        layer.update_arg(1, twice)
        return True

    monkeypatch.setattr(MoveLayouts, "rewrite", wrong)
    with pytest.raises(LoweringError, match="differs from the graph it was made of"):
        lower_lowbit(*block, tmp_path / "wrong.pte", kernels="memory")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"kernels": "all"}, {"cpu": "z80"}, {"four_bit": "half"}])
def test_unknown_settings_are_refused(tmp_path, block, settings):
    with pytest.raises(ConfigError, match="choose one of"):
        lower_lowbit(*block, tmp_path / "net.pte", **settings)


def test_too_many_delegates_are_refused_with_their_reasons(tmp_path, block):
    with pytest.raises(LoweringError, match="conv2d_mixed") as refusal:
        lower_lowbit(*block, tmp_path / "net.pte", kernels="memory", max_delegates=1)
    assert "would have 3 delegates" in str(refusal.value)
