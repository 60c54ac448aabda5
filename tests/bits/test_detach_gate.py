"""Sensitivities pass `detach`, which says something to training alone."""

import torch
from torch import nn

from mpqdm_fx.bits.probes import output_energies
from mpqdm_fx.capture.trace import trace


class Behind(nn.Module):
    """A layer that the output is computed from, behind a step."""

    def __init__(self, step):
        super().__init__()
        self.used, self.cut, self.step = nn.Linear(3, 2), nn.Linear(3, 2), step

    def forward(self, x):
        return self.used(x) + self.step(self.cut(x))


class StraightThrough(nn.Module):
    """A vector quantizer as it is written for training."""

    def __init__(self):
        super().__init__()
        self.encode, self.codes = nn.Linear(3, 2), nn.Embedding(5, 2)

    def forward(self, x):
        z = self.encode(x)
        distances = (z[..., None, :] - self.codes.weight).square().sum(-1)
        nearest = self.codes(distances.argmin(-1))
        return (z + (nearest - z).detach()).tanh()


def test_gradients_pass_what_is_detached():
    calls = [{"x": torch.randn(4, 3)}]
    torch.manual_seed(0)
    detached = trace(Behind(torch.Tensor.detach), calls[0])
    torch.manual_seed(0)
    plain = trace(Behind(torch.Tensor.contiguous), calls[0])
    expected, found = (output_energies(graph, calls).channels for graph in (plain, detached))
    for name in ("used", "cut"):
        assert torch.equal(expected[name], found[name])


def test_both_sides_of_a_straight_through_estimator_have_energies():
    calls = [{"x": torch.randn(64, 3)}]
    model = StraightThrough()
    energies = output_energies(trace(model, calls[0]), calls).channels
    z = model.encode(calls[0]["x"])
    indices = (z[:, None] - model.codes.weight).square().sum(-1).argmin(-1)
    slope = (1 - model.codes(indices).tanh().square()).square().double()
    torch.testing.assert_close(energies["encode"], slope.mean(0), rtol=1e-5, atol=0)
    by_code = torch.zeros(5, 2).double().index_add(0, indices, slope) / 64
    torch.testing.assert_close(energies["codes"], by_code, rtol=1e-5, atol=0)
