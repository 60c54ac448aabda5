"""The XNNPACK door: a `.pte` that ran with the right numbers, or a clear refusal and no file."""

import builtins
import gc
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from rounded_nets import (
    Attention,
    MovedOutput,
    Residual,
    SharedOutput,
    measured_ranges,
    round_to_grid,
    rounded,
    widen_inputs,
)
from small import TinyEDM, edm_calls
from torch import nn

import mpqdm_fx
from mpqdm_fx.backends.fit_channels import round_biases
from mpqdm_fx.backends.xnnpack import convert
from mpqdm_fx.backends.xnnpack.edge import to_edge
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.passes import DropNoopSlices, RequantizeCopies
from mpqdm_fx.backends.xnnpack.reference import Reference
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ArtifactError, ConfigError, LoweringError
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import ActivationRange, StaticActivation

pytestmark = pytest.mark.xnnpack


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """Net, program and path, lowered once for the tests that only read it."""
    graph, ranges, inputs = rounded(Residual(), bits=3)
    path = tmp_path_factory.mktemp("pte") / "net.pte"
    return graph, ranges, inputs, lower_xnnpack(graph, ranges, inputs, path)


def fake_quantized(graph, ranges, inputs):
    """Outputs of the fake-quantized graph with the int32 biases of integer kernels."""
    whole = QuantizeActivations(ranges=ranges)(round_biases(graph, ranges)).graph_module
    with torch.no_grad():
        return whole(**inputs)


def test_program_is_bit_equal_to_the_fake_quantized_graph_with_whole_biases(residual):
    graph, ranges, inputs, program = residual
    (output,) = XnnpackRunner(program.path)(inputs["x"])
    assert torch.equal(output, fake_quantized(graph, ranges, inputs))
    assert program.output_scale == pytest.approx(ranges["conv_out"].output.scale)
    assert (program.sqnr_db, program.max_lsb) == (math.inf, 0.0)


def test_report_describes_the_file(residual):
    inputs, program = residual[2:]
    assert program.bytes == program.path.stat().st_size
    assert [(s.name, s.shape, s.dtype) for s in program.inputs] == [
        ("x", tuple(inputs["x"].shape), "float32")
    ]
    assert [(s.shape, s.dtype) for s in program.outputs] == [((2, 4, 12, 20), "float32")]
    # the five convolutions, the norm and the upsampling are in one delegate
    assert (program.subgraphs, program.undelegated, dict(program.refusals)) == (1, 0, {})
    assert program.delegated > 5 * 4
    assert program.reference_sqnr_db > 20
    assert json.loads(json.dumps(program.to_dict()))["path"] == "net.pte"


def test_nothing_but_the_program_is_left_in_the_folder(residual):
    assert [p.name for p in residual[-1].path.parent.iterdir()] == ["net.pte"]


def test_program_stores_one_byte_per_weight(residual, tmp_path):
    graph, _, inputs, program = residual
    baseline = lower_xnnpack_float(graph, inputs, tmp_path / "float.pte")
    weights = sum(graph.get_submodule(n).weight.numel() for n in residual[1])
    assert baseline.sqnr_db > 100
    assert (baseline.output_scale, baseline.max_lsb, baseline.reference_sqnr_db) == (None,) * 3
    # what the int8 program has on top is scales, q/dq nodes and the pieces of the norm
    assert baseline.bytes > 4 * weights
    assert program.bytes < weights + 18_000
    assert baseline.bytes < 4 * weights + 16_000, "the integer codes are not shipped in it"


def test_runner_takes_numpy_and_casts_and_gives_the_same_twice(residual):
    inputs, program = residual[2], residual[3]
    runner = XnnpackRunner(program.path)
    (first,) = runner(inputs["x"])
    (second,) = runner(inputs["x"].double().numpy())
    assert torch.equal(first, second)
    assert runner.input_shapes == ((2, 3, 12, 20),)
    assert isinstance(inputs["x"].numpy(), np.ndarray)


def test_runner_refuses_other_shapes_and_counts(residual):
    inputs, program = residual[2], residual[3]
    runner = XnnpackRunner(program.path)
    with pytest.raises(ConfigError, match=r"shape \(1, 3, 12, 20\).*made for \(2, 3, 12, 20\)"):
        runner(inputs["x"][:1])
    with pytest.raises(ConfigError, match="takes 1 tensors"):
        runner(inputs["x"], inputs["x"])


