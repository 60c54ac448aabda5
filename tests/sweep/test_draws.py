"""Rows are drawn in proportion to what they count, and each stands for those left out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.sweep.draws import RowDraw

batches = st.lists(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=5), min_size=1, max_size=5
).map(lambda calls: [torch.tensor(call) for call in calls])


def positions_of(draw, index, total, seed=0):
    return draw.positions(index, total, torch.Generator().manual_seed(seed))


@given(batches, st.integers(1, 30), st.integers(1, 400))
def test_as_many_rows_as_wanted_are_drawn_and_none_twice(weights, per_sample, count):
    draw = RowDraw.of(weights, per_sample, count)
    samples = sum(map(len, weights))
    drawn = 0
    for index, call_weights in enumerate(weights):
        positions = positions_of(draw, index, per_sample * len(call_weights))
        assert len(set(positions.tolist())) == len(positions)
        assert bool((positions[1:] > positions[:-1]).all())
        assert not len(positions) or int(positions[-1]) < per_sample * len(call_weights)
        drawn += len(positions)
    assert drawn == min(count, per_sample * samples)


@given(batches, st.integers(1, 30), st.integers(1, 400))
def test_no_row_counts_much_more_than_the_mean(weights, per_sample, count):
    draw = RowDraw.of(weights, per_sample, count)
    flat = torch.cat(weights).double()
    counted = flat * per_sample / torch.cat(draw.expected)  # what each row of a sample counts
    full = torch.cat(draw.expected) >= per_sample - 1e-6  # of these there are no more
    mean = float(flat.sum()) * per_sample / min(count, per_sample * len(flat))
    # samples that ran out leave more rows to the others, so they count for less
    assert bool((counted[~full] <= mean / 0.75 + 1e-6).all())


@given(batches, st.integers(1, 30), st.integers(0, 2**31))
def test_all_rows_stand_for_themselves(weights, per_sample, seed):
    draw = RowDraw.of(weights, per_sample, 10**6)
    for index, call_weights in enumerate(weights):
        total = per_sample * len(call_weights)
        positions = positions_of(draw, index, total, seed)
        assert torch.equal(positions, torch.arange(total))
        stands_for = draw.stands_for(index, positions, total)
        torch.testing.assert_close(stands_for, torch.ones(total))


def test_weighted_sums_are_those_of_all_rows_on_average():
    generator = torch.Generator().manual_seed(3)
    weights = [torch.tensor([1.0, 0.01]), torch.tensor([0.2])]
    per_sample, values = 50, torch.rand(150, generator=generator)
    whole = sum(
        float(
            (
                call_weights.repeat_interleave(per_sample)
                * values[start : start + per_sample * len(call_weights)]
            ).sum()
        )
        for call_weights, start in zip(weights, (0, 100), strict=True)
    )
    draw = RowDraw.of(weights, per_sample, 30)
    totals = []
    for seed in range(400):
        total = 0.0
        for index, (call_weights, start) in enumerate(zip(weights, (0, 100), strict=True)):
            positions = positions_of(draw, index, per_sample * len(call_weights), seed)
            counted = call_weights[positions // per_sample] * draw.stands_for(
                index, positions, per_sample * len(call_weights)
            )
            total += float((counted * values[start + positions]).sum())
        totals.append(total)
    assert sum(totals) / len(totals) == pytest.approx(whole, rel=0.02)


def test_a_value_that_samples_share_is_drawn_as_one():
    draw = RowDraw.of([torch.tensor([1.0, 0.5, 0.1])], 2, 6)
    positions = positions_of(draw, 0, 7)
    assert len(positions) == 6
    stands_for = draw.stands_for(0, positions, 7)
    assert float(stands_for.sum()) == pytest.approx(7)
