"""Write the tables of the entropy code: rounded Gaussians as whole frequencies.

python tools/entropy_tables.py

The tables are data and not computed where they are used: a library of mathematics that rounds
otherwise would make files unreadable. Python reads them as JSON, the C++ decoder as a header.
"""

import json
import math
import textwrap
from pathlib import Path

from mpqdm_fx.numerics.levels.rans import CLASSES, ESCAPED_BITS, TOP, TOTAL

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "mpqdm_fx" / "numerics" / "levels" / "entropy_tables.json"
HEADER = ROOT / "native" / "src" / "code_tables.h"
FIRST, STEPS = -4.0, 3.0  # binary logarithm of the first deviation, and classes of an octave


def frequencies(place: int) -> list[int]:
    """Frequencies of 0..K in one class; those of -K..-1 are the same.

    What they lack of TOTAL is the escape's, before all larger codes. K is where the class costs
    least.
    """
    deviation = 2 ** (FIRST + place / STEPS)

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / deviation / math.sqrt(2))

    shares = [below(k + 0.5) - below(k - 0.5) for k in range(TOP + 1)]
    whole = shares[0] + 2 * sum(shares[1:])
    shares = [share / whole for share in shares]
    tables = (_kept(shares, largest) for largest in range(TOP + 1))
    return min((table for table in tables if table), key=lambda table: _cost(shares, table))


def _kept(shares: list[float], largest: int) -> list[int]:
    """Frequencies if larger codes are escaped; none if they do not fit TOTAL."""
    kept = shares[: largest + 1]
    mass = kept[0] + 2 * sum(kept[1:])
    escape = max(1, round(TOTAL * (1 - mass)))
    counts = [max(1, round((TOTAL - escape) * share / mass)) for share in kept]
    counts[0] = TOTAL - escape - 2 * sum(counts[1:])
    return counts if counts[0] > 0 else []


def _cost(shares: list[float], table: list[int]) -> float:
    """Mean bits of a code."""
    escape = TOTAL - table[0] - 2 * sum(table[1:])
    bits = [-math.log2(count / TOTAL) for count in table]
    bits += [ESCAPED_BITS - math.log2(escape / TOTAL)] * (len(shares) - len(table))
    return shares[0] * bits[0] + 2 * math.fsum(
        s * b for s, b in zip(shares[1:], bits[1:], strict=True)
    )


def header(tables: list[list[int]]) -> str:
    """The same for C++."""
    largest = ", ".join(str(len(table) - 1) for table in tables)
    flat = ", ".join(str(count) for table in tables for count in table)
    lines = [
        "// Written by tools/entropy_tables.py: frequencies of the classes of FORMAT.md, 'Codes'.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace mpqdm {",
        "",
        "// Largest code of each class that is not escaped.",
        f"constexpr uint8_t kLargestKept[{len(tables)}] = {{",
        *_wrapped(largest),
        "};",
        "",
        "// Frequencies of 0 .. kLargestKept of one class after the other.",
        f"constexpr uint16_t kKeptFrequencies[{sum(map(len, tables))}] = {{",
        *_wrapped(flat),
        "};",
        "",
        "}  // namespace mpqdm",
        "",
    ]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=98, initial_indent="    ", subsequent_indent="    ")


def main() -> None:
    """Write both files."""
    tables = [frequencies(place) for place in range(CLASSES)]
    rows = ",\n".join(json.dumps(table) for table in tables)
    TABLES.write_text(f"[{rows}]\n", encoding="utf-8")
    HEADER.write_text(header(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
