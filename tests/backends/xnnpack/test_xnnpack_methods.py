"""Several methods in one `.pte`: each computes what its graph does; weights are stored once."""

import pytest
import torch
from rounded_nets import measured_ranges, round_to_grid
from torch import nn

from mpqdm_fx.backends.xnnpack.lower import lower_methods, lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ArtifactError, ConfigError, LoweringError
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.records.activations import DynamicActivation
from mpqdm_fx.split.methods import split_methods
from mpqdm_fx.split.timestep_table import tabulate_timesteps

pytestmark = pytest.mark.xnnpack

GROUPS = {"encode_prompt": ["prompt", "added"]}
SCHEDULE = (900, 500, 100)


class TextNet(nn.Module):
    """Cross-attention, a time embedding and an added condition; H, W, C and lengths all differ."""

    def __init__(self, channels: int = 12, text: int = 10) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.time_1 = nn.Linear(8, 16)
        self.time_2 = nn.Linear(16, channels)
        self.embed_sizes = nn.Linear(5, channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(text, channels, bias=False)
        self.to_v = nn.Linear(text, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, sample, timestep, prompt, added):
        angles = timestep[:, None].float() / 50.0 * torch.arange(1, 5, dtype=torch.float32)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        time = self.time_2(nn.functional.silu(self.time_1(waves)))
        h = self.conv_in(sample) + time[:, :, None, None]
        h = h + self.embed_sizes(added["sizes"])[:, :, None, None]
        t = h.flatten(2).transpose(1, 2)
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in self.heads(t, prompt))
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        a = self.to_out(a.transpose(1, 2).flatten(2))
        return self.conv_out(h + a.transpose(1, 2).unflatten(2, sample.shape[2:]))

    def heads(self, t, prompt):
        return self.to_q(t), self.to_k(prompt), self.to_v(prompt)


def text_inputs(batch=2, size=(6, 8)):
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, 3, *size, generator=generator),
        "timestep": torch.tensor([500] * batch),
        "prompt": torch.randn(batch, 7, 10, generator=generator),
        "added": {"sizes": torch.randn(batch, 5, generator=generator)},
    }


def examples(inputs):
    step = {name: inputs[name] for name in ("sample", "timestep")}
    return {"encode_prompt": {n: inputs[n] for n in ("prompt", "added")}, "denoise": step}


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    inputs = text_inputs()
    return round_to_grid(trace(TextNet().eval(), inputs)), inputs


def run_program(programs, inputs):
    """The two methods one after the other, as a denoising loop calls them."""
    encode = XnnpackRunner(programs["encode_prompt"].path, "encode_prompt")
    names = [spec.name for spec in programs["encode_prompt"].outputs]
    values = dict(zip(names, encode(inputs["prompt"], inputs["added"]), strict=True))
    taken = [spec.name for spec in programs["denoise"].inputs]
    denoise = XnnpackRunner(programs["denoise"].path, method="denoise")
    return denoise(*({**inputs, **values}[name] for name in taken))[0]


@pytest.fixture(scope="module")
def floats(whole, tmp_path_factory):
    graph, inputs = whole
    path = tmp_path_factory.mktemp("pte") / "methods.pte"
    return lower_methods(split_methods(graph, GROUPS), examples(inputs), path)


def test_float_methods_compute_what_the_whole_graph_does(whole, floats):
    graph, inputs = whole
    assert set(floats) == {"encode_prompt", "denoise"}
    assert sqnr_db(graph(**inputs), run_program(floats, inputs)) > 100
    names = [spec.name for spec in floats["encode_prompt"].outputs]
    assert names == ["embed_sizes", "to_k", "to_v"]
    assert floats["encode_prompt"].undelegated <= 2


def test_file_holds_every_weight_once(whole, floats, tmp_path):
    graph, inputs = whole
    single = lower_xnnpack_float(graph, inputs, tmp_path / "whole.pte")
    weights = sum(p.numel() for p in graph.parameters())
    assert floats["denoise"].bytes == floats["encode_prompt"].bytes
    assert 4 * weights < floats["denoise"].bytes < single.bytes + 12_000


