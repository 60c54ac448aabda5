"""Layers of mixed widths as layers of one width each: the same numbers, bit for bit."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.backends.xnnpack.passes import SplitMixedRows
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.quantize.round_weights import install_codes

_aten = torch.ops.aten
WIDTHS = st.lists(st.sampled_from([4, 8]), min_size=6, max_size=6)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5, bias=False)

    def forward(self, x):
        h = torch.relu(self.a(x)) * 2
        return self.b(h) + self.c(h)


class Geglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.value(x) * torch.relu(self.gate(x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x)
        return self.c(self.b(h) + h)


def whole_numbers(module: nn.Module, seed: int = 0):
    """The module with small integers for weights: sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = torch.randint(-8, 9, parameter.shape, generator=generator)
        parameter.data = values.float()
    return module.eval()


def x(seed: int = 0):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(-9, 10, (2, 3, 4), generator=generator).float()


def split(module, widths, **settings):
    graph = trace(module, {"x": x()}, dynamic_batch=False)
    result = SplitMixedRows(widths=widths, least_bytes=0, **settings)(graph)
    return graph, result


def check_equal(graph, result, seed):
    assert torch.equal(graph(x=x(seed))[0], result.graph_module(x=x(seed))[0])


@given(widths=WIDTHS, seed=st.integers(0, 100))
def test_sorting_channels_changes_no_bit(widths, seed):
    graph, result = split(whole_numbers(Mlp(), seed), {"a": widths})
    assert result.modified == (len(set(widths)) == 2)
    check_equal(graph, result, seed)
    if result.modified:
        parts = [n for n in weight_layers(result.graph_module) if n.startswith("a_rows")]
        sizes = [result.graph_module.get_submodule(name).out_features for name in parts]
        assert sizes == [widths.count(4), widths.count(8)]


@given(value=WIDTHS, gate=WIDTHS, seed=st.integers(0, 100))
def test_value_and_gate_are_sorted_together_into_at_most_three_layers_each(value, gate, seed):
    graph, result = split(whole_numbers(Geglu(), seed), {"value": value, "gate": gate})
    check_equal(graph, result, seed)
    names = list(weight_layers(result.graph_module))
    for name, widths in (("value", value), ("gate", gate)):
        parts = [n for n in names if n.startswith(f"{name}_rows")]
        assert len(parts) <= 3
        if len(set(widths)) == 2:
            assert len(parts) >= 2


@given(widths=WIDTHS, seed=st.integers(0, 100))
def test_where_the_order_cannot_go_on_only_ordered_channels_are_cut(widths, seed):
    graph, result = split(whole_numbers(Residual(), seed), {"a": widths})
    check_equal(graph, result, seed)
    runs = 1 + sum(p != q for p, q in itertools.pairwise(widths))
    assert result.modified == (1 < runs <= 3)


def test_integers_and_scales_go_with_their_channels():
    generator = torch.Generator().manual_seed(0)
    module = Mlp().eval()
    for name in ("a", "b", "c"):
        layer = module.get_submodule(name)
        codes = torch.randint(-8, 8, layer.weight.shape, generator=generator).to(torch.int8)
        scale = 2.0 ** -torch.arange(len(codes)).float()
        module.set_submodule(name, install_codes(layer, codes, scale))
    _, result = split(module, {"a": [4, 8, 4, 8, 8, 4]})
    for layer in weight_layers(result.graph_module).values():
        rows = layer.module
        assert torch.equal(rows.weight, rows.weight_codes * rows.weight_scale[:, None])
    want = torch.tensor([1, 1 / 4, 1 / 32])
    assert torch.equal(result.graph_module.a_rows.weight_scale, want)


@pytest.mark.parametrize("least_bytes", [5, 7])
def test_a_split_has_to_save_bytes(least_bytes):
    graph = trace(Mlp().eval(), {"x": x()}, dynamic_batch=False)
    graph_pass = SplitMixedRows(widths={"a": [4, 4, 4, 8, 8, 8]}, least_bytes=least_bytes)
    assert graph_pass(graph).modified == (least_bytes <= 6)  # half a byte for 12 weights
