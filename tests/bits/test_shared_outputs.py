"""Outputs that are no rows of samples: a loss beside the image."""

import pytest
import torch
from torch import nn

from mpqdm_fx.bits.probes import output_energies
from mpqdm_fx.capture.trace import trace


class _WithLoss(nn.Module):
    """An image, and beside it what all samples share: without an axis, or of another length."""

    def __init__(self, beside):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 4)
        self.end = nn.Linear(4, 4)
        self.beside = beside

    def forward(self, x):
        hidden = self.body(x).relu()
        return {"image": self.end(hidden), "beside": self.beside(hidden)}


@pytest.mark.parametrize(
    "beside", [lambda h: h.mean(), lambda h: h.mean(0, keepdim=True), lambda h: h.mean(0)[:3]]
)
def test_outputs_that_all_samples_share_are_taken(beside):
    calls = [{"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(n))} for n in (1, 2)]
    alone = output_energies(trace(_WithLoss(lambda h: h[:, 0] * 0), calls[0]), calls, probes=64)
    energies = output_energies(trace(_WithLoss(beside), calls[0]), calls, probes=64)
    assert energies.output > alone.output
    assert energies.channels["body"].sum() > 0
    torch.testing.assert_close(energies.channels["end"], alone.channels["end"])
