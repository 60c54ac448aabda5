"""Samples are the leading axis of tensors, or the entries of a list."""

import pytest
import torch

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
    ],
)
def test_samples_of_a_call(call, samples, listed):
    assert batch_size_of(call) == samples
    assert samples_listed(call) is listed
