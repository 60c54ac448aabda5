"""Lower every small transformer of the tests and print the table of docs/transformers.md.

    python tools/transformer_table.py [NAME ...]

Each is traced, normalized and lowered as a float program, and, with `--quantized`, as one of 4-bit
weights and dynamic 8-bit activations; each program is executed once.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from rounded_nets import round_to_grid
from zoo_more_transformers import MORE_TRANSFORMERS
from zoo_rare_transformers import RARE_TRANSFORMERS
from zoo_transformers import TRANSFORMERS

from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import LoweringError, TraceError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.records.activations import DynamicActivation

CASES = {case.name: case for case in (*TRANSFORMERS, *MORE_TRANSFORMERS, *RARE_TRANSFORMERS)}
HEADER = "| model | delegates | nodes outside | operators outside | dB |\n|---|---|---|---|---|"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one model.

    Attributes:
        name: Class and variant.
        delegates: Subgraphs of its program; None if there is none.
        outside: How many nodes portable kernels run, by operator.
        sqnr_db: Program against its graph.
        error: Why there is no program.
    """

    name: str
    delegates: int | None = None
    outside: dict[str, int]
    sqnr_db: float = 0.0
    error: str = ""

    def __str__(self) -> str:
        if self.delegates is None:
            return f"| {self.name} | - | - | {self.error} | - |"
        operators = ", ".join(f"{n} {short_name(op)}" for op, n in self.outside.items()) or "none"
        total = sum(self.outside.values())
        return f"| {self.name} | {self.delegates} | {total} | {operators} | {self.sqnr_db:.0f} |"


def measure(name: str, *, quantized: bool = False) -> Row:
    """Lower one model at batch 1 and execute its program.

    Args:
        name: A key of `CASES`.
        quantized: Whether to round its weights to 4 bits and its activations, dynamically, to 8.
    """
    case = CASES[name]
    inputs = case.inputs(1, 7)
    try:
        graph = Pipeline(passes=NORMALIZE)(trace(case.model(), inputs)).graph_module
        call = graph.meta["signature"].normalize((), inputs)
        with tempfile.TemporaryDirectory() as folder:
            program = _lower(graph, call, Path(folder) / "model.pte", quantized=quantized)
    except (LoweringError, TraceError) as error:
        return Row(name=name, outside={}, error=str(error).replace("|", "/"))
    return Row(
        name=name,
        delegates=program.subgraphs,
        outside=dict(program.refusals),
        sqnr_db=program.sqnr_db,
    )


def _lower(graph: Any, call: dict[str, Any], path: Path, *, quantized: bool) -> Any:
    if not quantized:
        return lower_xnnpack_float(graph, call, path)
    rounded = round_to_grid(graph, 4)
    activations = dict.fromkeys(weight_layers(rounded), DynamicActivation())
    return lower_xnnpack(rounded, activations, call, path)


def short_name(operator: str) -> str:
    """The operator's name as ATen has it: without prefixes and `_copy`."""
    name = operator.removeprefix("aten_").removeprefix("dim_order_ops__")
    for end in ("_default", "_tensor", "_self", "_scalar", "_int", "_copy"):
        name = name.removesuffix(end)
    return "cast" if name == "to_dim_order" else name


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    parser.add_argument("--quantized", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    lines = [HEADER]
    for name in CASES:
        if not options.names or any(part.lower() in name.lower() for part in options.names):
            lines.append(str(measure(name, quantized=options.quantized)))
            sys.stderr.write(f"{lines[-1]}\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
