"""Operators on known ranges: the numbers of torch's quantize and dequantize, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mpqdm_fx.backends.lowbit.ops  # noqa: F401  (registers the operators)
from mpqdm_fx.backends.lowbit.blob import pack_blob
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.qdq import qdq_ops

ops = torch.ops.mpqdm


def draw(shape, seed, width=1.0):
    return width * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def known(scale, zero_point):
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


RANGES = st.tuples(
    st.floats(2.0**-120, 2.0**120, width=32) | st.sampled_from([1e-3, 0.05, 1.0, 1 / 3]),
    st.integers(-128, 127),
)


@given(chosen=RANGES, steps=st.sampled_from([0.3, 3.0, 100.0, 1e6]), seed=st.integers(0, 2**16))
def test_codes_and_numbers_are_torchs(chosen, steps, seed):
    scale, zero_point = known(*chosen)
    x = draw((3, 40), seed, float(scale) * steps)
    parameters = (float(scale), chosen[1], -128, 127, torch.int8)
    expected = qdq_ops().quantize_per_tensor.default(x, *parameters)
    codes = ops.quantize_static_mixed(x, scale, zero_point)
    assert torch.equal(codes, expected)
    numbers = ops.dequantize_mixed(codes, scale, zero_point)
    assert torch.equal(numbers, qdq_ops().dequantize_per_tensor.default(expected, *parameters))
    assert torch.equal(ops.quantize_static_mixed(numbers, scale, zero_point), codes)


def test_halves_go_to_the_even_code_and_ends_are_kept():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    codes = ops.quantize_static_mixed(x, *known(1.0, 1))
    assert codes.tolist() == [-1, 1, 1, 3, 3, 127, -128, 127, -128, -128]


@given(zero_point=st.integers(-128, 127), kernel=st.sampled_from([1, 3]), seed=st.integers(0, 999))
def test_borders_are_the_number_zero_whatever_its_code(zero_point, kernel, seed):
    weight = torch.randint(
        -7, 8, (5, 4, kernel, kernel), generator=torch.Generator().manual_seed(seed)
    )
    blob = pack_blob(weight.to(torch.int8), torch.ones(5))
    scale, zero = known(0.5, zero_point)
    x = ops.dequantize_mixed(
        ops.quantize_static_mixed(draw((2, 4, 3, 4), seed, 40.0), scale, zero), scale, zero
    )
    codes = ops.quantize_static_mixed(x, scale, zero)
    result = ops.conv2d_mixed(codes, scale, zero, blob, 5, kernel, 1, kernel // 2)
    image = x.permute(0, 3, 1, 2).double()
    exact = torch.nn.functional.conv2d(image, weight.double(), padding=kernel // 2)
    assert torch.equal(result.double(), exact.permute(0, 2, 3, 1))  # halves of small integers


def test_a_norm_and_its_codes():
    x, weight, bias = draw((2, 3, 4, 8), 0), draw(8, 1), draw(8, 2)
    norm = (x, weight, bias, draw(8, 3), 2, 1e-5, True)
    fused = ops.group_norm_quantize_static_mixed(*norm, *known(0.02, -5))
    assert torch.equal(
        fused, ops.quantize_static_mixed(ops.group_norm_mixed(*norm), *known(0.02, -5))
    )


X, CODES = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.quantize_static_mixed(X.double(), *known(1.0, 0)), "x: torch.float32"),
        (lambda: ops.dequantize_mixed(X, *known(1.0, 0)), "codes: torch.int8 expected"),
        (lambda: ops.quantize_static_mixed(X, torch.ones(2), known(1, 0)[1]), "one number each"),
        (lambda: ops.quantize_static_mixed(X, known(1.0, 0)[0], torch.zeros(1)), "torch.int32"),
        (lambda: ops.dequantize_mixed(CODES, torch.ones(1).double(), known(1, 0)[1]), "float32"),
        *(
            (lambda scale=scale: ops.dequantize_mixed(CODES, *known(scale, 0)), "positive normal")
            for scale in (0.0, -1.0, 1e-40, torch.inf, torch.nan)
        ),
        (lambda: ops.quantize_static_mixed(X, *known(1.0, 128)), r"128 is outside -128\.\.127"),
    ],
)
def test_wrong_calls_are_refused_by_name(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
