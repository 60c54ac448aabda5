"""The doctor says before lowering what the partition then is."""

import pytest
import torch
from rounded_nets import Residual, rounded
from torch import nn

from mpqdm_fx.backends.xnnpack.doctor import diagnose
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import LoweringError

pytest.importorskip("executorch")


class Interrupted(nn.Module):
    """Two convolutions with a cumulative sum between them, which XNNPACK does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.between = Sum()
        self.last = nn.Conv2d(5, 2, 3, padding=1)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Sum(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, dim=2)


def interrupted():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 6, 8)}
    return trace(Interrupted().eval(), inputs), inputs


def test_a_float_graph_gets_the_delegates_that_were_foretold(tmp_path):
    graph, inputs = interrupted()
    diagnosis = diagnose(graph, inputs)
    program = lower_xnnpack_float(graph, inputs, tmp_path / "net.pte")
    assert diagnosis.delegates == program.subgraphs == 2
    assert len(diagnosis.outside) == program.undelegated
    assert sum(diagnosis.operators.values()) == sum(program.refusals.values())
    (node,) = diagnosis.outside
    assert node.op == "aten.cumsum.default"
    assert node.shape == (2, 5, 6, 8)
    assert node.reason == "XNNPACK has no such op"
    assert "aten.cumsum.default [2, 5, 6, 8] in between: XNNPACK has no such op" in str(diagnosis)


def test_an_int8_graph_gets_the_delegates_that_were_foretold(tmp_path):
    graph, ranges, inputs = rounded(Residual())
    diagnosis = diagnose(graph, inputs, ranges)
    program = lower_xnnpack(graph, ranges, inputs, tmp_path / "net.pte")
    assert diagnosis.delegates == program.subgraphs
    assert len(diagnosis.outside) == program.undelegated


def test_a_refusal_of_the_partitioner_is_told_in_its_own_words():
    class Whole(nn.Module):
        def forward(self, x, index):
            return torch.sigmoid(x) * (index + index)

    inputs = {"x": torch.randn(2, 3), "index": torch.ones(2, 3, dtype=torch.int64)}
    diagnosis = diagnose(trace(Whole(), inputs), inputs)
    assert any("dtype" in node.reason for node in diagnosis.outside)


def test_too_many_delegates_are_refused_before_lowering_with_all_that_stays_out(tmp_path):
    graph, inputs = interrupted()
    path = tmp_path / "net.pte"
    with pytest.raises(LoweringError, match=r"2 delegates, at most 1(.|\n)*cumsum.* in between"):
        lower_xnnpack_float(graph, inputs, path, max_delegates=1)
    assert not list(tmp_path.iterdir())
    assert lower_xnnpack_float(graph, inputs, path, max_delegates=2).subgraphs == 2
