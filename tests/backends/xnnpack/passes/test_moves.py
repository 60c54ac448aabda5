"""Repeats, scatters, strides, permutations and sequences: moved by other ops, to the same bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import draw, outputs, targets, traced
from torch import Tensor

from mpqdm_fx.backends.xnnpack.passes import (
    DropCopies,
    DropExpansions,
    ForwardSlices,
    JoinScatters,
    MergeReshapes,
    MultiplyRepeats,
    NarrowPermutations,
    ReshapeUnitAxes,
    SliceChunks,
    StackSequences,
    ViewStridedSlices,
)

aten = torch.ops.aten


def rewritten(function, x, *passes):
    """The graph after passes that each changed it, of which every bit is as before."""
    before = traced(function, x, dynamic_batch=False)
    after = before
    for graph_pass in passes:
        result = graph_pass(after)
        assert result.modified
        after = result.graph_module
    assert torch.equal(outputs(after, x), outputs(before, x))
    return after


def widest(graph):
    values = [n.meta.get("val") for n in graph.graph.nodes if n.target is aten.permute.default]
    return max(value.dim() for value in values if isinstance(value, Tensor))


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    times=st.lists(st.integers(1, 3), min_size=4, max_size=5),
)
def test_a_repeat_is_a_product_with_ones(shape, times):
    x = draw(*shape).float()
    graph = rewritten(lambda m, x: -x.repeat(times), x, MultiplyRepeats())
    assert aten.repeat.default not in targets(graph)


@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), times=st.integers(2, 4))
def test_numbers_that_are_repeated_one_by_one_are_products_with_ones(shape, times):
    x = draw(*shape).float()
    axis = len(shape) // 2
    graph = rewritten(lambda m, x: -x.repeat_interleave(times, axis), x, MultiplyRepeats())
    assert targets(graph) <= {aten.neg.default, aten.reshape.default, aten.mul.Tensor}
    rewritten(lambda m, x: -x.repeat_interleave(times), x, MultiplyRepeats())


@pytest.mark.parametrize("size", [(4, 3, 5), (2, 4, 3, 5)])
def test_an_expansion_that_arithmetic_makes_itself_is_left_out(size):
    x = draw(4, 1, 5).float()
    y = draw(*size, seed=1).float()
    before = traced(lambda m, x: m.y * x.expand(size), x, dynamic_batch=False, y=y)
    graph = DropExpansions()(before).graph_module
    assert aten.expand.default not in targets(graph)
    assert torch.equal(outputs(graph, x), outputs(before, x))


def test_an_expansion_that_gives_the_size_stays():
    x = draw(4, 1, 5).float()
    function = lambda m, x: x.expand(4, 3, 5) * x  # noqa: E731
    assert not DropExpansions()(traced(function, x, dynamic_batch=False)).modified


@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), times=st.integers(2, 3))
def test_a_value_beside_itself_is_repeated(shape, times):
    x = draw(*shape).float()
    axis = len(shape) // 2
    graph = rewritten(lambda m, x: torch.cat([-x] * times, axis), x, MultiplyRepeats())
    assert aten.cat.default not in targets(graph)


def test_a_value_beside_itself_and_another_is_joined():
    x = draw(2, 3).float()
    graph = traced(lambda m, x: torch.cat([x, -x, x], 1), x)
    assert not MultiplyRepeats()(graph).modified


@given(size=st.integers(1, 7), axis=st.integers(0, 2), data=st.data())
def test_an_overwritten_slice_is_joined_to_the_rest(size, axis, data):
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    shape = [2, 3, 2]
    shape[axis] = size
    x = draw(*shape).float()

    def function(m, x):
        y = x * 1.5
        y.narrow(axis, start, end - start).neg_()
        return y

    graph = rewritten(function, x, JoinScatters())
    assert aten.slice_scatter.default not in targets(graph)


@pytest.mark.parametrize("step", [2, 3])
def test_a_value_that_is_filled_in_turns_reads_no_memory_that_nobody_filled(step):
    x = draw(2, 5, 4).float()

    def function(m, x):
        y = torch.empty(2, 5, 4 * step)
        for part in range(step):
            y[..., part::step] = x + part
        return y

    graph = rewritten(function, x, JoinScatters(), ForwardSlices())
    assert targets(graph) <= {aten.add.Tensor, aten.cat.default, aten.reshape.default}


def test_an_overwritten_row_is_joined_to_the_rest():
    def function(m, x):
        y = x * 2.0
        y[:, 1] = x[:, 0]
        return y

    graph = rewritten(function, draw(2, 3, 4).float(), JoinScatters())
    assert aten.select_scatter.default not in targets(graph)


@given(size=st.integers(2, 12), step=st.integers(2, 4), data=st.data())
def test_a_strided_slice_is_a_column_of_windows(size, step, data):
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    x = draw(2, size, 3).float()
    graph = traced(lambda m, x: -x[:, start:end:step], x, dynamic_batch=False)
    result = ViewStridedSlices()(graph)
    assert torch.equal(outputs(result.graph_module, x), outputs(graph, x))
    taken = len(range(start, end, step))
    assert result.modified == (taken * step <= size)


@given(order=st.permutations(range(7)), sizes=st.lists(st.integers(1, 3), min_size=7, max_size=7))
def test_no_permutation_has_more_than_six_axes(order, sizes):
    x = draw(*sizes).float()
    graph = traced(lambda m, x: -x.permute(order), x, dynamic_batch=False)
    result = NarrowPermutations()(graph).graph_module
    assert torch.equal(outputs(result, x), outputs(graph, x))
    permuted = aten.permute.default in targets(result)
    assert not permuted or widest(result) <= 6


@given(order=st.permutations(range(8)))
def test_permutations_that_move_all_of_eight_axes_take_turns(order):
    x = draw(2, 3, 2, 2, 3, 2, 2, 2).float()
    graph = rewritten(lambda m, x: -x.permute(order), x, NarrowPermutations())
    permuted = aten.permute.default in targets(graph)
    assert not permuted or widest(graph) <= 6


def test_patches_are_put_together_without_a_value_of_seven_axes():
    def function(m, x):
        return (
            (-x).reshape(2, 3, 2, 2, 4, 2, 2).permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)
        )

    graph = rewritten(function, draw(2, 3, 64).float(), NarrowPermutations(), MergeReshapes())
    assert all(n.meta["val"].dim() <= 6 for n in graph.graph.nodes if "val" in n.meta)


def test_a_reshape_of_a_reshape_is_one_and_a_reshape_to_the_same_size_none():
    x = draw(2, 3, 4).float()
    graph = rewritten(lambda m, x: -x.flatten(1).unflatten(1, (4, 3)), x, MergeReshapes())
    assert targets(graph) == {aten.neg.default, aten.reshape.default}
    graph = rewritten(lambda m, x: -x.flatten(1).unflatten(1, (3, 4)), x, MergeReshapes())
    assert targets(graph) == {aten.neg.default}


@given(axis=st.integers(-3, 2), index=st.integers(0, 1))
def test_unbound_parts_are_slices(axis, index):
    x = draw(2, 2, 3).float()
    graph = rewritten(lambda m, x: -x.unbind(axis)[index], x, SliceChunks(), ReshapeUnitAxes())
    assert targets(graph) <= {aten.neg.default, aten.slice.Tensor, aten.reshape.default}


@given(axis=st.integers(-3, 2), count=st.integers(1, 3))
def test_a_stack_is_a_concatenation(axis, count):
    x = draw(2, 3).float()
    parts = range(count)
    graph = rewritten(lambda m, x: torch.stack([x + i for i in parts], axis), x, ReshapeUnitAxes())
    assert aten.stack.default not in targets(graph)


@pytest.mark.parametrize("lengths", [(3, 3), (3, 1), (2,)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_of_known_lengths_are_stacked(lengths, batch_first):
    def function(m, x):
        sequences = [x[:length] for length in lengths]
        return -torch.nn.utils.rnn.pad_sequence(sequences, batch_first, padding_value=0.5)

    graph = rewritten(function, draw(3, 2).float(), StackSequences())
    assert aten.pad_sequence.default not in targets(graph)


def test_copies_are_left_out():
    x = draw(2, 3).float()
    graph = rewritten(
        lambda m, x: torch.cat([-x.clone().contiguous()]).detach() * 2.0, x, DropCopies()
    )
    assert targets(graph) == {aten.neg.default, aten.mul.Tensor}
