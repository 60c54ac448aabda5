"""A model that reads the weights of its layers beside calling them, behind every door."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.lower import lower
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.passes import UnshareWeights
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.metrics import sqnr_db


class Net(nn.Module):
    """A head tied to an embedding, and factors that are weights of other layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 8)
        self.narrow = nn.Conv1d(8, 8, 3, padding=1)
        self.wide = nn.ConvTranspose1d(8, 4, 2, stride=2)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(self.table(ids)) * self.first.weight[0] + self.first.bias
        y = self.narrow(x.transpose(1, 2)) * self.narrow.weight[:, :1, 0]
        y = self.wide(y) * self.wide.weight[0, 0, 1] * self.wide.weight[0, 3, 0]
        return linear(x, self.table.weight), y


def calls() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"ids": torch.randint(10, (1, 5), generator=generator)} for _ in range(4)]


def assert_near(actual, expected, least: float) -> None:
    assert len(actual) == len(expected) == 2
    for some, exact in zip(actual, expected, strict=True):
        assert sqnr_db(exact, some) > least


def test_passes_keep_the_numbers_that_are_read():
    net, call = Net().eval(), calls()[0]
    graph = Pipeline(passes=NORMALIZE)(trace(net, call)).graph_module
    with torch.no_grad():
        assert_near(graph(**call), net(**call), 100)


def test_a_float_program_reads_copies(tmp_path):
    # without them the process dies in the runtime
    net, call = Net().eval(), calls()[0]
    graph = trace(net, call)
    assert UnshareWeights()(graph).modified
    lower_xnnpack_float(graph, call, tmp_path / "net.pte")
    with torch.no_grad():
        assert_near(XnnpackRunner(tmp_path / "net.pte")(call["ids"]), net(**call), 80)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_quantized_programs_compute_what_the_quantized_model_computes(mode, tmp_path):
    settings = MPQConfig(weight_bits=8, activation_bits=8, activation_mode=mode)
    model, call = quantize(Net().eval(), settings, calls()), calls()[0]
    with torch.no_grad():
        expected = model(**call)
        assert_near(expected, Net().eval()(**call), 30)
        if mode == "static":
            assert_near(lower(model, "torch_ao")(**call), expected, 40)
    lower(model, "xnnpack", output=tmp_path / "net.pte")
    assert_near(XnnpackRunner(tmp_path / "net.pte")(call["ids"]), expected, 35)