def test_runner_refuses_a_missing_and_a_damaged_file(residual, tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        XnnpackRunner(tmp_path / "none.pte")
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes(residual[3].path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="damaged"):
        XnnpackRunner(damaged)


def test_attention_is_delegated_in_plain_ops(tmp_path):
    graph, ranges, inputs = rounded(Attention())
    program = lower_xnnpack(graph, ranges, inputs, tmp_path / "attention.pte")
    assert (program.subgraphs, dict(program.refusals)) == (1, {})
    # softmax is XNNPACK's own; one code may fall to the other side of a tie
    assert program.sqnr_db > program.reference_sqnr_db + 10


def test_layer_called_on_two_scales_adds_the_right_bias_each_time(tmp_path, monkeypatch):
    # ExecuTorch stores a bias once, in the integers of its first call
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x):
            return self.mix(self.mix(x))

    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, 6)}
    graph = round_to_grid(trace(Twice().eval(), inputs))
    ranges = measured_ranges(graph, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "split_calls", lambda graph, ranges, _: (graph, dict(ranges)))
        with pytest.raises(LoweringError, match=r"differs from the graph.* steps of its"):
            lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte")
    program = lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte")
    assert program.max_lsb <= 1.001


def lower_with(passes, net, path, widen=()):
    """Lower with these remedies only."""
    graph, ranges, inputs = rounded(net)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "REMEDIES", Pipeline(passes=passes))
        return lower_xnnpack(graph, widen_inputs(ranges, widen), inputs, path)


def test_value_read_as_int8_and_as_float_needs_the_remedy(tmp_path):
    path = tmp_path / "net.pte"
    # the runtime does not complain: int8 codes in NHWC are read as float numbers in NCHW
    with pytest.raises(LoweringError, match=r"differs from the graph.*: -?0\.\d dB, expected at"):
        lower_with((), SharedOutput(), path)
    assert not list(tmp_path.iterdir())
    program = lower_with(convert.REMEDIES.passes, SharedOutput(), path)
    assert program.sqnr_db > program.reference_sqnr_db + 10
    assert program.subgraphs == 2


@pytest.mark.parametrize(
    ("move", "message"),
    [
        ("cat", "refuses the program"),
        ("permute", "refuses the program"),
        ("relu", "differs from the graph"),
        ("view", "refuses the program"),
    ],
)
def test_moved_int8_value_needs_the_remedies(move, message, tmp_path):
    path = tmp_path / "net.pte"
    with pytest.raises(LoweringError, match=message):
        lower_with((), MovedOutput(move), path, ("after",))
    program = lower_with(convert.REMEDIES.passes, MovedOutput(move), path, ("after",))
    assert program.max_lsb <= 1.001
    assert (program.subgraphs, program.undelegated) == (1, 0)


def test_clamped_int8_value_has_the_codes_of_the_graph_with_the_remedies(tmp_path):
    # without them the clamp moves codes of one grid into another, a step off here and there
    path, net = tmp_path / "net.pte", MovedOutput("clamp")
    assert lower_with((), net, path, ("after",)).sqnr_db < 60
    assert lower_with(convert.REMEDIES.passes, net, path, ("after",)).max_lsb == 0


@pytest.mark.parametrize("left_out", [DropNoopSlices, RequantizeCopies])
def test_sliced_int8_value_stays_in_one_delegate_with_the_remedies(left_out, tmp_path):
    path, net = tmp_path / "net.pte", MovedOutput("slice")
    passes = tuple(p for p in convert.REMEDIES.passes if not isinstance(p, left_out))
    program = lower_with(passes, net, path, ("after",))
    assert (program.subgraphs, dict(program.refusals)) == (2, {"aten_slice_copy_tensor": 1})
    program = lower_with(convert.REMEDIES.passes, net, path, ("after",))
    assert program.max_lsb <= 1.001
    assert (program.subgraphs, program.undelegated) == (1, 0)


def test_channel_of_zero_weights_keeps_its_bias(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).eval()
    model[0].weight.data[1] = 0.0
    model[0].bias.data[1] = 0.5
    inputs = {"input": torch.randn(2, 3, 6, 8)}
    graph = round_to_grid(trace(model, inputs), bits=3)
    ranges = measured_ranges(graph, inputs)
    program = lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte")
    (output,) = XnnpackRunner(program.path)(*inputs.values())
    assert torch.equal(output, fake_quantized(graph, ranges, inputs))
    assert output.abs().max() > 0


