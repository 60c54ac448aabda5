"""Ops that ExecuTorch lowers badly are written otherwise: programs run, in one delegate."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace

pytestmark = pytest.mark.xnnpack


class Image(nn.Module):
    """A convolution on each side of an operator."""

    def __init__(self, operator) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.operator = operator

    def forward(self, x):
        return self.last(self.operator(self.first(x)))


class Tokens(nn.Module):
    """A linear on each side of an operator."""

    def __init__(self, operator) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.operator = operator

    def forward(self, x):
        return self.last(self.operator(self.first(x)))


class Slopes(nn.PReLU):
    """Slopes that differ, some of them negative."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.weight.data = torch.linspace(-0.5, 1.5, count)


def padded(*sides, **options):
    return lambda x: functional.pad(x, sides, **options)


def attending_to_none(x):
    heads, none = x[:, None], x[:, None, :0]
    return x + functional.scaled_dot_product_attention(heads, none, none)[:, 0]


IMAGE, SEQUENCE, VECTOR = (1, 3, 8, 6), (1, 5, 8), (1, 8)


def tanh_form(x):
    return functional.gelu(3 * x, approximate="tanh")


MODELS = {
    "the tanh form of GELU": (Tokens(tanh_form), SEQUENCE),
    "the tanh form of GELU as a module": (Image(nn.GELU(approximate="tanh")), IMAGE),
    "the exact form of GELU": (Tokens(lambda x: functional.gelu(3 * x)), SEQUENCE),
    "crop": (Image(padded(-1, -2, 0, -1)), IMAGE),
    "crop and pad": (Image(padded(-1, 2, 1, -2, value=0.5)), IMAGE),
    "crop by a module": (Image(nn.ZeroPad2d((-1, 1, 0, -1))), IMAGE),
    "crop tokens": (Tokens(padded(0, 0, -1, 2)), SEQUENCE),
    "PReLU of an image": (Image(nn.PReLU(8)), IMAGE),
    "one slope": (Tokens(nn.PReLU()), SEQUENCE),
    "a slope for each token": (Tokens(Slopes(5)), SEQUENCE),
    "slopes of a vector": (Tokens(Slopes(8)), VECTOR),
    "PReLU as a function": (Tokens(lambda x: functional.prelu(x, torch.tensor([0.3]))), SEQUENCE),
    "attention without keys": (Tokens(attending_to_none), SEQUENCE),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_program_of_a_rare_op_runs_whole(name, tmp_path):
    model, shape = MODELS[name]
    model.eval()
    example = {"x": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    graph = trace(model, example, dynamic_batch=False)
    program = lower_xnnpack_float(graph, example, tmp_path / "net.pte")
    assert program.subgraphs == 1
    runner = XnnpackRunner(tmp_path / "net.pte")
    for seed in (0, 1):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        (made,) = runner(x)
        with torch.no_grad():
            torch.testing.assert_close(made, model(x), atol=1e-5, rtol=1e-5)