@pytest.mark.parametrize("mode", ["static", pytest.param("dynamic", marks=pytest.mark.matrix)])
def test_int8_methods_compute_what_the_whole_quantized_graph_does(whole, mode, tmp_path):
    graph, inputs = whole
    ranges = measured_ranges(graph, inputs)
    if mode == "dynamic":
        ranges = dict.fromkeys(ranges, DynamicActivation(bits=8))
    methods = split_methods(graph, GROUPS)
    programs = lower_methods(methods, examples(inputs), tmp_path / "int8.pte", ranges=ranges)
    # int8 activations throughout; each method was checked closely against its own graph
    assert sqnr_db(graph(**inputs), run_program(programs, inputs)) > 25
    assert all(program.reference_sqnr_db is not None for program in programs.values())


def test_table_of_timesteps_is_lowered_with_the_step(whole, tmp_path):
    graph, inputs = whole
    methods = split_methods(tabulate_timesteps(graph, SCHEDULE), GROUPS)
    at_step = {**inputs, "timestep": torch.tensor([1, 1])}
    programs = lower_methods(methods, examples(at_step), tmp_path / "table.pte")
    assert sqnr_db(graph(**inputs), run_program(programs, at_step)) > 100
    assert set(programs["denoise"].refusals) <= {"aten_index_select_default", *_COPIES}
    for step, timestep in enumerate(SCHEDULE):
        expected = graph(**{**inputs, "timestep": torch.tensor([timestep] * 2)})
        actual = run_program(programs, {**inputs, "timestep": torch.tensor([step] * 2)})
        assert sqnr_db(expected, actual) > 100
    with pytest.raises(LoweringError, match="failed at run time"):
        run_program(programs, {**inputs, "timestep": torch.tensor([0, len(SCHEDULE)])})


_COPIES = {"aten_unsqueeze_copy_default", "dim_order_ops__to_dim_order_copy_default"}


def test_examples_that_are_views_make_a_program_for_plain_inputs(whole, tmp_path):
    # torch.export keeps an example's strides, and ExecuTorch reads later inputs in them
    graph, inputs = whole
    flipped = {**inputs, "sample": inputs["sample"].transpose(2, 3).contiguous().transpose(2, 3)}
    assert not flipped["sample"].is_contiguous()
    program = lower_xnnpack_float(graph, flipped, tmp_path / "whole.pte")
    assert program.sqnr_db > 100


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(120, 200)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("quantized", [False, True])
def test_weight_of_two_methods_is_stored_once(quantized, tmp_path):
    torch.manual_seed(0)
    net, small, large = Wide().eval(), {"x": torch.randn(2, 120)}, {"x": torch.randn(5, 120)}
    graph = round_to_grid(trace(net, small))
    ranges = measured_ranges(graph, small) if quantized else None
    single = lower_methods({"a": graph}, {"a": small}, tmp_path / "one.pte", ranges=ranges)
    double = lower_methods(
        {"a": graph, "b": graph}, {"a": small, "b": large}, tmp_path / "two.pte", ranges=ranges
    )
    weight = 120 * 200 * (1 if quantized else 4)
    assert weight < single["a"].bytes
    assert double["a"].bytes - single["a"].bytes < weight / 4
    assert double["b"].inputs[0].shape == (5, 120)


def test_runner_names_the_methods_that_a_file_has(floats):
    with pytest.raises(ArtifactError, match="no method `forward`; it has denoise, encode_prompt"):
        XnnpackRunner(floats["denoise"].path)


def test_arguments_without_an_example_and_ranges_without_a_layer_are_refused(whole, tmp_path):
    graph, inputs = whole
    methods, path = split_methods(graph, GROUPS), tmp_path / "none.pte"
    with pytest.raises(ConfigError, match="'denoise' takes sample, timestep, for which"):
        lower_methods(methods, {"encode_prompt": examples(inputs)["encode_prompt"]}, path)
    ranges = {"gone": measured_ranges(graph, inputs)["to_k"]}
    with pytest.raises(ConfigError, match="'gone', which is a layer of no method"):
        lower_methods(methods, examples(inputs), path, ranges=ranges)
    with pytest.raises(ConfigError, match="no methods"):
        lower_methods({}, {}, path)
    assert not list(tmp_path.iterdir())
