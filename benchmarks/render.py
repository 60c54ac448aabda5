"""Write the tables of the documentation from the measured rows.

    python benchmarks/render.py

A page marks where a table goes: `<!-- rows: quality.json -->` in front of it, `<!-- end -->` behind
it. Rows lie in `benchmarks/results/`.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import captions
import distill
import input_costs
import quality
import stranger
import tiny_sd
from quality import read

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = (
    ROOT / "docs" / "benchmarks.md",
    ROOT / "docs" / "training.md",
    ROOT / "docs" / "decisions" / "45-few-bit-inputs.md",
)
SEEDS = [0, 1, 2]

#: By file of rows, what makes the table of them.
TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "quality.json": lambda rows: quality.table(rows, SEEDS),
    "digits_dit.json": lambda rows: quality.table(rows, SEEDS),
    "distill.json": lambda rows: distill.table(rows, SEEDS),
    "few_bits.json": lambda rows: distill.table(rows, SEEDS),
    "captions.json": lambda rows: captions.table(rows, SEEDS),
    "captions_inputs.json": lambda rows: captions.table(rows, SEEDS, ("W2A4",)),
    "captions_defaults.json": lambda rows: captions.table(
        rows, SEEDS, captions.DEFAULTS, ("default",)
    ),
    "captions_weights.json": lambda rows: captions.table(
        rows, SEEDS, captions.WEIGHTS, captions.STORAGES
    ),
    "input_costs.json": input_costs.table,
    "stranger.json": stranger.table,
    "tiny_sd.json": tiny_sd.table,
}

_MARKED = re.compile(r"(<!-- rows: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """A page with its tables made anew."""

    def block(match: re.Match[str]) -> str:
        rows = read(RESULTS / match[2])
        lines = [line for line in TABLES[match[2]](rows).splitlines() if line.startswith("|")]
        return f"{match[1]}\n" + "\n".join(lines) + f"\n\n{match[4]}"

    return _MARKED.sub(block, text)


def main() -> None:
    """Write the pages whose tables are of other rows."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := rendered(text)) != text:
            page.write_text(new, encoding="utf-8")
            sys.stderr.write(f"{page.relative_to(ROOT)} is written\n")


if __name__ == "__main__":
    main()
