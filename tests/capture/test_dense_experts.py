"""Mixtures of experts are traced as the sum over all experts, and it is what they compute."""

import logging

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqdm_fx.capture.dense_experts import routed_blocks
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.layers import weight_layers


def moe(experts=4, chosen=2, dim=8, seed=0):
    torch.manual_seed(seed)
    block = MOEFeedForwardSwiGLU(
        dim=dim, hidden_dim=16, num_routed_experts=experts, num_activated_experts=chosen
    )
    return block.eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@given(
    experts=st.integers(2, 6),
    chosen=st.integers(1, 3),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_the_dense_form_is_what_the_block_computes(experts, chosen, tokens, seed):
    block = moe(experts, min(experts, chosen), seed=seed)
    (routed,) = routed_blocks(block)
    x = 3 * torch.randn(1, tokens, 8)
    with torch.no_grad():
        indices, gates, _ = block.gate(x)
        own = block.moe_infer(x[0], indices.view(-1), gates.view(-1, 1))
        close(routed.dense(x[0], indices.view(-1), gates.view(-1, 1)), own)


@pytest.mark.parametrize("seed", range(3))
def test_the_graph_routes_tokens_of_other_inputs_as_the_model_does(seed, caplog):
    block = nn.Sequential(moe(seed=seed), nn.Linear(8, 8), moe(3, 1, seed=seed + 1)).eval()
    with caplog.at_level(logging.WARNING):
        graph = trace(block, (torch.randn(2, 5, 8),))
    (message,) = [r.getMessage() for r in caplog.records]
    assert "all experts (2 blocks like 0: 4 experts, of which the router chooses 2)" in message
    assert "2.33 times the multiply-adds" in message  # 7 for 3
    assert message.endswith(graph.meta["signature"].note)
    for trial in range(4):
        x = torch.randn(1 + trial, 5, 8, generator=torch.Generator().manual_seed(trial))
        with torch.no_grad():
            close(graph(x), block(x))
    named = set(weight_layers(graph))
    assert {f"0.experts.{i}.w{j}" for i in range(4) for j in (1, 2, 3)} <= named
    # the router's own weight belongs to no layer and stays in float
    assert len(named) == 3 * (4 + 1) + 1 + 3 * (3 + 1)


def test_the_model_routes_as_before_afterwards():
    block = moe()
    before = dict(block.__dict__)
    trace(block, (torch.randn(2, 5, 8),))
    assert block.__dict__ == before
    with pytest.raises(RuntimeError):  # one channel too many for its experts
        trace(block, (torch.randn(2, 5, 9),))
    assert block.__dict__ == before


class TwoAxes(nn.Module):
    """Routes with indices of two axes, [tokens, chosen], as later models do."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.router = nn.Linear(4, 3)
        self.scale = scale

    def forward(self, x):
        gates, indices = self.router(x).softmax(-1).topk(2)
        return self.moe_infer(x, indices, gates)

    def moe_infer(self, x, indices, gates):
        result = torch.zeros_like(x)
        for place in indices.unique().tolist():
            rows, slots = (indices == place).nonzero(as_tuple=True)
            result[rows] += self.scale * gates[rows, slots, None] * self.experts[place](x[rows])
        return result


def test_indices_may_have_two_axes():
    torch.manual_seed(0)
    model, x = TwoAxes().eval(), torch.randn(7, 4)
    graph = trace(model, (x,))
    other = torch.randn(5, 4)
    with torch.no_grad():
        close(graph(other), model(other))


def test_a_block_that_computes_something_else_is_refused_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), TwoAxes(scale=1.01)).eval()
    with pytest.raises(TraceError, match=r"1 \(TwoAxes\) routes tokens .* gate of zero"):
        trace(model, (torch.randn(7, 4),))
