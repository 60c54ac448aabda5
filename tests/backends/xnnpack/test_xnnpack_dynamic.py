"""Dynamic int8 activations on XNNPACK: right numbers on graphs where stock ExecuTorch has none."""

import json
import logging
import math

import pytest
import torch
from rounded_nets import Attention, Residual, SharedOutput, rounded
from torch import nn
from torch.nn import functional

from mpqdm_fx.backends.pt2e import WEIGHT_OPS
from mpqdm_fx.backends.xnnpack import convert
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack
from mpqdm_fx.backends.xnnpack.passes import PinLayouts, UnshareDynamicQuantizers
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ConfigError, LoweringError
from mpqdm_fx.passes import QuantizeActivations
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.records.activations import (
    ActivationRange,
    DynamicActivation,
    StaticActivation,
    TimestepActivation,
)

pytestmark = pytest.mark.xnnpack

DYNAMIC = DynamicActivation()

# What is left of the difference when all codes agree: sums of float32 in another order.
EXACT_DB = 120.0


class Net(nn.Module):
    """Layers and what is done with them: `compute(self, x)`."""

    def __init__(self, shape, compute, **layers):
        super().__init__()
        self.shape, self.compute = shape, compute
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.compute(self, x)

    def inputs(self):
        return {"x": torch.randn(self.shape, generator=torch.Generator().manual_seed(1))}


def conv(channels=16, out=5, kernel=3, **settings):
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, **settings)


# Batch 2; channels, height and width all different, but for the last, where stock is silently
# wrong.
RESHAPED = Net((2, 4, 4, 96), lambda s, x: s.a(x.reshape(2, 16, 8, 12)), a=conv())
RANK_3 = Net((2, 16, 96), lambda s, x: s.a(x.reshape(2, 16, 8, 12)), a=conv())
SHARED = Net((2, 16, 8, 12), lambda s, x: (s.a(x), s.b(x)), a=conv(), b=nn.Linear(12, 7))
BEHIND = Net((2, 16, 8, 12), lambda s, x: s.b(s.a(x)), a=conv(), b=nn.Linear(12, 7))
SQUARE = Net((2, 4, 4, 256), lambda s, x: s.a(x.reshape(2, 16, 16, 16)), a=conv())
FAILURES = [
    pytest.param(RESHAPED, r"refuses.*with error 0x1\)", id="convolution on a reshaped root"),
    pytest.param(RANK_3, "ChannelsLastTaggedReshapePass", id="root of rank 3"),
    pytest.param(SHARED, "Weight and Input should both", id="convolution and linear on one value"),
    pytest.param(BEHIND, "Weight and Input should both", id="linear on a convolution of rank 4"),
    pytest.param(SQUARE, "differs from the graph", id="silently wrong where C = H = W"),
]


def lower(net, path, dynamic=None, passes=convert.REMEDIES.passes):
    """Lower with the layers named dynamic and all others static, with these remedies."""
    graph, ranges, inputs = rounded(net)
    kinds = {n: DYNAMIC if dynamic is None or n in dynamic else a for n, a in ranges.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "REMEDIES", Pipeline(passes=passes))
        return lower_xnnpack(graph, kinds, inputs, path)


@pytest.mark.parametrize(("net", "message"), FAILURES)
def test_what_stock_executorch_gets_wrong_is_right_with_the_remedies(net, message, tmp_path):
    path = tmp_path / "net.pte"
    with pytest.raises(LoweringError, match=message):
        lower(net, path, passes=())
    assert not list(tmp_path.iterdir())
    program = lower(net, path)
    assert program.sqnr_db > EXACT_DB
    assert (program.subgraphs, program.undelegated) == (1, 0)


@pytest.mark.parametrize("left_out", [UnshareDynamicQuantizers, PinLayouts])
def test_both_remedies_are_needed(left_out, tmp_path):
    passes = [p for p in convert.REMEDIES.passes if not isinstance(p, left_out)]
    with pytest.raises(LoweringError, match="Weight and Input should both"):
        lower(SHARED, tmp_path / "net.pte", passes=tuple(passes))


