"""The values that a graph computes on the way."""

import torch
from torch import fx


def node_values(graph, inputs):
    """Value of every node, on inputs in order."""

    class Keep(fx.Interpreter):
        def run_node(self, n):
            kept[n] = super().run_node(n)
            return kept[n]

    kept = {}
    with torch.no_grad():
        Keep(graph).run(*inputs)
    return kept
