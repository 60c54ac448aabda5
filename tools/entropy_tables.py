"""Write the tables of the entropy code: rounded Gaussians as whole frequencies.

python tools/entropy_tables.py

The tables are data and not computed where they are used: a library of mathematics that rounds
otherwise would make files unreadable.
"""

import json
import math
from pathlib import Path

from mpqdm_fx.numerics.levels.entropy_code import CLASSES, TOP, TOTAL

TABLES = Path(__file__).parents[1] / "mpqdm_fx" / "numerics" / "levels" / "entropy_tables.json"
FIRST, STEPS = -4.0, 3.0  # binary logarithm of the first deviation, and classes of an octave


def frequencies(place: int) -> list[int]:
    """Frequencies of 0..TOP in one class; those of -TOP..-1 are the same. They sum to TOTAL."""
    deviation = 2 ** (FIRST + place / STEPS)

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / deviation / math.sqrt(2))

    shares = [below(k + 0.5) - below(k - 0.5) for k in range(TOP + 1)]
    whole = shares[0] + 2 * sum(shares[1:])
    free = TOTAL - (2 * TOP + 1)  # every code keeps a frequency of 1
    counts = [1 + int(free * share / whole) for share in shares]
    counts[0] += TOTAL - counts[0] - 2 * sum(counts[1:])
    return counts


def main() -> None:
    """Write the file."""
    rows = ",\n".join(json.dumps(frequencies(place)) for place in range(CLASSES))
    TABLES.write_text(f"[{rows}]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
