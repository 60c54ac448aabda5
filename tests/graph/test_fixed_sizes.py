"""A graph for the sizes of one call has no dynamic axis, and gives the same there."""

import torch
from norm_cases import draw, traced
from torch import nn

from mpqdm_fx.graph.fixed_sizes import fixed_sizes


class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x):
        batch, tokens, _ = x.shape
        y = self.linear(x).reshape(batch * tokens, -1)
        return y.view(batch, tokens, 6).mean(1, keepdim=True).expand(batch, tokens, 6) * batch


def test_sizes_are_numbers_and_the_result_stays():
    x = draw(2, 3, 4).float()
    graph = traced(Sized(), x)
    assert graph.meta["signature"].dynamic_batch
    fixed = fixed_sizes(graph, (draw(5, 3, 4).float(),))
    for node in fixed.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            assert all(isinstance(size, int) for size in node.meta["val"].shape)
        assert "sym_size" not in str(node.target)
    x = draw(5, 3, 4, seed=1).float()
    assert torch.equal(fixed(x), graph(x))
    assert any("sym_size" in str(node.target) for node in graph.graph.nodes)  # it was not changed


def test_a_graph_of_fixed_sizes_is_itself():
    x = draw(2, 3, 4).float()
    graph = traced(Sized(), x, dynamic_batch=False)
    assert fixed_sizes(graph, (x,)) is graph
