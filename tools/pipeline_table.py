"""Export a tiny pipeline of every class and print the table of docs/pipelines.md.

    python tools/pipeline_table.py [KIND ...]

Each is a folder of random weights, quantized to W8A8 (dynamic), lowered, and drawn with; its
picture is compared with the one that diffusers draws from the float folder.
"""

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "pipelines"))

from pipeline_kinds import KINDS, drawn_twice, options_of, pipeline_of
from tiny_pipelines import cheap_settings
from transformer_table import short_name

from mpqdm_fx import export_pipeline
from mpqdm_fx.errors import MPQError
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.pipelines.runner import PipelineRunner

HEADER = (
    "| pipeline | part | method | delegates | nodes outside | operators outside | program dB | "
    "picture dB |\n|---|---|---|---|---|---|---|---|"
)


def rows(kind: str, folder: Path) -> Iterator[str]:
    """Rows of one kind: a line for each method of each part.

    Args:
        kind: One of `KINDS`.
        folder: An empty folder to work in.
    """
    pipeline = pipeline_of(kind, folder)
    name = type(pipeline).__name__
    try:
        export_pipeline(
            pipeline, cheap_settings(activation_mode="dynamic"), folder / "out", samples=0,
            measure=False, steps=3, guidance=3.0, trajectories=4, **options_of(kind),
        )  # fmt: skip
    except MPQError as error:
        yield f"| {name} | | | | | {str(error).replace('|', '/')} | | |"
        return
    expected, actual = drawn_twice(kind, pipeline, PipelineRunner(folder / "out"))
    picture = f"{sqnr_db(expected, actual):.0f}"
    record = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    for part in record["parts"]:
        for program in (part["program"], *part.get("methods", ())):
            yield _row(name, part["name"], program, picture)
            name = picture = ""


def _row(pipeline: str, part: str, program: dict[str, Any], picture: str) -> str:
    outside = ", ".join(f"{count} {short_name(op)}" for op, count in program["outside"].items())
    cells = (
        pipeline, part, program["method"], program["subgraphs"], program["undelegated"],
        outside or "none", f"{program['sqnr_db']:.0f}", picture,
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.stdout.write(f"{HEADER}\n")
    for kind in arguments.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(kind, Path(folder)):
                sys.stdout.write(f"{row}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
