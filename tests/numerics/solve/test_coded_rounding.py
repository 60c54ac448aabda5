"""Rounding to whole numbers: steps follow what errors do, and codes stay in int8."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.numerics.levels.grids import round_scale
from mpqdm_fx.numerics.solve.coded_rounding import (
    SHRINKAGES,
    bit_price,
    coded_size,
    first_steps,
    round_coded,
    shrunk,
)
from mpqdm_fx.numerics.solve.gram import Gram

seeds = st.integers(0, 2**20)


def drawn(seed, rows=6, width=12, count=64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    inputs = torch.randn(count, width, generator=generator) @ mixing
    weight = torch.randn(rows, width, generator=generator)
    sensitivity = torch.rand(rows, generator=generator).double() + 0.1
    return weight, inputs, sensitivity


@given(seeds, st.floats(-12, 2))
def test_steps_are_inverse_to_the_root_of_what_errors_do_where_no_code_hinders(seed, octave):
    weight, _, sensitivity = drawn(seed)
    steps = first_steps(weight, sensitivity, 2.0, 2.0**octave)
    assert torch.equal(steps, round_scale(steps))
    ideal = (2.0**octave / (2.0 * sensitivity)).sqrt()
    largest = weight.abs().amax(dim=1).double()
    clamped = ideal.clamp(min=largest / 125, max=4 * largest)
    torch.testing.assert_close(steps.double(), clamped, rtol=2**-8, atol=0)


@given(seeds, st.floats(-12, 2))
def test_codes_stay_in_int8_and_steps_stay_what_they_were(seed, octave):
    weight, inputs, sensitivity = drawn(seed)
    gram = shrunk(Gram.of(inputs), inputs, SHRINKAGES[0])
    steps = first_steps(weight, sensitivity, 2.0, 2.0**octave)
    codes, levels = round_coded(weight, steps, gram, passes=4)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= -127
    assert torch.equal(levels.scale, steps)


@given(seeds)
def test_descent_lowers_the_shrunk_error_of_every_row(seed):
    weight, inputs, sensitivity = drawn(seed)
    gram = shrunk(Gram.of(inputs), inputs, SHRINKAGES[0])
    steps = first_steps(weight, sensitivity, 2.0, 0.05)
    errors = []
    for passes in (0, 4):
        codes, levels = round_coded(weight, steps, gram, passes=passes)
        difference = (weight - codes * levels.scale[:, None]).double()
        errors.append(((difference @ gram.matrix.double()) * difference).sum(dim=1))
    damping = 0.01 * gram.mean_diagonal * weight.double().square().sum(dim=1)
    assert bool((errors[1] <= errors[0] + damping).all())


@given(seeds)
def test_shrunk_moments_keep_their_diagonal_and_are_definite(seed):
    for count in (64, 6):  # the second has fewer rows than numbers in a row
        _, inputs, _ = drawn(seed, count=count)
        gram = Gram.of(inputs)
        near = shrunk(gram, inputs, 5.0)
        exact = Gram.of(inputs, form="primal").matrix.double()
        off = near.matrix.double() - torch.diag(near.matrix.diagonal().double())
        expected = (exact - torch.diag(exact.diagonal())) / (1 + 5.0)
        torch.testing.assert_close(off, expected)
        torch.testing.assert_close(near.matrix.diagonal().double(), exact.diagonal())
        assert float(torch.linalg.eigvalsh(near.matrix.double()).min()) > 0
        assert shrunk(gram, inputs, 0.0) is gram


@pytest.mark.parametrize(("count", "as_they_are"), [(24, False), (200, True)])
def test_many_rows_carry_feedback_that_few_do_not(count, as_they_are):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(96) + 0.1 * torch.randn(96, 96, generator=generator)
    mixing += 0.5 * torch.randn(96, 1, generator=generator)
    weight = torch.randn(32, 96, generator=generator)
    train = torch.randn(count, 96, generator=generator) @ mixing.T
    other = torch.randn(400, 96, generator=generator) @ mixing.T
    steps = round_scale(weight.abs().amax(dim=1) / 125)
    errors = []
    for shrinkage in SHRINKAGES:
        gram = shrunk(Gram.of(train), train, shrinkage)
        codes, levels = round_coded(weight, steps, gram, passes=2)
        errors.append(float((other @ (weight - codes * levels.scale[:, None]).T).square().mean()))
    near, exact = errors
    assert (exact < 0.9 * near) is as_they_are
    assert (near < 0.9 * exact) is not as_they_are


@given(seeds)
def test_a_bit_is_worth_what_halving_the_step_saves_a_weight(seed):
    pitch = 2.0 ** ((seed % 40) - 30)
    # error per weight is pitch / 12 at the step, a quarter of it at half the step: one bit more
    slope = (pitch / 12) * 2 * torch.tensor(2.0).log()
    assert abs(bit_price(pitch) - float(slope)) <= 1e-6 * pitch


def test_coarser_codes_take_fewer_bits():
    weight, inputs, sensitivity = drawn(0, rows=32, width=144)
    gram = shrunk(Gram.of(inputs), inputs, SHRINKAGES[0])
    sizes = []
    for octave in (-8, -4, 0):
        steps = first_steps(weight, sensitivity, 2.0, 2.0**octave)
        codes, _ = round_coded(weight, steps, gram, passes=2)
        sizes.append(coded_size(codes, 9))
    assert sizes == sorted(sizes, reverse=True)
