"""Samples are the leading axis of tensors, or the entries of a list."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.samples import batch_size_of, samples_listed

IMAGES = [torch.zeros(4, 8, 8), torch.zeros(4, 8, 8), torch.zeros(4, 8, 8)]


@pytest.mark.parametrize(
    ("call", "samples", "listed"),
    [
        ({"x": torch.zeros(2, 4), "t": torch.zeros(2)}, 2, False),
        ({"x": IMAGES, "t": torch.zeros(3)}, 3, True),
        ({"t": 3, "x": IMAGES[:1]}, 1, True),
        ({"x": torch.zeros(2, 4), "layers": IMAGES}, 2, False),
        ({"x": [(torch.zeros(2, 4), torch.zeros(2, 4))]}, 2, False),
        ({"x": (torch.zeros(2, 4), torch.zeros(2, 3))}, 2, False),
        ({"t": torch.zeros(3)}, 1, False),
        # what has no batch may come first: a noise level is told for each sample
        ({"ids": torch.zeros(5, 2), "x": torch.zeros(3, 5, 4), "t": torch.zeros(3)}, 3, False),
        ({"ids": torch.zeros(5, 2), "x": torch.zeros(3, 5, 4), "sigma": torch.ones(3)}, 3, False),
        ({"ids": torch.zeros(5, 2), "x": torch.zeros(3, 5, 4), "t": torch.zeros(1)}, 5, False),
        ({"x": torch.zeros(6, 5, 4), "ids": torch.zeros(5, 2), "t": torch.zeros(4)}, 6, False),
    ],
)
def test_samples_of_a_call(call, samples, listed):
    assert batch_size_of(call) == samples
    assert samples_listed(call) is listed


class Positioned(nn.Module):
    """Reads positions, which all samples share, beside the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.inner = nn.Linear(2, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(x + self.position(ids)) * timestep[:, None, None]


@pytest.mark.parametrize("timestep", [torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0)])
def test_a_call_is_the_same_in_any_order_of_its_arguments(timestep: Tensor) -> None:
    call = {"ids": torch.randn(5, 2), "timestep": timestep, "x": torch.randn(3, 5, 4)}
    model = Positioned()
    for order in itertools.permutations(call):
        graph = trace(model, {name: call[name] for name in order})
        signature = graph.meta["signature"]
        assert (signature.batch, signature.batch_range) == (3, (1, None))
        expected = model(**{**call, "timestep": timestep.expand(3)})
        torch.testing.assert_close(graph(**signature.normalize((), call)), expected)
