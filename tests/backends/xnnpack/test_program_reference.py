"""How near a program has to be to its graph, and which runs of the graph that takes."""

import math
from pathlib import Path

import pytest
import torch
from torch import fx
from torch.nn import functional

from mpqdm_fx.backends.xnnpack.reference import Reference
from mpqdm_fx.errors import LoweringError

PROGRAM = Path("net.pte")
OUTPUT = torch.linspace(-1, 1, 100)
APART = OUTPUT.flip(0)  # as far from it as can be


def reference(*draws):
    """A reference of 30 dB whose nudged runs give `draws`; and the seeds that were run."""
    run = []

    def nudged(seed):
        run.append(seed)
        return (draws[seed],)

    return Reference(outputs=(OUTPUT,), bound_db=30.0, quality_db=30.0, nudged=nudged), run


def test_a_program_that_is_near_the_graph_needs_no_nudged_run():
    expected, run = reference()
    assert expected.check(PROGRAM, [OUTPUT + 1e-4], None)[0] > 60
    assert run == []


def test_a_program_may_be_near_one_nudged_run_alone():
    expected, run = reference(OUTPUT, OUTPUT, APART)
    assert expected.check(PROGRAM, [APART], None)[0] < 0
    assert run == [0, 1, 2]


def test_a_program_near_none_of_them_is_refused():
    expected, run = reference(*[OUTPUT] * 4)
    with pytest.raises(LoweringError, match=r"expected at least 30\.0 dB; nothing was written"):
        expected.check(PROGRAM, [APART], None)
    assert run == [0, 1, 2, 3]


def test_a_float_program_has_no_other_runs():
    expected = Reference(outputs=(OUTPUT,), bound_db=60.0, quality_db=None)
    with pytest.raises(LoweringError, match=r"expected at least 60\.0 dB"):
        expected.check(PROGRAM, [APART], None)


@pytest.mark.parametrize("large", [1.0, 1e6])
def test_a_large_output_hides_nothing_in_a_small_one(large):
    outputs = (OUTPUT * large, OUTPUT)
    expected = Reference(outputs=outputs, bound_db=30.0, quality_db=None)
    near = expected.check(PROGRAM, [outputs[0], OUTPUT + 1e-4], None)[0]
    assert near == pytest.approx(expected.check(PROGRAM, [OUTPUT * large, OUTPUT + 1e-4], None)[0])
    with pytest.raises(LoweringError, match=r"3\.0 dB"):
        expected.check(PROGRAM, [outputs[0], torch.zeros(100)], None)


def test_outputs_of_zeros_have_no_size():
    zeros = torch.zeros(100)
    expected = Reference(outputs=(zeros, OUTPUT), bound_db=30.0, quality_db=None)
    assert expected.check(PROGRAM, [zeros, OUTPUT], None)[0] == math.inf


class Gelu(torch.nn.Module):
    def forward(self, x):
        return functional.gelu(x, approximate="tanh")


def test_a_float_program_of_another_operator_is_refused():
    """ExecuTorch lowers the tanh form of GELU as the exact one, 4.7e-4 off at most."""
    inputs = [torch.randn(4, 64, generator=torch.Generator().manual_seed(0))]
    graph = fx.symbolic_trace(Gelu())
    expected = Reference.of_float(graph, graph, inputs)
    double = functional.gelu(inputs[0].double(), approximate="tanh").float()
    assert expected.check(PROGRAM, [double], None)[0] > 120
    with pytest.raises(LoweringError, match=r"expected at least 110\.0 dB; nothing was written"):
        expected.check(PROGRAM, [functional.gelu(inputs[0])], None)


class Phase(torch.nn.Module):
    def forward(self, x):
        return torch.sin(x * 1e3)


def test_a_float_program_may_be_as_far_as_its_graph_spreads_nudges():
    inputs = [torch.linspace(-1, 1, 100)]
    graph = fx.symbolic_trace(Phase())
    expected = Reference.of_float(graph, graph, inputs)
    assert 60 < expected.bound_db < 90
    expected.check(PROGRAM, [torch.sin(inputs[0] * (1 + 1e-7) * 1e3)], None)
    with pytest.raises(LoweringError):
        expected.check(PROGRAM, [torch.sin(inputs[0] * (1 + 1e-5) * 1e3)], None)
