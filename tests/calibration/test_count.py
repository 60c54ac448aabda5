"""What is counted as a weight, what is said about it, and that the file has those bytes."""

import logging
from pathlib import Path

import pytest
import torch
from small import TinyNet, net_calls
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses
from torch.nn.utils import parametrizations

from mpqdm_fx.api import quantize
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.folders import WEIGHTS
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.records.config import MPQConfig


class Standardized(nn.Conv2d):
    """A convolution whose weight is normalised at every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Functional(nn.Module):
    """Parameters and a buffer that no layer owns; a table that is added; a layer never called."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(12, 12, 3, 3) / 10)
        self.matrix = nn.Parameter(torch.randn(12, 12) / 4)
        self.gain = nn.Parameter(torch.ones(12))
        self.register_buffer("blur", torch.rand(12, 1, 3, 3))
        self.register_buffer("table", torch.randn(12, 6, 10))
        self.dead = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, padding=1) + self.table
        x = F.conv2d(x, self.blur / self.blur.sum(), padding=1, groups=12)
        return (F.linear(x.movedim(1, -1), self.matrix) * self.gain).movedim(-1, 1)


class Attention(nn.Module):
    """torch's own attention, whose packed projection no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).mT
        return self.attention(rows, rows, rows)[0].mT.reshape(x.shape)


class Twice(nn.Module):
    """One convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(12, 12, 3, padding=1)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


class Tied(nn.Module):
    """Two layers with one weight; two float ones with one storage; a batch norm that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.a = nn.Conv2d(12, 12, 1)
        self.b = nn.Conv2d(12, 12, 1)
        self.b.weight = self.a.weight
        nn.init.zeros_(self.a.bias)  # stored in half precision until it is refitted
        self.up = nn.ConvTranspose2d(12, 12, 1, dilation=2)
        self.down = nn.ConvTranspose2d(12, 12, 1, dilation=2)
        self.down.weight = nn.Parameter(self.up.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(F.silu(self.norm(self.near(x))))
        return self.down(self.up(F.silu(self.b(F.silu(x)))))


class Net(TinyNet):
    """`TinyNet` with something in the middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.middle(F.silu(self.conv_in(x))))


def made(kind: str) -> Net:
    torch.manual_seed(0)
    middles = {
        "standardized": lambda: Standardized(12, 12, 3, padding=1),
        "functional": Functional,
        "attention": Attention,
        "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1)),
        "twice": Twice,
        "tied": Tied,
    }
    return Net(middles[kind]()).eval()


# By hand. All have conv_in (324 weights) and conv_out (324), and lack `TinyNet.norm`, `body`, `mix`
# (24 + 1744 + 204 parameters that are not read).
WEIGHTS_OF = {
    "standardized": (648 + 1296, {"middle.weight"}),
    "functional": (648 + 1296 + 144 + 108, {"middle.kernel", "middle.matrix", "middle.blur"}),
    "attention": (648 + 432 + 144, {"middle.attention.in_proj_weight"}),
    "weight_norm": (648 + 1296, set()),
    "twice": (648 + 1296, set()),
    "tied": (648 + 1296 + 144 + 144, {"middle.up.weight"}),
}
COUNTS = {
    "standardized": {"shared": 0, "folded": 0, "unused": 1972},
    "functional": {"shared": 0, "folded": 0, "unused": 1972 + 39},
    "attention": {"shared": 0, "folded": 0, "unused": 1972},
    "weight_norm": {"shared": 0, "folded": 12, "unused": 1972},
    "twice": {"shared": 0, "folded": 0, "unused": 1972},
    "tied": {"shared": 144, "folded": 24, "unused": 1972},
}


@pytest.fixture(scope="module", params=list(WEIGHTS_OF))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def quantized(kind: str) -> QuantizedModel:
    config = MPQConfig(weight_bits=4, allocation="uniform", max_rows=128, refinements=1)
    return quantize(made(kind), config, net_calls())


def payload(folder: Path) -> int:
    """Bytes of a safetensors file without its header."""
    data = (folder / WEIGHTS).read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_every_weight_counts_whoever_owns_it(kind: str, quantized: QuantizedModel) -> None:
    weights, left = WEIGHTS_OF[kind]
    assert quantized.plan.num_weights == weights
    assert {tensor.name for tensor in quantized.plan.float_weights} == left


def test_fates_add_up_to_the_parameters_of_the_model(kind: str, quantized: QuantizedModel) -> None:
    plan, model = quantized.plan, made(kind)
    assert {fate: plan.count(fate) for fate in COUNTS[kind]} == COUNTS[kind]
    assert plan.num_parameters == sum(p.numel() for p in model.parameters())
    rest = plan.num_parameters - sum(COUNTS[kind].values())
    assert plan.count("quantized") + plan.count("float") == rest
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert [entry.name for entry in plan.parameters] == names


def test_effective_bits_are_the_bytes_of_the_file(
    quantized: QuantizedModel, tmp_path: Path
) -> None:
    plan = quantized.plan
    stored = payload(save(quantized, tmp_path / "model"))
    assert stored == plan.weight_bytes + plan.float_bytes
    assert plan.effective_bits == 8 * (stored - plan.float_bytes) / plan.num_weights


def test_a_loaded_model_has_the_same_count_and_numbers(
    kind: str, quantized: QuantizedModel, tmp_path: Path
) -> None:
    folder = save(quantized, tmp_path / "model")
    loaded = load(folder, model=made(kind))
    assert loaded.plan == quantized.plan
    call = net_calls(1, seed=4)[0]
    assert torch.equal(loaded(**call), quantized(**call))
    again = save(loaded, tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Messages about what was counted."""
    return [record.message for record in caplog.records if record.name.endswith(".count")]


def test_weights_in_float_are_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    config = MPQConfig(allocation="uniform", max_rows=64, refinements=0)
    with caplog.at_level(logging.WARNING, "mpqdm_fx.calibration.count"):
        plan = quantize(made("attention"), config, net_calls(2)).plan
    # what the judgement says of a net of random weights is another matter
    (message,) = said(caplog)
    assert message == plan.remarks[0]
    assert message == (
        "35.3% of the weights (432 of 1,224) stay in float: middle.attention.in_proj_weight "
        "(read by MultiheadAttention as a tensor, not through a layer)"
    )
    caplog.clear()
    assert quantize(TinyNet(), config, net_calls(2)).plan.remarks == ()
    assert said(caplog) == []


def test_a_budget_counts_the_weights_that_no_layer_owns(tmp_path: Path) -> None:
    bits = 17.0
    config = MPQConfig(effective_bits=bits, max_rows=64, refinements=0)
    quantized = quantize(made("attention"), config, net_calls(2))
    assert bits - 0.5 < quantized.plan.effective_bits <= bits
    stored = payload(save(quantized, tmp_path / "model"))
    assert stored - quantized.plan.float_bytes <= bits * 1224 / 8


def test_a_budget_that_the_float_weights_exceed_is_refused_with_their_names() -> None:
    config = MPQConfig(effective_bits=8, max_rows=64, refinements=0)
    with pytest.raises(ConfigError, match=r"smallest that can is.* 35.3% .*in_proj_weight"):
        quantize(made("attention"), config, net_calls(2))
