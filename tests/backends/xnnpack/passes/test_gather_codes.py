"""Rounded embeddings are stored as their integers, and give the same numbers."""

import pytest
import torch
from torch import nn

from mpqdm_fx import MPQConfig, lower, quantize
from mpqdm_fx.backends.xnnpack.passes.gather_codes import GatherCodes
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner

ROWS, WIDTH, LENGTH = 1200, 64, 7


class Words(nn.Module):
    """Token numbers to a linear layer of their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, input_ids):
        return self.head(self.words(input_ids))


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    calls = [{"input_ids": torch.randint(ROWS, (2, LENGTH))} for _ in range(4)]
    settings = MPQConfig(
        weight_bits=8, activation_mode="dynamic", allocation="uniform", levels="uniform",
        rounding="nearest", refinements=0, propagation=0.0, slowdown=1, judge=False,
    )  # fmt: skip
    return quantize(Words().eval(), settings, calls)


def test_rows_of_codes_times_scales_are_the_rounded_rows_to_the_bit(quantized):
    ids = torch.randint(ROWS, (3, LENGTH))
    result = GatherCodes()(quantized.rounded)
    assert result.modified
    assert torch.equal(result.graph_module(ids), quantized.rounded(ids))
    assert not GatherCodes()(result.graph_module).modified


def test_small_tables_stay_as_they_are(quantized):
    assert not GatherCodes(least=ROWS * WIDTH + 1)(quantized.rounded).modified


@pytest.mark.xnnpack
def test_a_program_holds_a_byte_a_weight_of_the_table(quantized, tmp_path):
    ids = torch.randint(ROWS, (1, LENGTH))
    program = lower(quantized, "xnnpack", output=tmp_path / "words.pte")
    table = ROWS * (WIDTH + 4)  # codes, and a scale in float32
    assert table < program.bytes < table + 16_000
    expected = quantized.rounded(ids)
    (actual,) = XnnpackRunner(tmp_path / "words.pte")(ids)
    # activations of the linear layer are rounded
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)
