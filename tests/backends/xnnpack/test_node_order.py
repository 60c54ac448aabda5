"""Delegates run their nodes in the order of the graph, whatever ExecuTorch sorted in between."""

import pytest
import torch
from executorch.exir import lowered_backend_module
from torch import nn

from mpqdm_fx.backends.xnnpack.edge import to_edge
from mpqdm_fx.errors import LoweringError

CHAINS = 4


class Chains(nn.Module):
    """Independent chains in front of an operator that stays outside, and behind it."""

    def forward(self, x):
        for _ in range(2):
            x = torch.round(sum(torch.softmax(x * float(i + 2), -1) for i in range(CHAINS)))
        return x


def test_every_delegate_runs_chain_after_chain():
    edge = to_edge(torch.export.export(Chains().eval(), (torch.randn(4, 8),)))
    graph = edge.exported_program().graph_module
    delegates = lowered_backend_module.get_lowered_backend_modules(graph)
    assert len(delegates) == 2
    for delegate in delegates:
        names = [str(node.target) for node in delegate.original_module.graph.nodes]
        kinds = [kind for name in names for kind in ("mul", "softmax") if kind in name]
        assert kinds == ["mul", "softmax"] * CHAINS


def test_the_sort_of_executorch_is_back_behind_a_lowering():
    before = lowered_backend_module.legalize_graph
    to_edge(torch.export.export(Chains().eval(), (torch.randn(4, 8),)))
    assert lowered_backend_module.legalize_graph is before
    with pytest.raises(LoweringError):
        to_edge(None)
    assert lowered_backend_module.legalize_graph is before