class Conditions(nn.Module):
    """Takes a dictionary; has a Conv1d."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.mix = nn.Conv1d(3, 4, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x, conditions):
        y = self.mix(conditions["text"]) + conditions["ids"]
        return self.line(x).flatten(1) * y.sum(), y


def test_conv1d_is_int8_and_dictionaries_are_taken_in_any_order(tmp_path):
    torch.manual_seed(0)
    text, ids, x = torch.randn(2, 6), torch.randn(2, 5), torch.randn(2, 3, 7)
    inputs = {"x": x, "conditions": {"text": text, "ids": ids}}
    graph = round_to_grid(trace(Conditions().eval(), inputs))
    ranges = measured_ranges(graph, inputs)
    assert set(ranges) == {"line", "mix"}
    program = lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte")
    assert "aten_convolution_default" not in program.refusals
    assert [spec.name for spec in program.inputs] == ["x", "conditions.ids", "conditions.text"]
    runner = XnnpackRunner(program.path)
    ordered = runner(x, {"text": text, "ids": ids})
    reordered = runner(x, {"ids": ids, "text": text})
    assert all(torch.equal(a, b) for a, b in zip(ordered, reordered, strict=True))
    with torch.no_grad():
        exact = graph(**inputs)
    for a, b in zip(ordered, exact, strict=True):
        assert (a - b).abs().max() < 0.05 * b.abs().max()


def test_conv3d_is_refused_before_anything_is_lowered(tmp_path):
    inputs = {"input": torch.randn(1, 2, 3, 4, 5)}
    # windows that overlap: others are patches, which a linear layer reads
    graph = round_to_grid(trace(nn.Sequential(nn.Conv3d(2, 3, 3, padding=1)).eval(), inputs))
    with pytest.raises(LoweringError, match=r"^0: .*Conv3d.*torch_ao"):
        lower_xnnpack(graph, measured_ranges(graph, inputs), inputs, tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())


def test_existing_file_survives_a_lowering_that_fails(tmp_path):
    path = tmp_path / "net.pte"
    path.write_bytes(b"old")
    with pytest.raises(LoweringError):
        lower_with((), SharedOutput(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pte"]
    assert path.read_bytes() == b"old"


def test_narrow_activations_are_refused_before_anything_is_lowered(tmp_path):
    graph, ranges, inputs = rounded(Residual())
    narrow = ActivationRange(scale=0.1, zero_point=0, bits=6)
    ranges["conv1"] = StaticActivation(input=ranges["conv1"].input, output=narrow)
    with pytest.raises(LoweringError, match="conv1: its output range has 6 bits"):
        lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())


def test_missing_extra_is_one_clear_error(tmp_path, monkeypatch, residual):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.startswith("executorch"):
            raise ImportError("no module named executorch")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith("executorch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fake)
    graph, ranges, inputs, program = residual
    message = r'pip install "mpqdm-fx\[executorch\]"'
    for attempt in (
        lambda: lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte"),
        lambda: lower_xnnpack_float(graph, inputs, tmp_path / "net.pte"),
        lambda: XnnpackRunner(program.path),
    ):
        with pytest.raises(LoweringError, match=message):
            attempt()
    assert not list(tmp_path.iterdir())


def test_lowering_leaves_the_root_logger_and_the_collector_as_they_were():
    # ExecuTorch calls logging.basicConfig when it is imported; pytest's own handlers are there
    root, threshold = list(logging.getLogger().handlers), gc.get_threshold()
    with pytest.raises(LoweringError, match="ExecuTorch cannot lower"):
        to_edge(None)
    assert list(logging.getLogger().handlers) == root
    assert gc.get_threshold() == threshold


def test_a_model_that_takes_a_logarithm_of_its_noise_level_is_tried_on_numbers(tmp_path):
    settings = mpqdm_fx.MPQConfig(weight_bits=8, activation_mode="dynamic", allocation="uniform")
    quantized = mpqdm_fx.quantize(TinyEDM(), settings, edm_calls())
    program = mpqdm_fx.lower(quantized, "xnnpack", output=tmp_path / "edm.pte")
    assert math.isfinite(program.sqnr_db)
    assert program.sqnr_db > 40


def test_a_reference_that_is_no_number_is_refused():
    graph = trace(TinyEDM().eval(), edm_calls(1)[0])
    call = {**edm_calls(1)[0], "sigma": torch.tensor([-1.0, 2.0])}
    inputs = tuple(call[str(node.target)] for node in graph.graph.find_nodes(op="placeholder"))
    with pytest.raises(LoweringError, match="returns NaN or infinity for the inputs"):
        Reference.of_float(graph, graph, inputs)
