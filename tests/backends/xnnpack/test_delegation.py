"""Rewritten graphs run on XNNPACK whole: one delegate, nothing on portable kernels, right numbers.

All shapes have a batch of 2 and sizes that differ from axis to axis, so that a layout mistake
cannot go unseen.
"""

import pytest
import torch
from rounded_nets import measured_ranges, round_to_grid
from torch import nn
from torch.nn import functional

from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import Pipeline

pytestmark = pytest.mark.xnnpack


class Image(nn.Module):
    """Convolutions with "same" padding, group norms, upsampling by 2 and by 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding="same")
        self.norm1 = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 10, (2, 3), padding="same")
        self.norm2 = nn.GroupNorm(5, 10, affine=False)
        self.conv3 = nn.Conv2d(10, 4, 1, padding="valid")

    def forward(self, x):
        h = functional.silu(self.norm1(self.conv1(x)))
        h = functional.interpolate(h, scale_factor=2.0)
        h = functional.silu(self.norm2(self.conv2(h)))
        return self.conv3(functional.interpolate(h, scale_factor=(1.0, 3.0)))

    @staticmethod
    def inputs():
        return {"x": torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))}


class Tokens(nn.Module):
    """Attention with an RMS norm on its queries and GEGLU, each after a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 12)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v = (nn.Linear(12, 12, bias=False) for _ in range(3))
        self.norm_q = nn.RMSNorm(4)
        self.gated, self.out = nn.Linear(12, 32), nn.Linear(16, 12)

    def forward(self, x):
        x = self.proj(x)
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(2, (3, 4)).transpose(1, 2) for f in self._projections())
        a = functional.scaled_dot_product_attention(self.norm_q(q), k, v)
        x = (x + a.transpose(1, 2).flatten(2)) / 1.0
        value, gate = self.gated(self.norm2(x)).chunk(2, dim=-1)
        return x + self.out(value * functional.gelu(gate))

    def _projections(self):
        return self.to_q, self.to_k, self.to_v

    @staticmethod
    def inputs():
        return {"x": torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))}


class Time(nn.Module):
    """A timestep embedding that moves an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 10, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x, timestep):
        t = timestep * torch.ones(x.shape[0], dtype=torch.int64)
        t = t[:, None].float() * torch.exp(-torch.arange(4, dtype=torch.float32) / 4)[None, :]
        t = torch.cat([torch.sin(t), torch.cos(t)], dim=-1)
        t = torch.cat([t[:, 4:], t[:, :4]], dim=-1)
        return self.conv(x) + self.mix(t)[:, :, None, None]

    @staticmethod
    def inputs():
        return {**Image.inputs(), "timestep": torch.tensor([3, 900])}


class Guided(nn.Module):
    """What guided diffusion's blocks are made of: halving, scale and shift, one layer for q, k, v.

    Its input is scaled by a reciprocal, as preconditioned models do it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)
        self.halve, self.shifts = nn.AvgPool2d(2), nn.Linear(4, 16)
        self.qkv, self.proj = nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x, embedding):
        h = self.conv1(x * (1 / (embedding[:, 0].square() + 1).sqrt())[:, None, None, None])
        h = self.halve(functional.silu(self.norm1(h)))
        scale, shift = self.shifts(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(functional.silu(self.norm2(h) * (1 + scale) + shift))
        q, k, v = self.qkv(h).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k / 3), dim=-1)
        mixed = torch.einsum("bts,bcs->bct", weights, v)
        return h + self.proj(mixed.unflatten(2, h.shape[2:]))

    @staticmethod
    def inputs():
        generator = torch.Generator().manual_seed(3)
        embedding = torch.randn(2, 4, generator=generator)
        return {"x": torch.randn(2, 3, 6, 10, generator=generator), "embedding": embedding}


def traced(kind):
    torch.manual_seed(0)
    net = kind().eval()
    for norm in net.modules():
        if isinstance(norm, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            for parameter in norm.parameters():
                nn.init.normal_(parameter, mean=0.5)
    inputs = kind.inputs()
    return Pipeline(passes=NORMALIZE)(trace(net, inputs)).graph_module, inputs


#: What stays outside the delegate: XNNPACK knows no integers, so a timestep is cast outside.
OUTSIDE = {Image: {}, Tokens: {}, Time: {"dim_order_ops__to_dim_order_copy_default": 1}, Guided: {}}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_float_net_is_one_delegate(kind, tmp_path):
    graph, inputs = traced(kind)
    program = lower_xnnpack_float(graph, inputs, tmp_path / "net.pte")
    assert program.refusals == OUTSIDE[kind]
    assert program.subgraphs == 1
    (output,) = XnnpackRunner(program.path)(*inputs.values())
    with torch.no_grad():
        expected = graph(**inputs)
    assert sqnr_db(expected, output) > 100
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", [Image, Tokens, Guided])
def test_static_int8_net_is_one_delegate_and_only_layers_are_quantized(kind, tmp_path):
    graph, inputs = traced(kind)
    graph = round_to_grid(graph)
    ranges = measured_ranges(graph, inputs)
    program = lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte")
    assert program.refusals == {}
    assert program.subgraphs == 1
    (output,) = XnnpackRunner(program.path)(*inputs.values())
    with torch.no_grad():
        expected = graph(**inputs)
    # 8 bits for what layers read and write; a quantized norm or a layout mistake costs far more
    assert sqnr_db(expected, output) > 25
