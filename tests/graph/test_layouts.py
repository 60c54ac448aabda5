"""A graph answers with the same numbers however its values lie in memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.records.config import MPQConfig


class _ViewsAfterConvolution(nn.Module):
    """As FIR upsampling behind attention: a channels-last value, a convolution, a view."""

    def __init__(self, padding_mode: str, like: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1, padding_mode=padding_mode)
        self.like = like

    def forward(self, tokens: Tensor) -> Tensor:
        image = tokens.transpose(1, 2).view(-1, 4, 8, 8)
        value = self.conv(image)
        flat = torch.zeros(value.shape[0] * 3, 8, 8, 1)
        return value.view_as(flat) if self.like else value.view(-1, 8, 8, 1)


@pytest.mark.parametrize("like", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_pass_may_change_strides_in_front_of_a_view(batch, like):
    model = _ViewsAfterConvolution("circular", like).eval()
    example = {"tokens": torch.randn(batch, 64, 4)}
    graph_module = normalized(model, example, MPQConfig())
    with torch.no_grad():
        torch.testing.assert_close(graph_module(**example), model(**example))


class _Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        # no sum over elements: the order of a sum, and so its last bit, follows memory
        return x.view(x.shape[0], -1, 4) + x.view_as(x).view(-1, 4)[:1]


@given(order=st.permutations([0, 1, 2, 3]), seed=st.integers(0, 99))
def test_strides_of_inputs_change_no_bit(order, seed):
    generator = torch.Generator().manual_seed(seed)
    graph_module = trace(_Views(), {"x": torch.randn(2, 3, 5, 4, generator=generator)})
    x = torch.randn(2, 3, 5, 4, generator=generator)
    back = [order.index(axis) for axis in range(4)]
    laid_out = x.permute(order).contiguous().permute(back)
    assert torch.equal(laid_out, x)
    assert same_bits(graph_module(x=laid_out), graph_module(x=x))


class _Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.as_strided((2, 3), (3, 1))


def test_reading_by_strides_is_refused():
    with pytest.raises(TraceError, match=r"as_strided.*use unfold, reshape or indexing"):
        trace(_Strided(), {"x": torch.randn(2, 3)})
