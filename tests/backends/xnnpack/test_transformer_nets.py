"""What transformers are made of runs on XNNPACK whole, and what cannot run is refused by name.

Tiny nets, each with the constructs of a family; the families themselves are in
`test_transformer_table.py`.
"""

import pytest
import torch
from norm_cases import draw, traced
from rounded_nets import round_to_grid
from torch import nn
from torch.nn import functional

from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import LoweringError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.records.activations import DynamicActivation

pytestmark = pytest.mark.xnnpack


class Rotary(nn.Module):
    """Attention with complex rotary embeddings and keys that two heads share."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_kv, self.to_out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("angles", torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1]))

    def turned(self, x):
        table = torch.polar(torch.ones_like(self.angles), self.angles)[:, None]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).flatten(3)

    def forward(self, x):
        q = self.turned(self.to_q(x).unflatten(2, (4, 4))).transpose(1, 2)
        k, v = self.to_kv(x).unflatten(2, (2, 2, 4)).unbind(2)
        k, v = (t.repeat_interleave(2, 2).transpose(1, 2) for t in (self.turned(k), v))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))

    @staticmethod
    def inputs():
        return {"x": draw(2, 5, 8).float()}


class Turns(nn.Module):
    """Rotary embeddings that fill a value in turns, as Wan has them, and pooled tokens."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("waves", draw(1, 5, 8).float())

    def forward(self, x):
        first, second = self.proj(x).unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.empty_like(x)
        y[..., 0::2] = first * self.waves[..., 0::2] - second * self.waves[..., 1::2]
        y[..., 1::2] = first * self.waves[..., 1::2] + second * self.waves[..., 0::2]
        pooled = y.sum(dim=1, keepdim=True) / 5
        return y + pooled.expand(-1, 5, -1).clone() + x[:, :, ::2].repeat(1, 1, 2) ** 3

    @staticmethod
    def inputs():
        return Rotary.inputs()


class Video(nn.Module):
    """Patches of frames to tokens, linear attention by matmul, and patches put together again."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv3d(3, 8, (1, 2, 2), stride=(1, 2, 2))
        self.out = nn.Linear(8, 12)

    def forward(self, x):
        batch, _, frames, height, width = x.shape
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        mixed = tokens @ (tokens.transpose(1, 2) @ tokens) / 100
        y = self.out(mixed).reshape(batch, frames, height // 2, width // 2, 3, 2, 2)
        return y.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    @staticmethod
    def inputs():
        return {"x": draw(2, 3, 3, 4, 6).float()}


class Masked(nn.Module):
    """Tokens behind a mask are replaced by a learned one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.missing = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x, mask):
        return self.second(torch.where(mask[..., None], self.first(x), self.missing))

    @staticmethod
    def inputs():
        return Rotary.inputs() | {"mask": torch.arange(10).reshape(2, 5) % 3 > 0}


#: What stays outside the delegate: a mask is cast to numbers.
OUTSIDE = {Rotary: 0, Turns: 0, Video: 0, Masked: 1}


def graph_of(kind):
    torch.manual_seed(0)
    return trace(kind().eval(), kind.inputs())


@pytest.mark.parametrize("kind", OUTSIDE)
def test_float_net_is_one_delegate(kind, tmp_path):
    program = lower_xnnpack_float(graph_of(kind), kind.inputs(), tmp_path / "net.pte")
    assert (program.subgraphs, program.undelegated) == (1, OUTSIDE[kind]), program.refusals
    assert program.sqnr_db > 90


@pytest.mark.parametrize(
    "kind",
    [
        kind if index == 0 else pytest.param(kind, marks=pytest.mark.matrix)
        for index, kind in enumerate(OUTSIDE)
    ],
)
def test_dynamic_int8_net_is_one_delegate(kind, tmp_path):
    graph = round_to_grid(graph_of(kind), 4)
    activations = dict.fromkeys(weight_layers(graph), DynamicActivation())
    program = lower_xnnpack(graph, activations, kind.inputs(), tmp_path / "net.pte")
    assert (program.subgraphs, program.undelegated) == (1, OUTSIDE[kind]), program.refusals
    assert not program.float_layers
    # a code of 8 bits is the neighbouring one here and there; another function is at 0 dB
    assert program.sqnr_db > 30


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (nn.Conv3d(2, 2, 3), (1, 2, 4, 4, 4), "have a Conv3d"),
        (lambda m, x: torch.fft.fft(x).real + 1, (2, 4), "fft_fft.*complex numbers.*no rewriting"),
        (lambda m, x: x[x[:, 0] > 0].sum(0), (4, 3), "depends on the values of its input"),
    ],
)
def test_what_no_kernel_runs_is_refused_by_name(net, shape, message, tmp_path):
    if isinstance(net, nn.Module):
        net = nn.Sequential(net, nn.Flatten())
    x = draw(*shape).float()
    graph = traced(net, x, dynamic_batch=False)
    with pytest.raises(LoweringError, match=message):
        lower_xnnpack_float(graph, (x,), tmp_path / "net.pte")
