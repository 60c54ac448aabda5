"""Layers over a concatenation of channels become one layer per part."""

import pytest
import torch
from one_block_graphs import one_block, run, weight_shapes
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes import SplitSkipConcat
from mpqdm_fx.testing import assert_same_function, count

aten = torch.ops.aten


@pytest.mark.parametrize("variant", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_over_a_skip_concat_becomes_one_per_part(variant, kernel):
    case = one_block("skip_concat", variant=variant, kernel=kernel)
    old = case.graph_module.get_submodule("blocks.1.conv")
    result = run(SplitSkipConcat(), case)
    assert result.modified
    layers = weight_layers(result.graph_module).items()
    parts = [layer.module for name, layer in layers if "conv_part" in name]
    assert len(parts) == {0: 2, 1: 2, 2: 3, 3: 3}[variant]
    assert sum(part.in_channels for part in parts) == old.in_channels
    assert [part.bias is not None for part in parts] == [True] + [False] * (len(parts) - 1)
    assert all(part.padding_mode == old.padding_mode for part in parts)
    # variant 1 also reads the concatenation with a norm, as a resnet does
    assert count(result.graph_module, aten.cat.default) == (1 if variant == 1 else 0)


@pytest.mark.parametrize("variant", [0, 1])
def test_linear_layer_over_concatenated_features_becomes_one_per_part(variant):
    case = one_block("token_concat", variant=variant)
    result = run(SplitSkipConcat(), case)
    assert result.modified
    shapes = weight_shapes(result.graph_module)
    assert {"blocks.1.proj_part0", "blocks.1.proj_part1"} <= shapes.keys()
    assert "blocks.1.proj" not in shapes


def test_convolution_called_twice_over_concats_keeps_one_pair_of_parts():
    case = one_block("shared", variant=1)
    result = run(SplitSkipConcat(), case)
    layers = weight_layers(result.graph_module)
    assert [len(layers[f"blocks.1.conv_part{i}"].nodes) for i in (0, 1)] == [2, 2]


def test_parts_copy_their_weights():
    case = one_block("skip_concat")
    result = SplitSkipConcat()(case.graph_module)
    old = case.graph_module.get_submodule("blocks.1.conv").weight
    part = result.graph_module.get_submodule("blocks.1.conv_part0").weight
    assert part.is_contiguous()
    assert part.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()


class _Concat(nn.Module):
    def __init__(self, layer: nn.Module, dim: int, learned: bool = True):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.layer = layer
        self.dim = dim
        self.learned = learned

    def forward(self, x):
        y = self.first(x) if self.learned else x.neg()
        return (self.layer(torch.cat([x, y], dim=self.dim)),)


@pytest.mark.parametrize(
    ("layer", "dim", "learned"),
    [
        (nn.Conv2d(8, 4, 1, groups=2), 1, True),
        (nn.Conv2d(4, 4, 1), 2, True),
        (nn.Linear(4, 4), 1, True),
        (nn.Conv2d(8, 4, 1), 1, False),
        (nn.GroupNorm(2, 8), 1, True),
    ],
    ids=["grouped", "other axis", "linear over channels", "no part is learned", "norm"],
)
def test_layer_that_does_not_split_stays(layer, dim, learned):
    graph_module = trace(_Concat(layer, dim, learned).eval(), {"x": torch.randn(2, 4, 4, 4)})
    assert not SplitSkipConcat()(graph_module).modified


@pytest.mark.parametrize(
    ("layer", "dim"),
    [(nn.Conv2d(8, 4, 3, padding="same", padding_mode="reflect"), -3), (nn.Linear(8, 3), -1)],
)
def test_negative_axis_and_dynamic_batch_split(layer, dim):
    graph_module = trace(_Concat(layer, dim).eval(), {"x": torch.randn(2, 4, 4, 4)})
    result = SplitSkipConcat()(graph_module)
    assert result.modified
    for batch in (1, 5):
        inputs = {"x": torch.randn(batch, 4, 4, 4)}
        assert_same_function(graph_module, result.graph_module, inputs, rtol=1e-5)


class _Counted(_Concat):
    def forward(self, x):
        y = self.first(x)
        return (self.layer(torch.cat([y.round().int(), y], dim=self.dim)),)


def test_whole_numbers_stay_in_a_concatenation_that_converts_them():
    graph_module = trace(_Counted(nn.Conv2d(8, 3, 1), 1).eval(), {"x": torch.randn(2, 4, 4, 4)})
    assert not SplitSkipConcat()(graph_module).modified


def test_taken_names_get_a_number():
    case = one_block("skip_concat")
    taken = nn.Conv2d(1, 1, 1)
    case.graph_module.get_submodule("blocks.1").add_module("conv_part0", taken)
    result = SplitSkipConcat()(case.graph_module)
    assert "blocks.1.conv_part0_1" in weight_shapes(result.graph_module)
