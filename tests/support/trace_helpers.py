"""What the tests of trace share: counting nodes, comparing with eager execution, a small model."""

import copy
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone uses
from torch import nn

from mpqdm_fx.capture.trace import same_bits


def calls(graph_module: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]


def attributes(graph_module: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"]


def operators(graph_module: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"]


def assert_equal_to_eager(
    model: nn.Module, graph_module: torch.fx.GraphModule, *inputs: Any
) -> None:
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(*inputs)
        assert same_bits(graph_module(*inputs), expected)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A convolution, a norm, an activation that is used twice, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(0.5)
        self.out = nn.Sequential(nn.Conv2d(8, 3, 1))
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x)))
        return self.out(self.drop(self.act(F.silu(y) * self.gain)))
