"""Every refusal names the module path, the source line and what to do."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from mpqdm_fx.capture.diagnose import CaptureError
from mpqdm_fx.capture.explain import explain
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.nested import concatenate


class Inner(nn.Module):
    """Does what no export can follow, one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        if self.way == "branch" and y.sum() > 0:
            return -y
        if self.way == "item":
            return y * [1.0, 2.0][int(y.argmax().item()) % 2]
        if self.way == "numpy":
            return torch.from_numpy(np.tanh(y.detach().numpy()))
        return y


class Outer(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), Inner(way)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Low(nn.Module):
    """Computes a part in half precision by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float() * 2


def test_a_model_that_switches_autocast_on_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Low()).eval()
    with pytest.raises(TraceError, match=r"Sequential: 1 computes a part under autocast \(torch.b"):
        trace(model, (torch.randn(2, 4),))


@pytest.mark.parametrize(
    ("way", "code", "suggestion"),
    [
        ("branch", 'if self.way == "branch" and y.sum() > 0:', "torch.where"),
        ("item", "return y * [1.0, 2.0][int(y.argmax().item()) % 2]", "torch.where"),
        ("numpy", "return torch.from_numpy(np.tanh(y.detach().numpy()))", "torch operations"),
    ],
)
def test_refusal_names_path_line_and_suggestion(way: str, code: str, suggestion: str) -> None:
    with pytest.raises(CaptureError) as caught:
        trace(Outer(way).eval(), (torch.randn(2, 4),))
    refusal = caught.value.refusal
    assert refusal.path == "blocks.1"
    assert refusal.line.rpartition(":")[0].endswith("tests/capture/test_trace_errors.py")
    assert refusal.code == code
    assert suggestion in refusal.suggestion
    assert "\n" not in str(caught.value)
    for part in ("Outer cannot be captured", refusal.path, refusal.line, code, suggestion):
        assert part in str(caught.value)


def test_a_refusal_names_the_models_line_and_none_of_this_package() -> None:
    class Helped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return concatenate([x, {"x": x}])

    with pytest.raises(CaptureError) as caught:
        trace(Helped(), (torch.randn(2, 4),))
    refusal = caught.value.refusal
    assert refusal.line.rpartition(":")[0].endswith("tests/capture/test_trace_errors.py")
    assert refusal.code == 'return concatenate([x, {"x": x}])'


def test_state_that_a_later_call_reads_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x if self.last is None else x + self.last
            return self.last

    model = Counter()
    with pytest.raises(TraceError, match=r"assigned during export|keeps state between calls"):
        trace(model, (torch.randn(2, 4),))
    assert model.last is None


def test_rejected_example_inputs_are_the_models_own_error_with_the_shapes() -> None:
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    with pytest.raises(CaptureError) as caught:
        trace(model, {"sample": torch.zeros(2, 5, 8, 8), "timestep": 1})
    message = str(caught.value)
    assert "UNet2DModel rejects the example inputs" in message
    assert "expected input[2, 5, 8, 8] to have 3 channels" in message
    assert "sample [2, 5, 8, 8] float32" in message
    assert "\n" not in message
    assert caught.value.refusal.path == "conv_in"
    assert model.training


def test_random_numbers_in_evaluation_mode_are_refused() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(TraceError, match="draws random numbers"):
        trace(Noisy(), (torch.randn(2, 4),))


def test_output_that_no_graph_can_build_is_refused() -> None:
    class Thing:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return Thing(x * 2)

    with pytest.raises(TraceError, match="Thing"):
        trace(Model(), (torch.randn(2, 4),))


def test_explain_reports_a_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    report = explain(model, (torch.randn(2, 4),))
    assert report.ok
    assert report.nodes == (("Linear", 2), ("SiLU", 1))
    assert (report.total_nodes, report.weight_layers) == (3, 2)
    assert report.batch_range == (1, None)
    assert report.seconds > 0
    assert (report.refusal, report.path, report.line) == ("", "", "")


def test_explain_reports_a_refusal_in_parts() -> None:
    report = explain(Outer("branch").eval(), (torch.randn(2, 4),))
    assert not report.ok
    assert report.path == "blocks.1"
    assert "y.sum() > 0" in report.code
    assert report.nodes == ()


def test_explain_reports_inputs_that_do_not_bind() -> None:
    report = explain(Outer("none"), {"y": 1})
    assert not report.ok
    assert "no argument 'y'" in report.refusal
