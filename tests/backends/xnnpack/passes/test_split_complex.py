"""Complex numbers become pairs of real ones, to the last bits of float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import assert_close, draw, outputs, traced
from torch import Tensor

from mpqdm_fx.backends.xnnpack.passes import CastEarly, FoldConstants, SplitComplex
from mpqdm_fx.backends.xnnpack.passes.split_complex import uncovered_complex

aten = torch.ops.aten


def real(graph):
    """Whether no value of a graph is complex."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    return not any(isinstance(v, Tensor) and v.is_complex() for v in values)


def split(function, x, **tensors):
    before = traced(function, x, dynamic_batch=False, **tensors)
    after = SplitComplex()(before).graph_module
    assert_close(outputs(after, x), outputs(before, x), SplitComplex.tolerance)
    return after


def turned(x, table):
    """A rotary embedding as diffusers writes it."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


@given(
    tokens=st.integers(1, 4),
    heads=st.integers(1, 3),
    pairs=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_a_rotary_embedding_is_real(tokens, heads, pairs, seed):
    x = draw(2, tokens, heads, 2 * pairs, seed=seed).float()
    table = torch.polar(torch.ones(tokens, 1, pairs), draw(tokens, 1, pairs, seed=seed + 1).float())
    graph = split(lambda m, x: turned(x, m.table), x, table=table)
    assert real(graph)


def test_a_table_of_double_precision_is_rounded_before_it_is_multiplied():
    x = draw(2, 3, 2, 8).float()
    table = torch.polar(torch.ones(3, 1, 4, dtype=torch.float64), draw(3, 1, 4))
    graph = split(lambda m, x: turned(x, m.table), x, table=table)
    graph = FoldConstants()(CastEarly()(graph).graph_module).graph_module
    values = [n.meta["val"] for n in graph.graph.nodes if n.op == "call_function"]
    assert {value.dtype for value in values} == {torch.float32}


FUNCTIONS = {
    "polar": lambda m, x: torch.view_as_real(torch.polar(x, x * 2)),
    "complex": lambda m, x: torch.complex(x, x + 1).imag,
    "exp": lambda m, x: torch.exp(1j * x).real,
    "sum": lambda m, x: torch.view_as_real(torch.complex(x, -x) + x),
    "difference": lambda m, x: torch.view_as_real(x - torch.complex(x, x * x)),
    "conjugate": lambda m, x: torch.view_as_real(torch.complex(x, x).conj() * torch.complex(x, -x)),
    "numbers": lambda m, x: torch.view_as_real(torch.complex(x, -x) * 2 / 3),
    "negative": lambda m, x: torch.view_as_real(-torch.complex(x, x)),
    "moves": lambda m, x: torch.view_as_real(
        torch.stack([torch.complex(x, -x).flatten()[1:], torch.complex(x, x).reshape(-1)[:-1]])
    ),
    "parts": lambda m, x: torch.view_as_real(torch.complex(x, -x).split([1, 3], dim=1)[1]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_complex_arithmetic_is_real(name):
    assert real(split(FUNCTIONS[name], draw(3, 4).float()))


def test_an_input_is_split_where_it_comes_in():
    z = torch.complex(draw(2, 3).float(), draw(2, 3, seed=1).float())
    graph = split(lambda m, z: torch.view_as_real(z * z), z)
    assert not SplitComplex()(graph).modified
    assert [
        n.target for n in graph.graph.nodes if n.all_input_nodes[:1] == [graph_input(graph)]
    ] == [aten.view_as_real.default]


def graph_input(graph):
    (node,) = graph.graph.find_nodes(op="placeholder")
    return node


def test_what_is_not_covered_is_named_and_nothing_is_rewritten():
    x = draw(2, 4).float()
    graph = traced(lambda m, x: torch.fft.fft(x).real * torch.complex(x, x).real, x)
    assert not SplitComplex()(graph).modified
    assert "fft" in str(next(uncovered_complex(graph)).target)
