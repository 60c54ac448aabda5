"""One layer: what is refitted and what is weighed is judged by the rows that are held out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import settings_of
from torch import nn

from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.row_weights import RowWeights
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.gram import Gram
from mpqdm_fx.numerics.solve.layer_rows import LayerRows
from mpqdm_fx.numerics.solve.propagation import output_error
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.sweep import solve
from mpqdm_fx.sweep.problem import LayerData, Problem
from mpqdm_fx.sweep.solve import solve_layer

WIDTH, CHANNELS = 6, 4
seeds = st.integers(0, 2**16)
offsets = st.sampled_from([-4.0, 0.0, 4.0])
roundings = st.sampled_from(["nearest", "gptq"])


def layer_of(seed=0, groups=1):
    torch.manual_seed(seed)
    if groups > 1:
        return nn.Conv1d(groups * WIDTH, groups * CHANNELS, 1, groups=groups)
    return nn.Linear(WIDTH, CHANNELS)


def plan_of(layer, bits=3):
    shape = tuple(layer.weight.shape)
    return LayerPlan(name="layer", kind=type(layer).__name__, shape=shape, bits=(bits,) * shape[0])


def rows_of(seed, count, offset=0.0, *, groups=1, error=0.3, weights=None):
    """Rows of both lanes, or [N, G, K] for several groups; the offset is the mean's."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, WIDTH) if groups == 1 else (count, groups, WIDTH)
    inputs = torch.randn(shape, generator=generator) + offset
    shift = error * torch.randn(shape, generator=generator)
    return LayerRows(inputs=inputs, shift=shift, weights=weights)


def installed_error(layer, solution, rows, *, refitted=True):
    """Mean squared error of the layer against the float lane, summed over channels."""
    gained = 0.0
    if refitted and solution.bias is not None:
        gained = (solution.bias - layer.bias.detach()).double()
    groups = rows.inputs.shape[1] if rows.inputs.dim() == 3 else 1
    W = layer.weight.detach().flatten(1).double().view(groups, -1, WIDTH)
    Q = (solution.codes.flatten(1).double() * solution.scale.double()[:, None]).view_as(W)
    inputs, shift = (
        part.double().view(len(rows), groups, -1) for part in (rows.inputs, rows.shift)
    )
    error = torch.einsum("ngk,gok->ngo", inputs, W - Q) + torch.einsum("ngk,gok->ngo", shift, W)
    return ((error.flatten(1) - gained).square().mean(dim=0)).sum().item()


@given(
    seeds, offsets, offsets, st.sampled_from([1, 2]), roundings, st.sampled_from([0, 0.5, "auto"])
)
def test_a_refitted_bias_is_never_worse_than_the_old_one_on_held_out_rows(
    seed, fitted_at, held_out_at, groups, rounding, propagation
):
    layer = layer_of(seed, groups)
    data = LayerData(
        train=rows_of(seed, 24, fitted_at, groups=groups),
        validation=rows_of(seed + 1, 12, held_out_at, groups=groups),
    )
    options = settings_of(rounding=rounding, propagation=propagation)
    solution = solve_layer(layer, plan_of(layer), data, options)
    new, old = (
        installed_error(layer, solution, data.validation, refitted=refitted)
        for refitted in (True, False)
    )
    assert new <= old * (1 + 1e-5)
    if groups == 1 and fitted_at == held_out_at == 4:
        assert new < old  # the mean is most of the error, and it is the same
    if groups == 1 and fitted_at == -held_out_at == 4:
        assert solution.bias is None  # the mean of the one is wrong for the other


def test_a_bias_that_helps_is_refitted_and_one_that_does_not_is_left():
    layer, train = layer_of(), rows_of(1, 50, 4.0)

    def solved(held_out, **options):
        data = LayerData(train=train, validation=held_out)
        return solve_layer(layer, plan_of(layer), data, settings_of(**options))

    like, unlike = rows_of(2, 50, 4.0), rows_of(2, 50, -4.0)
    moved, left = solved(like), solved(like, bias_correction=False)
    assert moved.bias is not None
    assert left.bias is None
    errors = [installed_error(layer, solution, like) for solution in (moved, left)]
    assert errors[0] < 0.9 * errors[1]
    tried, never = solved(unlike), solved(unlike, bias_correction=False)
    assert tried.bias is None
    # what may not help leaves the layer no worse than if it had not been tried
    assert tried.error <= never.error * (1 + 1e-6)


def test_each_group_of_a_layer_decides_on_its_own():
    layer = layer_of(groups=2)
    train, validation = rows_of(1, 50, 4.0, groups=2), rows_of(2, 50, 4.0, groups=2)
    validation.inputs[:, 1] -= 8
    data = LayerData(train=train, validation=validation)
    solution = solve_layer(layer, plan_of(layer), data, settings_of(propagation=0))
    moved = solution.bias != layer.bias.detach()
    assert moved.tolist() == [True] * CHANNELS + [False] * CHANNELS


