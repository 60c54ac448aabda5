"""Matrix products, sums, powers, choices and patches, written as XNNPACK knows them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import assert_close, draw, outputs, targets, traced
from torch import nn

from mpqdm_fx.backends.xnnpack.passes import (
    AverageSums,
    BlendBranches,
    DecomposeMatmul,
    FoldConstants,
    LinearizePatches,
    MultiplyPowers,
)

aten = torch.ops.aten


def rewritten(graph_pass, function, x, **tensors):
    before = traced(function, x, dynamic_batch=False, **tensors)
    result = graph_pass(before)
    assert result.modified
    assert_close(
        outputs(result.graph_module, x), outputs(before, x), max(graph_pass.tolerance, 1e-6)
    )
    return result.graph_module


@given(
    left=st.sampled_from([(3,), (5, 3), (2, 5, 3), (2, 4, 5, 3), (1, 4, 5, 3)]),
    right=st.sampled_from([(3,), (3, 6), (1, 3, 6), (4, 3, 6), (2, 4, 3, 6)]),
)
def test_every_product_is_of_batches(left, right):
    if left[-1] != right[max(len(right) - 2, 0)] or (left[:-2], right[:-2]) == ((2,), (4,)):
        return
    if len(left) == 3 and len(right) > 2 and right[-3] not in (1, 2):
        return
    if len(left) == len(right) == 1:
        return  # one number
    factor = draw(*right, seed=1).float()
    graph = rewritten(
        DecomposeMatmul(), lambda m, x: x @ (m.y * x.sum()), draw(*left).float(), y=factor
    )
    assert aten.matmul.default not in targets(graph)


@given(
    left=st.sampled_from([(5, 1), (2, 5, 1), (1, 4, 5, 1)]),
    right=st.sampled_from([(1, 3), (2, 1, 6), (4, 1, 6)]),
)
def test_a_column_times_a_row_is_a_product_number_by_number(left, right):
    if (left[:-2], right[:-2]) == ((2,), (4,)) or (left[:-2], right[:-2]) == ((1, 4), (2,)):
        return
    column = draw(*left, seed=1).float()
    graph = rewritten(DecomposeMatmul(), lambda m, x: m.y @ x, draw(*right).float(), y=column)
    assert targets(graph) == {aten.mul.Tensor}


def test_a_product_with_a_parameter_is_a_layer_and_stays():
    x = draw(5, 3).float()
    assert not DecomposeMatmul()(traced(lambda m, x: x @ m.w, x, w=draw(3, 4).float())).modified


@given(
    axes=st.lists(st.integers(-3, 2), min_size=1, unique_by=lambda a: a % 3), keeps=st.booleans()
)
def test_a_sum_is_a_mean_times_its_numbers(axes, keeps):
    graph = rewritten(AverageSums(), lambda m, x: x.sum(axes, keepdim=keeps), draw(2, 3, 4).float())
    assert aten.sum.dim_IntList not in targets(graph)


@pytest.mark.parametrize("power", [2.0, 3, 3.0, 4])
def test_a_small_power_is_a_product(power):
    graph = rewritten(MultiplyPowers(), lambda m, x: x**power, draw(3, 4).float())
    assert targets(graph) == {aten.mul.Tensor}


def test_other_powers_stay():
    x = draw(3, 4).float().abs()
    assert not MultiplyPowers()(traced(lambda m, x: x**2 + x**0.5, x)).modified


def test_a_choice_is_a_weighted_sum_of_the_same_numbers():
    x = draw(3, 4).float()
    before = traced(lambda m, x: torch.where(x > 0, x, m.y), x, y=draw(3, 4, seed=1).float())
    after = BlendBranches()(before).graph_module
    assert aten.where.self not in targets(after)
    assert torch.equal(outputs(after, x), outputs(before, x))


def test_a_choice_of_infinity_stays():
    x, y = draw(3, 4).float(), torch.full((3, 4), -torch.inf)
    assert not BlendBranches()(traced(lambda m, x: torch.where(x > 0, x, m.y), x, y=y)).modified


def test_what_is_filled_with_one_number_is_a_constant():
    x = draw(3, 4).float()
    before = traced(
        lambda m, x: x * torch.full_like(x, 2.0) + torch.meshgrid(m.y, m.y, indexing="ij")[0],
        x, dynamic_batch=False, y=torch.arange(4.0)[:1],
    )  # fmt: skip
    after = FoldConstants()(before).graph_module
    assert targets(after) == {aten.mul.Tensor, aten.add.Tensor}
    assert torch.equal(outputs(after, x), outputs(before, x))


@given(
    kernel=st.tuples(*[st.integers(1, 2)] * 3),
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    channels=st.integers(1, 3),
)
def test_patches_are_rows_of_a_linear_layer(kernel, grid, channels):
    size = [n * k for n, k in zip(grid, kernel, strict=True)]
    x = draw(2, channels, *size).float()
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv3d(channels, 5, kernel, stride=kernel))
    before = traced(conv, x)
    after = LinearizePatches()(before).graph_module
    assert isinstance(after.get_submodule("0"), nn.Linear)
    assert all(n.meta["val"].dim() <= 6 for n in after.graph.nodes if n.op == "call_function")
    assert_close(outputs(after, x), outputs(before, x), 1e-5)


@pytest.mark.parametrize(
    "settings", [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "groups": 2}]
)
def test_convolutions_over_patches_that_overlap_stay(settings):
    graph = traced(nn.Sequential(nn.Conv3d(2, 4, 2, **settings)), draw(2, 2, 4, 4, 4).float())
    assert not LinearizePatches()(graph).modified