class Normed(nn.Module):
    """Convolutions and linear layers around decomposed group norms, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = conv(3, 16), conv(16, 16), conv(16, 5)
        self.mix, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale, self.shift = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.rand(16))

    def norm(self, h):
        groups = h.reshape(h.shape[0], 4, 4, -1)
        d = groups - groups.mean((-2, -1), keepdim=True)
        d = d * torch.rsqrt((d * d).mean((-2, -1), keepdim=True) + 1e-5)
        return d.reshape(h.shape) * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)

    def forward(self, x):
        h = self.first(x)
        y = h + self.middle(functional.silu(self.norm(h)))
        t = self.norm(y).flatten(2).transpose(1, 2)
        t = self.out(torch.softmax(self.mix(t), -1)).transpose(1, 2)
        y = y + t.unflatten(2, x.shape[2:])
        return self.last(functional.silu(self.norm(y)))

    @staticmethod
    def inputs():
        return {"x": torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize(
    "dynamic", [None, ("first", "last", "out")], ids=["all dynamic", "beside static"]
)
def test_decomposed_norms_stay_in_one_delegate(dynamic, tmp_path):
    program = lower(Normed(), tmp_path / "net.pte", dynamic)
    assert program.sqnr_db > EXACT_DB
    assert (program.subgraphs, program.undelegated) == (1, 0)


STATIC_FIRST = {
    "convolution": Net((2, 16, 8, 12), lambda s, x: s.b(s.a(x)), a=conv(), b=conv(5, 7)),
    "linear of rank 4": BEHIND,
    "on one value": Net((2, 16, 8, 12), lambda s, x: (s.a(x), s.b(x)), a=conv(), b=conv(16, 7)),
}


@pytest.mark.parametrize("dynamic", ["a", "b"])
@pytest.mark.parametrize("name", STATIC_FIRST)
def test_static_and_dynamic_layers_stand_side_by_side(name, dynamic, tmp_path):
    program = lower(STATIC_FIRST[name], tmp_path / "net.pte", (dynamic,))
    assert program.sqnr_db > EXACT_DB
    assert program.undelegated == 0


@pytest.mark.parametrize(
    ("net", "dynamic"),
    [
        pytest.param(Residual(), None, id="residual"),
        pytest.param(Residual(), ("conv1", "shortcut", "conv_out"), id="residual, mixed"),
        pytest.param(Attention(), None, id="attention"),
        pytest.param(Attention(), ("conv", "to_k"), id="attention, mixed"),
        pytest.param(SharedOutput(), ("conv2",), id="shared static output"),
    ],
)
def test_traps_of_a_unet_are_right_in_every_mixture(net, dynamic, tmp_path):
    program = lower(net, tmp_path / "net.pte", dynamic)
    assert program.sqnr_db > EXACT_DB
    assert not any("conv" in name or "linear" in name for name in program.refusals)


def test_program_equals_our_fake_quantized_graph_for_samples_of_any_size(tmp_path):
    # one range over the batch would leave nothing of the small samples
    graph, ranges, inputs = rounded(Residual())
    inputs["x"] = inputs["x"].repeat(2, 1, 1, 1) * torch.logspace(-3, 2, 4).view(-1, 1, 1, 1)
    kinds = dict.fromkeys(ranges, DYNAMIC)
    program = lower_xnnpack(graph, kinds, inputs, tmp_path / "net.pte")
    (output,) = XnnpackRunner(program.path)(inputs["x"])
    with torch.no_grad():
        expected = QuantizeActivations(ranges=kinds)(graph).graph_module(**inputs)
    error = (output - expected).flatten(1).abs().amax(1)
    assert bool((error <= 1e-5 * expected.flatten(1).abs().amax(1)).all())
    assert program.output_scale is None
    assert program.max_lsb is None
    assert json.loads(json.dumps(program.to_dict()))["float_layers"] == {}


def test_weights_keep_their_integers_and_dynamic_layers_their_biases():
    graph, ranges, inputs = rounded(Residual(), bits=3)
    kinds = {name: DYNAMIC if "conv" in name else a for name, a in ranges.items()}
    plain, runnable, floats = convert.decomposed(graph, kinds)
    assert (set(runnable), floats) == (set(ranges), {})
    for name, kind in kinds.items():
        before, after = graph.get_submodule(name).bias, plain.get_submodule(name).bias
        if before is not None:
            assert torch.equal(before, after) == isinstance(kind, DynamicActivation), name
    converted = convert.converted_graph(plain, runnable, tuple(inputs.values()))
    weights = {}
    for node in converted.graph.nodes:
        if node.target in WEIGHT_OPS:
            layer = next(entry[0] for entry in reversed(node.meta["nn_module_stack"].values()))
            weights[layer] = getattr(converted, node.args[1].args[0].target)
            reads = str(node.args[0].target)
            assert reads.endswith("tensor" if kinds[layer] is DYNAMIC else "default"), layer
    assert set(weights) == set(ranges)
    for layer, codes in weights.items():
        assert torch.equal(codes, graph.get_submodule(layer).weight_codes), layer


def test_weight_off_its_grid_is_refused(tmp_path):
    graph, ranges, inputs = rounded(Residual())
    graph.conv1.weight.data.mul_(1.01)
    with pytest.raises(ConfigError, match=r"conv1: .*not on the int8 grid"):
        lower_xnnpack(graph, dict.fromkeys(ranges, DYNAMIC), inputs, tmp_path / "net.pte")


WITHOUT_KERNEL = {
    "depthwise": (conv(16, 16, groups=16), "depthwise Conv2d .16 input channels"),
    "one channel": (conv(1, 16), "depthwise Conv2d .1 input channels in 1 groups"),
    "line": (nn.Conv1d(16, 16, 3, groups=16), "depthwise Conv2d .16 input channels"),
}


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_layer_without_a_dynamic_kernel_stays_in_float_and_is_reported(name, tmp_path, caplog):
    layer, reason = WITHOUT_KERNEL[name]
    shape = (2, layer.in_channels, 8, 12)[: len(layer.kernel_size) + 2]
    width = 6 if name == "line" else 12
    net = Net(shape, lambda s, x: s.b(s.a(x)), a=layer, b=nn.Linear(width, 7))
    with caplog.at_level(logging.WARNING):
        program = lower(net, tmp_path / "net.pte")
    assert program.sqnr_db > EXACT_DB
    assert set(program.float_layers) == {"a"}
    assert any(record.getMessage().startswith("a: XNNPACK has no") for record in caplog.records)
    alone = Net(shape, lambda s, x: s.a(x), a=layer)
    with pytest.raises(LoweringError, match=rf'^a: .*{reason}.*activation_mode="static"'):
        lower(alone, tmp_path / "alone.pte")


LINES = {
    "strided": nn.Conv1d(16, 12, 5, stride=2, padding=2),
    "dilated": nn.Conv1d(16, 12, 3, dilation=3, padding="same"),
    "grouped": nn.Conv1d(16, 12, 3, groups=2, bias=False),
}


@pytest.mark.parametrize("name", LINES)
def test_layers_of_sequences_have_dynamic_kernels(name, tmp_path):
    first, second = nn.Conv1d(16, 16, 1), LINES[name]
    net = Net((2, 16, 24), lambda s, x: s.b(torch.sin(s.a(x))), a=first, b=second)
    program = lower(net, tmp_path / "net.pte")
    assert program.sqnr_db > EXACT_DB
    assert (program.subgraphs, program.float_layers) == (1, {})


def test_convolution_without_a_batch_axis_stays_in_float():
    graph, ranges, _ = rounded(
        Net((16, 8, 12), lambda s, x: s.b(s.a(x)), a=conv(), b=nn.Linear(12, 7))
    )
    _, runnable, floats = convert.decomposed(graph, dict.fromkeys(ranges, DYNAMIC))
    assert (set(runnable), set(floats)) == ({"b"}, {"a"})
    assert "without a batch axis" in floats["a"]


def test_wrong_activations_are_refused_before_anything_is_lowered(tmp_path):
    graph, ranges, inputs = rounded(Residual())
    by_level = TimestepActivation(groups=(ranges["conv1"], ranges["conv1"]))
    narrow = ActivationRange(scale=0.1, zero_point=0, bits=6)
    wrong = {
        r'conv1: .*noise level.*"static" or "dynamic"': (LoweringError, by_level),
        "conv1: its dynamic activation has 4 bits": (LoweringError, DynamicActivation(bits=4)),
        "conv1: its input range has 6 bits": (
            LoweringError,
            StaticActivation(input=narrow, output=ranges["conv1"].output),
        ),
    }
    kinds = dict.fromkeys(ranges, DYNAMIC)
    for message, (error, activation) in wrong.items():
        with pytest.raises(error, match=message):
            lower_xnnpack(graph, {**kinds, "conv1": activation}, inputs, tmp_path / "net.pte")
    with pytest.raises(ConfigError, match="'no_layer', which is no rounded"):
        lower_xnnpack(graph, {"no_layer": DYNAMIC}, inputs, tmp_path / "net.pte")
    with pytest.raises(
        ConfigError,
        match=r'no int8 form.*activation_mode="dynamic" or "static".*lower_xnnpack_float',
    ):
        lower_xnnpack(graph, {}, inputs, tmp_path / "net.pte")
    plain = trace(Residual().eval(), inputs)
    with pytest.raises(ConfigError, match=r"QuantizedModel\.rounded"):
        lower_xnnpack(plain, kinds, inputs, tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("per", ["tensor", "sample"])
def test_ranges_of_another_granularity_do_not_pass_for_the_right_ones(per, tmp_path, monkeypatch):
    # 1x1 convolutions have a range per pixel in XNNPACK; the comparison has to tell
    from mpqdm_fx.passes.quantize import quantize_activations

    axes = 4 if per == "tensor" else 3
    monkeypatch.setattr(quantize_activations, "row_axes", lambda module: axes)
    net = Net((2, 16, 8, 12), lambda s, x: s.a(x), a=conv(kernel=1 if per == "sample" else 3))
    with pytest.raises(LoweringError, match="differs from the graph"):
        lower(net, tmp_path / "net.pte")


def test_dynamic_layer_called_twice_runs_twice_on_its_own_ranges(tmp_path):
    net = Net((2, 16, 8, 12), lambda s, x: s.a(torch.relu(30 * s.a(x))), a=conv(16, 16))
    assert lower(net, tmp_path / "net.pte").sqnr_db > EXACT_DB


def test_empty_and_constant_samples_are_right(tmp_path):
    # the range of zeros is empty; of a constant, one-sided
    graph, _, inputs = rounded(RESHAPED)
    inputs["x"][0], inputs["x"][1] = 0.0, 3.0
    program = lower_xnnpack(graph, {"a": DYNAMIC}, inputs, tmp_path / "net.pte")
    assert program.sqnr_db > EXACT_DB
    (output,) = XnnpackRunner(program.path)(inputs["x"])
    assert torch.equal(output[0], output[0, :, :1, :1].expand_as(output[0]))
    assert math.isfinite(float(output.abs().max()))
