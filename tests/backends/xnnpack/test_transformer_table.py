"""Every transformer of the zoo has the delegates and the dB that docs/transformers.md says."""

from pathlib import Path

import pytest
from transformer_table import CASES, measure

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
#: Programs of more than two delegates, with what ExecuTorch leaves out in the middle.
MORE_THAN_TWO = {
    "VQModel": "argmin over the codebook, and a mean over everything",
    "HiDreamImageTransformer2DModel": "topk of the router in each of its two blocks of experts",
}


def rows(heading):
    """Name to delegates (None where there is no program) and dB of a table of the page."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    return {
        name: (None if delegates == "-" else int(delegates), 0.0 if db == "-" else float(db))
        for name, delegates, _, _, db in cells[1:]
    }


FLOAT, QUANTIZED = rows("Float programs"), rows("Programs of 4-bit weights")


def test_the_page_has_every_model():
    assert FLOAT.keys() == CASES.keys()
    assert QUANTIZED


def test_programs_have_two_delegates_or_a_reason():
    table = {**FLOAT, **{f"{name} (quantized)": row for name, row in QUANTIZED.items()}}
    many = {
        name.removesuffix(" (quantized)")
        for name, (delegates, _) in table.items()
        if delegates and delegates > 2
    }
    assert many == set(MORE_THAN_TWO)


@pytest.mark.matrix
@pytest.mark.xnnpack
@pytest.mark.parametrize("name", CASES)
def test_float_program(name):
    check(measure(name), *FLOAT[name])


@pytest.mark.matrix
@pytest.mark.xnnpack
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_program(name):
    check(measure(name, quantized=True), *QUANTIZED[name])


def check(row, delegates, sqnr_db):
    assert row.delegates == delegates, row
    assert row.sqnr_db > sqnr_db - 6  # another CPU sums in another order
