"""Padding that is more than a number of zeros means the same behind every door."""

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone uses
from torch import Tensor, nn

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.lower import lower
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import same_bits
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.metrics import sqnr_db


class Net(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, **settings)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.body(F.silu(self.first(x)))))


def seamless() -> Net:
    """Seamless along one axis, by a helper method that is patched on every instance."""
    net = Net(kernel_size=3, padding=1)

    def forward(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        return F.conv2d(x, weight, bias, self.stride, (0, 0), self.dilation, self.groups)

    for module in (net.first, net.body, net.last):
        module._conv_forward = types.MethodType(forward, module)
    return net


def circular() -> Net:
    """A mode that was set after the constructor."""
    net = Net(kernel_size=3, padding=1)
    for module in (net.first, net.body, net.last):
        module.padding_mode = "circular"
    return net


NETS = {
    "same": lambda: Net(kernel_size=3, padding="same"),
    "same, even kernel": lambda: Net(kernel_size=4, padding="same"),
    "valid": lambda: Net(kernel_size=3, padding="valid"),
    "reflect": lambda: Net(kernel_size=3, padding=1, padding_mode="reflect"),
    "replicate": lambda: Net(kernel_size=3, padding=1, padding_mode="replicate"),
    "circular, even kernel": lambda: Net(kernel_size=4, padding="same", padding_mode="circular"),
    "circular": circular,
    "seamless": seamless,
}


def calls() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(1, 3, 9, 11, generator=generator)} for _ in range(4)]


def quantized(name: str, mode: Any = "static") -> QuantizedModel:
    settings = MPQConfig(weight_bits=4, activation_bits=8, activation_mode=mode)
    return quantize(NETS[name]().eval(), settings, calls())


@pytest.mark.parametrize("name", NETS)
def test_padding_survives_quantization_torch_ao_and_a_saved_file(name, tmp_path):
    model, x = quantized(name), calls()[0]["x"]
    assert len(weight_layers(model.rounded)) == 3
    with torch.no_grad():
        assert sqnr_db(NETS[name]().eval()(x), model(x)) > 34
        assert sqnr_db(model(x), lower(model, "torch_ao")(x)) > 45
        save(model, tmp_path / "packed")
        loaded = load(tmp_path / "packed", model=NETS[name]().eval())
        assert same_bits(loaded(x), model(x))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("same, even kernel", "static"),
        ("circular", "dynamic"),
        pytest.param("seamless", "static", marks=pytest.mark.matrix),
    ],
)
def test_padding_survives_xnnpack(name, mode, tmp_path):
    model, x = quantized(name, mode), calls()[0]["x"]
    lower(model, "xnnpack", output=tmp_path / "net.pte")
    (output,) = XnnpackRunner(tmp_path / "net.pte")(x)
    with torch.no_grad():
        assert sqnr_db(model(x), output) > 45
