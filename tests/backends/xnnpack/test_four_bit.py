"""Linear weights within -8..7 are stored at four bits, with the numbers of eight."""

import pytest
import torch
from rounded_nets import rounded
from torch import nn

from mpqdm_fx.backends.xnnpack.four_bit import check_four_bit, four_bit_layers
from mpqdm_fx.backends.xnnpack.lower import lower_methods, lower_xnnpack
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.editing import copy_graph_module, replace_module
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.activations import DynamicActivation

pytestmark = pytest.mark.xnnpack

DYNAMIC = DynamicActivation()


class Mlp(nn.Module):
    def __init__(self, inputs: int = 64) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(inputs, 96), nn.Linear(96, 48), nn.Linear(48, 8)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    def inputs(self):
        generator = torch.Generator().manual_seed(1)
        return {"x": torch.randn(2, 5, self.a.in_features, generator=generator)}


def with_codes(graph, name, low, high):
    """The graph with other integers in one layer, all from `low` to `high` among them."""
    graph = copy_graph_module(graph)
    module = graph.get_submodule(name)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(low, high + 1, module.weight.shape, generator=generator)
    codes[:, 0], codes[:, 1] = low, high
    scale = module.weight_scale
    replace_module(graph, name, install_codes(module, codes.to(torch.int8), scale))
    return graph


def lowered(graph, ranges, inputs, path, **settings):
    dynamic = dict.fromkeys(ranges, DYNAMIC)
    program = lower_xnnpack(graph, dynamic, inputs, path, **settings)
    return program, XnnpackRunner(path)(*inputs.values())[0]


def test_four_bits_halve_the_file_and_leave_every_bit_of_the_result(tmp_path):
    graph, ranges, inputs = rounded(Mlp(), bits=8)
    graph = with_codes(with_codes(graph, "a", -8, 7), "b", -7, 7)
    four, output = lowered(graph, ranges, inputs, tmp_path / "four.pte")
    assert four.four_bit_layers == ("a", "b")
    assert four.subgraphs == 1
    assert four.undelegated == 0
    eight, same = lowered(graph, ranges, inputs, tmp_path / "eight.pte", four_bit="never")
    assert eight.four_bit_layers == ()
    weights = 64 * 96 + 96 * 48
    assert abs(eight.bytes - four.bytes - weights // 2) <= 64  # alignment
    assert torch.equal(output, same)


def test_what_prevents_four_bits_is_told_by_layer():
    graph, ranges, _ = rounded(Mlp(inputs=63), bits=4)
    taken, refused = four_bit_layers(graph, dict.fromkeys(ranges, DYNAMIC))
    assert taken == ()
    assert refused["a"] == "it has an odd number of inputs, 63"
    assert refused["b"] == 'its codes -15..15 leave -8..7; quantize with levels="int4"'
    taken, refused = four_bit_layers(with_codes(graph, "b", -8, 7), ranges)
    assert not taken
    assert "static" in refused["b"]
    mixed = with_codes(graph, "c", -20, 20)
    mixed.c.weight_codes[:3] = 5
    _, refused = four_bit_layers(mixed, {"c": DYNAMIC})
    assert refused == {"c": "5 of 8 channels have more than 16 levels"}


def test_eight_bit_layers_are_not_reported():
    graph, ranges, _ = rounded(Mlp(), bits=8)
    assert four_bit_layers(graph, dict.fromkeys(ranges, DYNAMIC)) == ((), {})


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_uniform_channels_of_up_to_three_bits_fit(bits):
    graph, ranges, _ = rounded(Mlp(), bits=bits)
    taken, refused = four_bit_layers(graph, dict.fromkeys(ranges, DYNAMIC))
    assert taken == ("a", "b", "c")
    assert not refused


class Projections(nn.Module):
    """1x1 convolutions around a linear layer, and one that no permutation surrounds."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(6, 6, 1)
        self.proj_in, self.proj_out = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        h = self.proj_in(x)
        h = self.inner(h.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 8))
        h = h.reshape(x.shape[0], *x.shape[2:], 8).permute(0, 3, 1, 2).contiguous()
        return self.proj_out(h) + self.shortcut(x)

    @staticmethod
    def inputs():
        return {"x": torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(1))}


def test_pointwise_convolutions_of_four_bits_run_as_linear_layers(tmp_path):
    graph, ranges, inputs = rounded(Projections(), bits=3)
    program, _ = lowered(graph, ranges, inputs, tmp_path / "net.pte")
    assert set(program.four_bit_layers) == set(ranges)
    assert not program.eight_bit_layers
    assert program.subgraphs == 1
    assert program.undelegated == 0


def test_pointwise_convolutions_of_more_bits_stay_convolutions(tmp_path):
    graph, ranges, inputs = rounded(Projections(), bits=4)
    program, _ = lowered(graph, ranges, inputs, tmp_path / "net.pte")
    assert not program.four_bit_layers
    assert 'levels="int4"' in program.eight_bit_layers["shortcut"]
    assert "leave -8..7" in program.eight_bit_layers["inner"]


def test_layers_of_mixed_widths_can_be_split_to_the_same_bits(tmp_path):
    graph, ranges, inputs = rounded(Mlp(), bits=8)
    wide = graph.a.weight_codes.clone()
    narrow = with_codes(graph, "a", -8, 7).a.weight_codes
    codes = torch.where((torch.arange(96) % 3 == 0)[:, None], wide, narrow)
    graph = copy_graph_module(graph)
    replace_module(graph, "a", install_codes(graph.a, codes, graph.a.weight_scale))
    graph = with_codes(graph, "b", -8, 7)
    whole, want = lowered(graph, ranges, inputs, tmp_path / "whole.pte")
    assert whole.four_bit_layers == ("b",)
    assert whole.eight_bit_layers == {"a": "32 of 96 channels have more than 16 levels"}
    split, same = lowered(graph, ranges, inputs, tmp_path / "split.pte", four_bit="split")
    assert split.four_bit_layers == ("a_rows", "b")
    assert (split.subgraphs, split.undelegated) == (1, 0)
    assert whole.bytes - split.bytes >= 64 * 64 // 2 - 1024  # which the operator more takes
    assert torch.equal(same, want)
    methods = lower_methods(
        {"step": graph},
        {"step": inputs},
        tmp_path / "methods.pte",
        ranges=dict.fromkeys(ranges, DYNAMIC),
        four_bit="split",
    )
    assert methods["step"].four_bit_layers == split.four_bit_layers


def test_an_unknown_word_is_refused_and_a_split_that_does_nothing(tmp_path):
    graph, ranges, inputs = rounded(Mlp())
    path = tmp_path / "net.pte"
    with pytest.raises(ConfigError, match="'never', 'whole', 'split'"):
        lower_xnnpack(graph, ranges, inputs, path, four_bit="always")
    with pytest.raises(ConfigError, match="'never', 'whole', 'split'"):
        lower_methods({"step": graph}, {"step": inputs}, path, four_bit="always")
    for mode in ("static", "float"):
        with pytest.raises(ConfigError, match=f"these are {mode}"):
            check_four_bit("split", mode)
        check_four_bit("whole", mode)
    check_four_bit("split", "dynamic")
