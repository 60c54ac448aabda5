"""A model that computes with one time for all samples is traced so, and never broadcasts it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.lower import lower
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.comparison import compare


class Timed(nn.Module):
    """A convolution on each side of what a time does."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.entry, self.exit = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time = nn.Linear(4, 8)

    def forward(self, sample, t):
        return self.exit(functional.silu(self.timed(self.entry(sample), t)))


class Scaled(Timed):
    """A tensor of shape [B] is taken for a row of the image where that is as long."""

    def timed(self, h, t):
        return self.time(h[:, :4].movedim(1, -1)).movedim(-1, 1) * t


class Waved(Timed):
    """A tensor of shape [B] is refused."""

    def timed(self, h, t):
        waves = torch.stack([torch.sin(t * k) for k in range(1, 5)])
        return h + self.time(waves)[None, :, None, None]


class Spread(Timed):
    """Takes both, as the models of diffusers do."""

    def timed(self, h, t):
        if t.ndim == 0:
            t = t[None].expand(len(h))
        return h + self.time(torch.sin(t[:, None] * torch.arange(1, 5)))[:, :, None, None]


class Rowed(Timed):
    """Takes a tensor of shape [B] alone."""

    def timed(self, h, t):
        return h + self.time(torch.sin(t[:, None] * torch.arange(1, 5)))[:, :, None, None]


def calls(batch=2, size=6, times=(0.1, 0.4, 0.9, 0.2)):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, size, size)
    return [
        {"sample": torch.randn(shape, generator=generator), "t": torch.tensor(time)}
        for time in times
    ]


@pytest.mark.parametrize("batch", [1, 2, 6])  # of 6 samples, rows are as many
@pytest.mark.parametrize("kind", [Scaled, Waved])
def test_one_time_stays_one_and_the_graph_is_the_model(kind, batch):
    model = kind().eval()
    graph = trace(model, calls(batch)[0])
    for call in [*calls(batch), *calls(batch, times=(-3.0,))]:
        assert torch.equal(graph(**graph.meta["signature"].normalize((), call)), model(**call))
    if batch > 1:
        (other,) = calls(batch + 1, times=(0.7,))
        assert torch.equal(graph(**graph.meta["signature"].normalize((), other)), model(**other))
    if batch == 2:
        assert graph.meta["signature"].spec("t").shape == ()
        with pytest.raises(TraceError, match=r"t has shape \[2\], but .* traced for \[\]"):
            graph.meta["signature"].normalize((), {**calls(2)[0], "t": torch.rand(2)})


@pytest.mark.parametrize("time", [torch.tensor(0.4), torch.tensor([0.4]), 0.4])
@pytest.mark.parametrize("kind", [Spread, Rowed])
def test_a_model_that_takes_a_time_for_each_sample_is_traced_so(kind, time):
    model = kind().eval()
    call = {**calls()[0], "t": time}
    graph = trace(model, call)
    signature = graph.meta["signature"]
    assert signature.spec("t").shape == (2,)
    apart = {**call, "t": torch.tensor([0.3, 0.8])}
    assert torch.equal(graph(**signature.normalize((), apart)), model(**apart))


@pytest.mark.parametrize("number", [0.4, 3])
def test_numbers_stay_single_too(number):
    model = Waved().eval()
    call = {**calls()[0], "t": number}
    graph = trace(model, call)
    expected = model(call["sample"], torch.tensor(number))
    assert torch.equal(graph(**graph.meta["signature"].normalize((), call)), expected)


def test_a_model_that_takes_neither_is_told_with_what_it_was_given():
    with pytest.raises(TraceError, match=r"rejects the example inputs.*sample \[2, 4, 6, 6\]"):
        trace(Waved(), {"sample": torch.zeros(2, 4, 6, 6), "t": torch.tensor(0.5)})


@pytest.mark.parametrize("mode", ["static", "dynamic", "timestep"])
@pytest.mark.parametrize("kind", [Scaled, Waved])
def test_one_time_goes_through_quantizing_storing_and_comparing(kind, mode, tmp_path):
    model = kind().eval()
    settings = MPQConfig(weight_bits=8, activation_mode=mode, slowdown=1)
    quantized = quantize(model, settings, calls())
    loaded = load(save(quantized, tmp_path / "saved"))
    for call in calls(batch=3):
        expected = model(**call)
        assert (quantized(**call) - expected).abs().max() < 0.2 * expected.std()
        assert torch.equal(loaded(**call), quantized(**call))
    compared = compare(model, quantized, calls())
    assert [round(point.level, 4) for point in compared.levels] == [0.9, 0.4, 0.2, 0.1]
    assert all(point.sqnr_db > 25 for point in compared.levels)


@pytest.mark.xnnpack
@pytest.mark.parametrize("kind", [Scaled, Waved])
def test_a_program_is_told_one_time(kind, tmp_path):
    settings = MPQConfig(weight_bits=8, activation_mode="static", slowdown=1)
    quantized = quantize(kind().eval(), settings, calls())
    lower(quantized, "xnnpack", output=tmp_path / "net.pte")
    runner = XnnpackRunner(tmp_path / "net.pte")
    for call in calls(batch=1):
        expected = quantized(**call)
        (made,) = runner(*call.values())
        assert (made - expected).abs().max() < 0.2 * expected.std()
