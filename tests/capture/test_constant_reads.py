"""Sizes that a model reads off tensors of its own are numbers in the graph."""

import torch
from torch import nn

from mpqdm_fx.capture.trace import trace

aten = torch.ops.aten


class Sizes(nn.Module):
    """Writes the size of its image into a tensor, and cuts tokens by what it reads back."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, image):
        sizes = torch.tensor(image.shape[-2:]).unsqueeze(0).repeat(len(image), 1)
        tokens = self.linear(image.flatten(2).transpose(1, 2))
        parts = []
        for index, (height, width) in enumerate(sizes):
            part = tokens[index, : height * width].reshape(1, height, width, -1)
            parts.append(part.permute(0, 3, 1, 2))
        return torch.cat(parts)


def known(graph):
    values = [n.meta["val"] for n in graph.graph.nodes if n.op == "call_function"]
    return all(isinstance(s, int) for v in values if hasattr(v, "shape") for s in v.shape)


def test_sizes_that_depend_on_no_input_are_numbers():
    torch.manual_seed(0)
    model, image = Sizes().eval(), torch.randn(2, 4, 3, 6)
    graph = trace(model, (image,))
    assert not graph.graph.find_nodes(op="call_function", target=aten.item.default)
    assert known(graph)
    assert not [n for n in graph.graph.nodes if "sym_size" in n.name]
    other = torch.randn(2, 4, 3, 6)
    assert torch.equal(graph(other), model(other))


class Drawn(nn.Module):
    def forward(self, x):
        return x * torch.rand(1).item()


def test_a_number_that_is_drawn_is_read_at_every_call():
    graph = trace(Drawn().eval(), (torch.ones(3),), dynamic_batch=False, verify=False)
    assert graph.graph.find_nodes(op="call_function", target=aten.item.default)
    assert not torch.equal(graph(torch.ones(3)), graph(torch.ones(3)))
