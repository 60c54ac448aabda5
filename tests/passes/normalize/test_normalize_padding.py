"""Padding in words becomes padding in numbers, bit for bit."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from norm_cases import draw, outputs, traced
from small import Twice
from torch import nn

from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.normalize.normalize_padding import NormalizePadding
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.testing import count

aten = torch.ops.aten
pad = aten.constant_pad_nd.default


def convolution(rank, channels=4, **settings):
    torch.manual_seed(0)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](channels, 6, **settings)


def normalized(graph):
    result = NormalizePadding()(graph)
    assert result.modified
    for layer in weight_layers(result.graph_module).values():
        assert not isinstance(layer.module.padding, str)
    return result.graph_module


# all settings are the operator's defaults, which torch.export leaves out
@example(rank=1, kernel=(1, 1, 1), dilation=(1, 1, 1), groups=1, padding="valid")
@given(
    rank=st.integers(1, 3),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    dilation=st.tuples(*[st.integers(1, 3)] * 3),
    groups=st.sampled_from([1, 2]),
    padding=st.sampled_from(["same", "valid"]),
)
def test_zero_padding_is_exact(rank, kernel, dilation, groups, padding):
    conv = convolution(
        rank,
        kernel_size=kernel[:rank],
        dilation=dilation[:rank],
        groups=groups,
        padding=padding,
    )
    x = draw(2, 4, *(11, 12, 10)[:rank]).float()
    graph = traced(nn.Sequential(conv), x, dynamic_batch=False)
    plain = normalized(graph)
    assert torch.equal(outputs(plain, x), outputs(graph, x))
    amounts = [d * (k - 1) for k, d in zip(kernel[:rank], dilation[:rank], strict=True)]
    odd = padding == "same" and any(a % 2 for a in amounts)
    assert count(plain, pad) == odd
    expected = tuple(0 if odd or padding == "valid" else a // 2 for a in amounts)
    assert plain.get_submodule("0").padding == expected
    assert graph.get_submodule("0").padding == padding


@given(
    rank=st.integers(1, 3),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    mode=st.sampled_from(["circular", "reflect", "replicate"]),
    padding=st.sampled_from(["same", "valid", 0, 1, 2]),
)
def test_other_modes_become_data_movement_before_the_convolution(rank, kernel, mode, padding):
    conv = convolution(rank, kernel_size=kernel[:rank], padding=padding, padding_mode=mode)
    x = draw(2, 4, *(11, 12, 10)[:rank]).float()
    graph = traced(nn.Sequential(conv), x, dynamic_batch=False)
    plain = normalized(graph)
    assert torch.equal(outputs(plain, x), outputs(graph, x))
    module = plain.get_submodule("0")
    assert (module.padding, module.padding_mode) == ((0,) * rank, "zeros")
    assert graph.get_submodule("0").padding_mode == mode
    moved = sum(count(plain, target) for target in (aten.pad.default, aten.cat.default))
    assert bool(moved) == any(conv._reversed_padding_repeated_twice)


def test_numbers_are_left_alone():
    conv = convolution(2, kernel_size=3, padding=1)
    graph = traced(nn.Sequential(conv), draw(2, 4, 9, 11).float())
    assert not NormalizePadding()(graph).modified


def test_weights_are_shared_and_codes_kept():
    conv = convolution(2, kernel_size=3, padding="same")
    codes = torch.randint(-127, 128, conv.weight.shape, dtype=torch.int8)
    conv = install_codes(conv, codes, torch.full((6,), 0.5))
    x = draw(2, 4, 9, 11).float()
    graph = traced(nn.Sequential(conv), x)
    new = normalized(graph).get_submodule("0")
    assert new.weight is graph.get_submodule("0").weight
    assert torch.equal(new.weight_codes, codes)


def test_module_that_is_called_twice_is_replaced_once_and_padded_twice():
    conv = convolution(2, channels=6, kernel_size=4, padding="same")
    x = draw(2, 6, 9, 11).float()
    graph = traced(Twice(conv), x)
    plain = normalized(graph)
    assert torch.equal(outputs(plain, x), outputs(graph, x))
    assert count(plain, pad) == 2
    assert len(weight_layers(plain)) == 1


class Doubled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


def test_convolution_with_a_forward_of_its_own_is_left_alone():
    conv = Doubled(4, 6, 3, padding="same")
    graph = traced(nn.Sequential(conv), draw(2, 4, 9, 11).float())
    assert not NormalizePadding()(graph).modified
