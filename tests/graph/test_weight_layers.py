"""Weight layers as matrices: rows of inputs times rows of weights are the layer's outputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.layers import (
    called_module,
    output_positions,
    rebuild_layer,
    sample_rows,
    weight_layers,
    weight_rows,
)
from mpqdm_fx.testing import Block, GraphSpec, build_graph, graphs

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw):
    """Draw a convolution of any settings and an input for it."""
    rank = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 4]))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))

    def axes(strategy):
        return tuple(draw(strategy) for _ in range(rank))

    stride = axes(st.integers(1, 3))
    padding = draw(st.sampled_from(["valid", "same", "numbers"]))
    if padding == "numbers":
        padding = axes(st.integers(0, 2))
    elif padding == "same":
        stride = (1,) * rank
    conv = CONVOLUTIONS[rank](
        4,
        4 * draw(st.sampled_from([1, 2])),
        axes(st.integers(1, 3)),
        stride=stride,
        padding=padding,
        dilation=axes(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = axes(st.integers(5, 7))
    batch = (draw(st.integers(1, 3)),) if draw(st.booleans()) else ()
    return conv, torch.randn(*batch, 4, *size, generator=generator)


def _multiply(module, rows):
    """Do what the docstring of sample_rows says: X @ W.T per group, plus bias."""
    weight = weight_rows(module)
    groups = getattr(module, "groups", 1)
    if groups > 1:
        per_group = weight.reshape(groups, -1, weight.shape[1])
        products = torch.einsum("pgk,gok->pgo", rows, per_group).flatten(1)
    else:
        products = rows @ weight.T
    return products if module.bias is None else products + module.bias


@given(drawn=convolutions())
def test_rows_times_weight_rows_are_the_convolutions_output(drawn):
    conv, x = drawn
    with torch.no_grad():
        y = conv(x)
        y = y if x.dim() == len(conv.kernel_size) + 2 else y.unsqueeze(0)
        expected = y.movedim(1, -1).reshape(-1, conv.out_channels)
        rows = sample_rows(conv, x)
        assert output_positions(conv, x) == len(rows) == len(expected)
        torch.testing.assert_close(_multiply(conv, rows), expected, rtol=1e-4, atol=1e-5)


@given(drawn=convolutions(), data=st.data())
def test_chosen_positions_are_those_rows_of_all(drawn, data):
    conv, x = drawn
    total = output_positions(conv, x)
    chosen = data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=9))
    positions = torch.tensor(chosen)
    assert torch.equal(sample_rows(conv, x, positions=positions), sample_rows(conv, x)[positions])


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_linear_rows_are_the_input_flattened(shape):
    linear, x = nn.Linear(5, 3), torch.randn(shape)
    rows = sample_rows(linear, x)
    assert torch.equal(rows, x.reshape(-1, 5))
    assert output_positions(linear, x) == len(rows)
    assert torch.equal(sample_rows(linear, x, positions=torch.tensor([0])), rows[:1])


def test_drawn_positions_differ_from_each_other_and_follow_the_generator():
    conv, x = nn.Conv2d(1, 1, 1), torch.arange(40.0).reshape(2, 1, 4, 5)
    draws = [
        sample_rows(conv, x, count=30, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique()) == 30
    assert len(sample_rows(conv, x, count=1000)) == 40


def test_positions_and_count_together_are_refused():
    with pytest.raises(ValueError, match="not both"):
        sample_rows(nn.Linear(2, 2), torch.ones(1, 2), positions=torch.tensor([0]), count=1)


@pytest.mark.parametrize("module", [nn.GroupNorm(1, 2), nn.ConvTranspose2d(2, 2, 1)])
def test_other_modules_have_no_rows(module):
    with pytest.raises(DialectError, match=type(module).__name__):
        weight_rows(module)
    with pytest.raises(DialectError, match=type(module).__name__):
        sample_rows(module, torch.ones(1, 2, 2, 2))


def test_weight_rows_share_storage_and_carry_no_gradient():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    rows = weight_rows(conv)
    assert rows.shape == (6, 18)
    assert rows.data_ptr() == conv.weight.data_ptr()
    assert not rows.requires_grad


@given(case=graphs())
def test_layers_are_found_in_graph_order_with_all_their_calls(case):
    layers = weight_layers(case.graph_module)
    nodes = list(case.graph_module.graph.nodes)
    first_calls = [nodes.index(layer.nodes[0]) for layer in layers.values()]
    assert first_calls == sorted(first_calls)
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    calls = [n for n in nodes if called_module(case.graph_module, n, *kinds) is not None]
    assert sorted(n.name for la in layers.values() for n in la.nodes) == sorted(
        n.name for n in calls
    )
    assert all(
        layer.module is case.graph_module.get_submodule(name) for name, layer in layers.items()
    )


def test_embeddings_are_listed_only_when_asked_for():
    spec = GraphSpec(blocks=(Block(kind="time_embedding", variant=1),))
    graph_module = build_graph(spec).graph_module
    with_tables = weight_layers(graph_module, embeddings=True).keys()
    assert with_tables - weight_layers(graph_module).keys() == {"blocks.0.embedding"}


def test_tied_layers_are_one_layer_under_the_first_name():
    case = build_graph(GraphSpec(blocks=(Block(kind="conv"), Block(kind="conv"))))
    graph_module = case.graph_module
    graph_module.set_submodule("blocks.1.conv", graph_module.get_submodule("blocks.0.conv"))
    (layer,) = weight_layers(graph_module).values()
    assert layer.name == "blocks.0.conv"
    assert [n.target for n in layer.nodes] == ["blocks.0.conv", "blocks.1.conv"]


@pytest.mark.parametrize("module", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, padding=1, stride=2)])
def test_rebuilt_layer_has_new_sizes_and_the_old_settings(module):
    weight = module.weight[:2, :3]
    layer = rebuild_layer(module, weight, module.bias[:2])
    assert type(layer) is type(module)
    assert torch.equal(layer.weight, weight)
    assert layer.weight.requires_grad
    sizes = ("in_features", "out_features")
    if isinstance(module, nn.Conv2d):
        sizes = ("in_channels", "out_channels")
        assert (layer.padding, layer.stride) == (module.padding, module.stride)
    assert [getattr(layer, size) for size in sizes] == [3, 2]
    assert [getattr(module, size) for size in sizes] == [6, 4]
    assert rebuild_layer(module, weight, None).bias is None
    layer.weight.data.zero_()
    assert module.weight.abs().sum() > 0
