"""Values of other dtypes, ranks and sizes than the usual: each pass keeps what a graph computes."""

import pytest
import torch
from norm_cases import draw, outputs, traced
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.nn.utils.rnn import pad_sequence

from mpqdm_fx.backends.xnnpack.passes import (
    AverageSums,
    BlendBranches,
    DecomposeAttention,
    DropExpansions,
    ForwardSlices,
    MultiplyPowers,
    SplitComplex,
    StackSequences,
    ViewMeans,
)


def whole(x):
    """Whole numbers made of the input, so that no pass takes them for constants."""
    return (x * 10).long()


def turned(x):
    return torch.complex(x, -x)


def lowest(x):
    return torch.full_like(x, float("-inf"))


CASES = {
    "part of whole numbers": (
        ForwardSlices(),
        lambda m, x: torch.cat([whole(x), x], 1)[:, : x.shape[1]],
    ),
    "parts of whole numbers": (
        ForwardSlices(),
        lambda m, x: torch.cat([whole(x), x > 0, x], 1)[:, : 2 * x.shape[1]],
    ),
    "empty part without axes": (
        ForwardSlices(),
        lambda m, x: torch.cat([m.nothing, x], 1)[:, :1],
    ),
    "sequences of two dtypes": (
        StackSequences(),
        lambda m, x: pad_sequence([x[0], x[1].double()]),
    ),
    "power of whole numbers": (MultiplyPowers(), lambda m, x: whole(x) ** 2.0),
    "cube of whole numbers": (MultiplyPowers(), lambda m, x: whole(x).pow(3.0)),
    "sum of a number": (AverageSums(), lambda m, x: x[0, 0].sum(-1)),
    "mean of a number": (ViewMeans(), lambda m, x: x[0, 0].mean(-1)),
    "expanded number of two precisions": (
        DropExpansions(),
        lambda m, x: x[0, 0].double().expand(x.shape) * x,
    ),
    "choice of an expanded number": (
        DropExpansions(),
        lambda m, x: torch.where(x > 0, x, x[0, 0].double().expand(x.shape)),
    ),
    "choice of an infinite value": (
        BlendBranches(),
        lambda m, x: torch.where(x > 0, x, lowest(x)),
    ),
    "choice of an infinite view": (
        BlendBranches(),
        lambda m, x: torch.where(x > 0, lowest(x[:1]).expand(x.shape) * 2, x),
    ),
    "choice of an infinite constant": (
        BlendBranches(),
        lambda m, x: torch.where(x > 0, x, m.infinite.expand(x.shape) + 1),
    ),
    "complex beside real": (
        SplitComplex(),
        lambda m, x: torch.view_as_real(torch.cat([turned(x), x], 1) * turned(x[:, :1])),
    ),
    "complex on whole": (
        SplitComplex(),
        lambda m, x: torch.stack([whole(x), turned(x)]).imag,
    ),
    "padded complex": (
        SplitComplex(),
        lambda m, x: torch.view_as_real(pad_sequence([turned(x[0]), turned(x[1, :1])], True, 0.5)),
    ),
    "complex of a row and a column": (
        SplitComplex(),
        lambda m, x: torch.complex(x[:1], x[:, :1]).real,
    ),
    "half precision behind a mask": (
        DecomposeAttention(),
        lambda m, x: attention(*[x[None].half()] * 3, attn_mask=m.mask),
    ),
    "brain floats behind a mask": (
        DecomposeAttention(),
        lambda m, x: attention(*[x[None].bfloat16()] * 3, attn_mask=m.mask),
    ),
    "double precision behind a mask": (
        DecomposeAttention(),
        lambda m, x: attention(*[x[None].double()] * 3, attn_mask=m.mask),
    ),
}
TENSORS = {
    "nothing": torch.zeros(0),
    "infinite": torch.tensor(float("inf")),
    "mask": torch.tensor([[True, False], [True, True]]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_pass_keeps_dtype_size_and_numbers(name, dynamic):
    graph_pass, function = CASES[name]
    x = draw(2, 3).float()
    before = traced(function, x, dynamic_batch=dynamic, **TENSORS)
    after = graph_pass(before).graph_module
    expected, actual = outputs(before, x), outputs(after, x)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    low = expected.dtype in (torch.float16, torch.bfloat16)
    slack = {"rtol": 0.01, "atol": 0.01} if low else {}
    torch.testing.assert_close(actual, expected, **slack)


def test_a_masked_row_in_half_precision_is_finite_however_low_its_scores_are():
    def function(m, x):
        query = 10.0 * x[None].half()
        return attention(query, -query, x[None].half(), attn_mask=m.mask)

    x = draw(2, 3).float()
    graph = traced(function, x, mask=torch.zeros(2, 2, dtype=torch.bool), dynamic_batch=False)
    assert outputs(DecomposeAttention()(graph).graph_module, x).isfinite().all()


def test_parts_that_are_read_alike_are_covered():
    x = draw(2, 3).float()
    graph = traced(lambda m, x: torch.view_as_real(torch.cat([turned(x), x], 1)), x)
    assert SplitComplex()(graph).modified
    graph = traced(lambda m, x: torch.where(x > 0, x, lowest(x).softmax(-1)), x)
    assert BlendBranches()(graph).modified  # a softmax is finite or NaN, not infinite