@given(seeds, offsets, st.sampled_from([0, 0.5, "auto"]), st.integers(1, 8))
def test_the_reported_errors_are_those_of_what_is_installed(seed, offset, propagation, bits):
    layer = layer_of(seed)
    data = LayerData(train=rows_of(seed, 24, offset), validation=rows_of(seed + 1, 12))
    solution = solve_layer(layer, plan_of(layer, bits), data, settings_of(propagation=propagation))
    problem = Problem.of(layer.weight.detach(), data, refit=solution.bias is not None)
    error = installed_error(layer, solution, data.validation)
    assert solution.error * problem.signal == pytest.approx(error, rel=1e-3)
    assert solution.error <= solution.base_error


# Weights of rows


@given(seeds, seeds, roundings, st.booleans())
@settings(max_examples=10)
def test_rows_that_count_nothing_move_nothing(seed, content_seed, rounding, bias_correction):
    layer = layer_of(seed)
    weights = torch.tensor([1.0] * 20 + [0.0] * 10)
    solutions = []
    for content in (seed, content_seed):
        parts = [
            LayerRows.join([rows_of(seed + i, 20), rows_of(content + i + 2, 10, 50.0, error=9)])
            for i in range(2)
        ]
        train, validation = (replace(part, weights=weights) for part in parts)
        options = settings_of(rounding=rounding, bias_correction=bias_correction)
        data = LayerData(train=train, validation=validation)
        solutions.append(solve_layer(layer, plan_of(layer), data, options))
    first, second = solutions
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert (first.bias is None) == (second.bias is None)
    if first.bias is not None:
        assert torch.equal(first.bias, second.bias)


def test_a_noise_level_whose_errors_do_nothing_moves_no_code():
    layer = layer_of()
    groups = NoiseGroups(levels=NoiseLevels(boundaries=(0.5,), argument="t"))
    samples = torch.tensor([0] * 20 + [1] * 20)

    def solved(energies, offset):
        row_weights = RowWeights(groups=groups, energies={"layer": torch.tensor(energies).double()})
        weights = row_weights.of_rows("layer", samples, torch.arange(40), 40)
        parts = [LayerRows.join([rows_of(i, 20), rows_of(i + 2, 20, offset)]) for i in range(2)]
        train, validation = (replace(part, weights=weights) for part in parts)
        return solve_layer(
            layer, plan_of(layer), LayerData(train=train, validation=validation), settings_of()
        )

    positive, negative = (solved([1.0, 0.0], offset) for offset in (3.0, -3.0))
    assert torch.equal(positive.codes, negative.codes)
    assert torch.equal(positive.scale, negative.scale)
    alike = [solved([1.0, 1.0], offset) for offset in (3.0, -3.0)]
    assert not torch.equal(alike[0].codes, alike[1].codes)


# Scales that clip nothing


@given(seeds, st.lists(st.integers(1, 8), min_size=5, max_size=5), st.booleans(), seeds)
def test_scales_without_clipping_are_taken_only_where_nearest_rounding_errs_less(
    seed, bits, fitted, rows_seed
):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(5, 12, generator=generator) ** 3  # long tails, that a search clips
    inputs = torch.randn(40, 12, generator=torch.Generator().manual_seed(rows_seed))
    inputs = inputs + 3 * inputs[:, :1]  # clipped weights err together
    gram = Gram.of(inputs)
    kind = "codebook" if fitted else "uniform"
    levels = RowLevels.fit(W, torch.tensor(bits), kind, gram.diagonal.float())

    def error(candidate):
        return gram.quadratic(W - candidate.snap(W) * candidate.scale[:, None])

    nearest, fed_back = (
        solve._unclipped_where_better(W, levels, gram, settings_of(rounding=rounding))
        for rounding in ("nearest", "gptq")
    )
    whole = levels.unclipped(W)
    assert torch.equal(error(nearest), torch.minimum(error(levels), error(whole)))
    narrow = torch.tensor(bits) < 6
    assert torch.equal(fed_back.scale[narrow], levels.scale[narrow])
    assert torch.equal(fed_back.scale[~narrow], nearest.scale[~narrow])


def test_wide_rows_of_long_tails_are_not_clipped_where_inputs_are_correlated():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(8, 64, generator=generator)
    W[:, :3] = 6.0  # three weights of a row are large, and read nearly the same value
    inputs = torch.randn(200, 64, generator=generator)
    inputs[:, :3] = 0.1 * inputs[:, :3] + inputs[:, 3:4]
    gram = Gram.of(inputs)
    levels = RowLevels.fit(W, torch.full((8,), 6), "uniform", gram.diagonal.float())
    clipped = levels.with_scale(levels.scale * 0.8)  # as a search would that sees the rest alone
    chosen = solve._unclipped_where_better(W, clipped, gram, settings_of())
    assert torch.equal(chosen.scale, levels.unclipped(W).scale)
    Q = [candidate.snap(W) * candidate.scale[:, None] for candidate in (clipped, chosen)]
    before, after = (output_error(W - rounded, inputs, []).sum() for rounded in Q)
    assert float(after) < 0.5 * float(before)
