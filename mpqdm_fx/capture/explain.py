"""Report what tracing a model yields, or why it is refused, without raising."""

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from mpqdm_fx.capture.diagnose import CaptureError
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.layers import weight_layers

__all__ = ["TraceReport", "count_kinds", "explain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceReport:
    """The outcome of one trace.

    Attributes:
        ok: Whether there is a graph, bit-equal to the model on the example.
        model_class: Class name of the model.
        seconds: Time the trace took, both outcomes.
        nodes: (kind, count), most frequent first: module class names, and ATen operator names.
        weight_layers: Number of distinct convolutions and linears that can be quantized.
        batch_range: (smallest, largest or None) batch size; None if the batch is fixed.
        note: Why the batch is fixed; empty otherwise.
        refusal: Why there is no graph; empty if ``ok``.
        path: Module path where the capture failed; empty if unknown.
        line: ``file.py:123`` of the model's code; empty if unknown.
        code: Source text of that line.
        suggestion: What to change.
    """

    ok: bool
    model_class: str
    seconds: float
    nodes: tuple[tuple[str, int], ...] = ()
    weight_layers: int = 0
    batch_range: tuple[int, int | None] | None = None
    note: str = ""
    refusal: str = ""
    path: str = ""
    line: str = ""
    code: str = ""
    suggestion: str = ""

    @property
    def total_nodes(self) -> int:
        """Number of graph nodes without placeholders and output."""
        return sum(count for _, count in self.nodes)

    def __str__(self) -> str:
        lines = self._found if self.ok else self._refused
        return "\n".join(line for line in lines if line)

    @property
    def _found(self) -> list[str]:
        low, high = self.batch_range or (0, 0)
        rows = f"{low} or more" if high is None else f"{low} to {high}"
        batch = f"any batch of {rows} rows" if self.batch_range else f"a fixed batch: {self.note}"
        kinds = max((len(kind) for kind, _ in self.nodes), default=0)
        return [
            f"{self.model_class} is traced, bit-equal to the model ({self.seconds:.1f} s)",
            f"takes {batch}",
            f"{self.weight_layers} layers can be quantized, of {self.total_nodes} nodes:",
            *(f"  {kind:<{kinds}}  {count}" for kind, count in self.nodes),
        ]

    @property
    def _refused(self) -> list[str]:
        return [
            f"{self.model_class} cannot be traced: {self.refusal}",
            f"  where: {self.path}" if self.path else "",
            f"  line: {self.line}" if self.line else "",
            f"  code: {self.code}" if self.code else "",
            f"  remedy: {self.suggestion}" if self.suggestion else "",
        ]


def explain(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    dynamic_batch: bool = True,
) -> TraceReport:
    """Trace ``model`` as ``trace`` does and report the outcome instead of raising.

    Args:
        model: As for ``trace``.
        example_inputs: As for ``trace``.
        dynamic_batch: As for ``trace``.
    """
    model_class = type(model).__name__
    start = time.perf_counter()
    try:
        graph_module = trace(model, example_inputs, dynamic_batch=dynamic_batch)
    except TraceError as error:
        report = TraceReport(
            ok=False,
            model_class=model_class,
            seconds=time.perf_counter() - start,
            refusal=str(error),
        )
        if not isinstance(error, CaptureError):
            return report
        refusal = error.refusal
        return dataclasses.replace(
            report,
            refusal=refusal.reason,
            path=refusal.path,
            line=refusal.line,
            code=refusal.code,
            suggestion=refusal.suggestion,
        )
    signature = graph_module.meta["signature"]
    return TraceReport(
        ok=True,
        model_class=model_class,
        seconds=time.perf_counter() - start,
        nodes=count_kinds(graph_module),
        weight_layers=len(weight_layers(graph_module)),
        batch_range=signature.batch_range,
        note=signature.note,
    )


def count_kinds(graph_module: fx.GraphModule) -> tuple[tuple[str, int], ...]:
    """Count nodes by module class or operator name, most frequent first, then by name."""
    counts: collections.Counter[str] = collections.Counter()
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            counts[type(graph_module.get_submodule(str(node.target))).__name__] += 1
        elif node.op == "call_function":
            counts[str(getattr(node.target, "__name__", node.target))] += 1
        elif node.op == "get_attr":
            counts["get_attr"] += 1
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
