"""Casts that change nothing go, all others stay."""

import pytest
import torch
from one_block_graphs import one_block, run
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from mpqdm_fx.passes import DropNoopCasts
from mpqdm_fx.testing import count

aten = torch.ops.aten


@pytest.mark.parametrize(("variant", "cast"), [(0, aten.to.dtype), (1, aten._to_copy.default)])
def test_cast_to_its_own_dtype_goes(variant, cast):
    case = one_block("cast", variant=variant)
    assert count(case.graph_module, cast) == 1
    result = run(DropNoopCasts(), case)
    assert result.modified
    assert count(result.graph_module, cast) == 0


@pytest.mark.parametrize("variant", [2, 3])
def test_cast_through_another_dtype_stays(variant):
    assert not run(DropNoopCasts(), one_block("cast", variant=variant)).modified


def test_cast_without_values_stays():
    case = one_block("cast")
    for node in case.graph_module.graph.nodes:
        node.meta.pop("val", None)
    assert not run(DropNoopCasts(), case).modified


def _hand_built(*nodes) -> fx.GraphModule:
    """Build `x -> f1 -> f2 ...` from (function, arguments, keyword arguments)."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for target, args, kwargs in nodes:
        value = graph.call_function(target, (value, *args), kwargs)
    graph.output((value,))
    graph_module = fx.GraphModule(nn.Module(), graph)
    FakeTensorProp(graph_module).propagate(torch.randn(2, 3, 4, 4))
    return graph_module


def test_change_of_memory_format_is_no_noop():
    cast = (aten._to_copy.default, (), {"memory_format": torch.channels_last})
    assert not DropNoopCasts()(_hand_built(cast)).modified


def test_copy_that_protects_from_a_write_in_place_stays():
    copies = (aten._to_copy.default, (), {"dtype": torch.float32})
    asked = (aten.to.dtype, (torch.float32, False, True), {})
    write = (aten.add_.Tensor, (1.0,), {})
    for cast in (copies, asked):
        assert DropNoopCasts()(_hand_built(cast)).modified
        graph_module = _hand_built(cast, write)
        result = DropNoopCasts()(graph_module)
        assert not result.modified
        x = torch.zeros(2, 3, 4, 4)
        result.graph_module(x)
        assert torch.equal(x, torch.zeros(2, 3, 4, 4))


def test_alias_cast_goes_even_before_a_write_in_place():
    alias = (aten.to.dtype, (torch.float32,), {})
    write = (aten.add_.Tensor, (1.0,), {})
    result = DropNoopCasts()(_hand_built(alias, write))
    assert result.modified
    x = torch.zeros(2, 3, 4, 4)
    result.graph_module(x)
    assert torch.equal(x, torch.ones(2, 3, 4, 4))
