"""Print which models of diffusers trace bit-equal to eager execution, and which do not and why.

    python benchmarks/trace_table.py [PATTERN]

Each row: tiny random instance of one class, compared at several timesteps and two batch sizes with
one torch thread; seconds are processor time of the trace, verification included. PATTERN is a
regular expression on the row's name.
"""

import re
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import fx, nn
from tqdm import tqdm

from mpqdm_fx.capture.explain import count_kinds
from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.layers import weight_layers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from model_zoo import ALL
from zoo_base import Case

TIMESTEPS = (1, 10, 250, 999)


def compare(model: nn.Module, graph_module: fx.GraphModule, case: Case) -> tuple[int, int, int]:
    """Return the two batch sizes and the number of unequal (batch, timestep) runs."""
    signature = graph_module.meta["signature"]
    options = {"return_dict": False} if "return_dict" in signature.parameters else {}
    batches = (1, 3) if signature.dynamic_batch else (2, 2)
    unequal = 0
    for batch in sorted(set(batches)):
        for timestep in TIMESTEPS:
            inputs = case.inputs(batch, timestep)
            with torch.no_grad():
                expected = model(**inputs, **options)
                result = graph_module(**signature.normalize((), inputs))
            unequal += not same_bits(result, expected)
    return *batches, unequal


def row(case: Case) -> tuple[str, str]:
    """Trace one model; return its row of the table and its remark (empty if there is none)."""
    model = case.model()
    start = time.process_time()
    try:
        graph_module = trace(model, case.inputs(2, 7))
    except TraceError as error:
        return f"| {case.name} | refused | | | | | |", str(error)
    seconds = time.process_time() - start
    signature = graph_module.meta["signature"]
    first, second, unequal = compare(model, graph_module, case)
    batches = f"{first}, {second}" if signature.dynamic_batch else f"{first}"
    low, high = signature.batch_range or (signature.batch, signature.batch)
    span = str(low) if low == high else f"{low}..{high or ''}"
    verdict = "yes" if not unequal else f"NO ({unequal} runs)"
    nodes = sum(count for _, count in count_kinds(graph_module))
    layers = len(weight_layers(graph_module))
    line = f"| {case.name} | {verdict} | {batches} | {span} | {layers} | {nodes} | {seconds:.1f} |"
    return line, signature.note


def main() -> None:
    """Print the table and the remarks."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    cases = [case for case in ALL if re.search(pattern, case.name)]
    lines, remarks = [], []
    for case in tqdm(cases, unit="model", disable=None):
        line, remark = row(case)
        lines.append(line)
        if remark:
            remarks.append(f"- {case.name}: {remark}")
    print(f"Timesteps {', '.join(map(str, TIMESTEPS))}; one thread; torch {torch.__version__}.\n")
    print("| model | bit-equal | batches run | batch range | weight layers | nodes | CPU s |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    if remarks:
        print("\n" + "\n".join(remarks))


if __name__ == "__main__":
    main()
