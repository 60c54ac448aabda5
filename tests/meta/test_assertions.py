"""Tests of the assertion helpers: each one reddens for what it is there to find."""

import copy

import pytest
import torch
from torch import nn

from mpqdm_fx.graph.editing import copy_graph_module
from mpqdm_fx.passes.base import GraphPass, PassResult
from mpqdm_fx.testing import (
    Block,
    GraphSpec,
    assert_input_untouched,
    assert_modified_is_honest,
    assert_same_function,
    build_graph,
    count,
    digest,
)


@pytest.fixture
def case():
    return build_graph(GraphSpec(blocks=(Block(kind="residual"), Block(kind="geglu"))))


class _Lies(GraphPass):
    """Skip the base class's own checks and do or say what it is told to."""

    def __init__(self, act, modified):
        object.__setattr__(self, "act", act)
        object.__setattr__(self, "modified", modified)

    def rewrite(self, graph_module):
        raise NotImplementedError

    def __call__(self, graph_module):
        result = self.act(graph_module)
        return PassResult(result, self.modified)


def _scaled(graph_module, factor=2.0):
    result = copy.deepcopy(graph_module)
    result.get_submodule("blocks.0.conv").weight.mul_(factor)
    return result


def _write_into(graph_module):
    graph_module.get_submodule("blocks.0.conv").weight.mul_(2)
    return copy_graph_module(graph_module)


def _write_through_data(graph_module):
    graph_module.get_submodule("blocks.0.conv").weight.data.mul_(2)
    return copy_graph_module(graph_module)


def _write_meta(graph_module):
    next(iter(graph_module.graph.nodes)).meta["val"] = None
    return copy_graph_module(graph_module)


def test_same_function_finds_a_difference_of_one_bit():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.zeros_(a.weight)  # so that the output is the bias, and no rounding hides the bit
    b.load_state_dict(a.state_dict())
    inputs = {"input": torch.ones(1, 2)}
    assert_same_function(a, b, inputs)
    with torch.no_grad():
        b.bias[0] = torch.nextafter(b.bias[0], torch.tensor(9.0))
    with pytest.raises(AssertionError, match="not bit-equal"):
        assert_same_function(a, b, inputs)
    assert_same_function(a, b, inputs, rtol=1e-6)


class _Constant(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.values = values

    def forward(self):
        return self.values


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (_Constant(torch.zeros(2)), _Constant(torch.zeros(3))),
        (_Constant(torch.zeros(2)), _Constant(torch.zeros(2, dtype=torch.float64))),
        (_Constant(torch.zeros(2)), _Constant(torch.zeros(2), torch.zeros(2))),
        (_Constant(torch.tensor(0.0)), _Constant(torch.tensor(-0.0))),
        (_Constant(torch.zeros(2), 1), _Constant(torch.zeros(2), 2)),
    ],
    ids=["shape", "dtype", "number of outputs", "sign of zero", "other value"],
)
def test_same_function_finds_other_differences(a, b):
    with pytest.raises(AssertionError):
        assert_same_function(a, b, {})


def test_same_function_takes_equal_nans_as_equal_but_not_within_a_tolerance():
    nan, one = _Constant(torch.tensor([float("nan")])), _Constant(torch.ones(1))
    assert_same_function(nan, nan, {})
    for a, b in ((nan, one), (one, nan)):
        with pytest.raises(AssertionError):
            assert_same_function(a, b, {}, rtol=1.0)


def test_relative_tolerance_is_a_share_of_the_largest_magnitude():
    a = _Constant(torch.tensor([100.0, 0.0]))
    b = _Constant(torch.tensor([100.0, 0.5]))
    assert_same_function(a, b, {}, rtol=0.01)
    with pytest.raises(AssertionError, match="off by"):
        assert_same_function(a, b, {}, rtol=0.001)
    assert_same_function(a, b, {}, atol=0.5)


def test_honesty_is_asserted_both_ways(case):
    for act, modified in ((_scaled, False), (copy_graph_module, True)):
        with pytest.raises(AssertionError, match="modified="):
            assert_modified_is_honest(_Lies(act, modified), case.graph_module)
    for act, modified in ((_scaled, True), (copy_graph_module, False)):
        assert_modified_is_honest(_Lies(act, modified), case.graph_module)


@pytest.mark.parametrize(
    "act", [_write_into, _write_through_data, _write_meta, lambda graph_module: graph_module]
)
def test_touched_input_is_found(case, act):
    with pytest.raises(AssertionError, match=r"changed|returned its input"):
        assert_input_untouched(_Lies(act, True), case.graph_module)


def test_untouched_input_passes(case):
    result = assert_input_untouched(_Lies(_scaled, True), case.graph_module)
    assert digest(result.graph_module) != digest(case.graph_module)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.get_submodule("blocks.0.conv").weight.data.view(-1)[0].add_(1e-3),
        lambda g: g.get_submodule("blocks.0.conv").train(),
        lambda g: setattr(g.get_submodule("blocks.0.conv"), "stride", (2, 2)),
        lambda g: g.register_buffer("extra", torch.ones(1)),
        lambda g: g.meta.update(note=1),
        lambda g: next(iter(g.graph.nodes)).meta.update(custom=1),
        lambda g: next(iter(g.graph.nodes)).meta.pop("val"),
    ],
    ids=["weight", "mode", "setting", "buffer", "meta", "annotation", "lost value"],
)
def test_digest_sees_every_kind_of_change(case, change):
    other = copy.deepcopy(case.graph_module)
    assert digest(other) == digest(case.graph_module)
    change(other)
    assert digest(other) != digest(case.graph_module)


def test_count_counts_calls_and_not_modules(case):
    assert count(case.graph_module, nn.Conv2d) == 1
    assert count(case.graph_module, nn.Linear) == 2
    assert count(case.graph_module, nn.Module) == 5
    assert count(case.graph_module, torch.ops.aten.gelu.default) == 1
    assert count(case.graph_module, torch.ops.aten.cat.default) == 0
