"""Tell what XNNPACK will take of a graph, and why the rest stays out, without lowering it.

ExecuTorch's own partitioner is asked, on the very program that it would lower; what takes most of
a lowering's time, compiling each delegate, is left out. Every node that stays out splits the
program: delegates hand their values over in memory, and a portable kernel runs on one thread.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from mpqdm_fx.backends.pt2e import export_graph
from mpqdm_fx.backends.xnnpack.edge import root_logger_kept, to_edge
from mpqdm_fx.backends.xnnpack.four_bit import FourBit
from mpqdm_fx.backends.xnnpack.method import Method
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.errors import LoweringError
from mpqdm_fx.io.progress import stage
from mpqdm_fx.records.activations import Activation

__all__ = ["Diagnosis", "OutsideNode", "diagnose", "diagnose_method", "refuse_fragments"]

_Method = TypeVar("_Method", bound=Method)

_PARTITION_LOGGER = "executorch.backends.xnnpack.partition"

#: What to do about an operator, where something is known.
_ADVICE: Mapping[str, str] = {
    "aten.embedding.default": "it runs once a step, for one row",
}


@dataclass(frozen=True, kw_only=True)
class OutsideNode:
    """A node that portable kernels would run.

    Attributes:
        name: Its name in the program.
        op: Its operator, for example `aten.cat.default`.
        module: Module of the model that it comes from; "" for the model itself.
        shape: Shape of what it computes.
        reason: Why XNNPACK does not take it.
        advice: What to do about it; "" if nothing is known.
    """

    name: str
    op: str
    module: str
    shape: tuple[int, ...]
    reason: str
    advice: str

    def __str__(self) -> str:
        where = self.module or "the model"
        return f"{self.op} {list(self.shape)} in {where}: {self.reason}" + (
            f" ({self.advice})" if self.advice else ""
        )


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What XNNPACK would take of a program.

    Attributes:
        delegates: Number of subgraphs.
        delegated: Nodes in them.
        outside: Nodes that stay out, in running order.
    """

    delegates: int
    delegated: int
    outside: tuple[OutsideNode, ...]

    @property
    def operators(self) -> Mapping[str, int]:
        """How often each operator stays out."""
        return Counter(node.op for node in self.outside)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        delegates = "1 delegate" if self.delegates == 1 else f"{self.delegates} delegates"
        lines = [f"{delegates} of {self.delegated} nodes; {len(self.outside)} out"]
        return "\n".join([*lines, *(f"  {node}" for node in self.outside)])


def diagnose(
    graph_module: fx.GraphModule,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    ranges: Mapping[str, Activation] | None = None,
    *,
    four_bit: FourBit = "whole",
) -> Diagnosis:
    """Predict the delegates of a graph.

    Args:
        graph_module: Module-level graph; it is not changed.
        example_inputs: Its inputs, by name or in order: the shapes of the program.
        ranges: Activation ranges by layer of a rounded graph, for the int8 program; None for the
            float one.
        four_bit: Which weights are stored at four bits, as of `lower_xnnpack`.

    Raises:
        LoweringError: ExecuTorch is missing or fails on the graph.
    """
    require_executorch()
    return diagnose_method(lambda: Method(graph_module, example_inputs, ranges, four_bit=four_bit))[
        1
    ]


def diagnose_method(
    make: Callable[[], _Method],
    watch: Callable[[fx.GraphModule, Collection[fx.Node]], None] | None = None,
) -> tuple[_Method, Diagnosis]:
    """Predict the delegates of what is made ready for lowering.

    Args:
        make: Makes it ready.
        watch: Called with the graph that the partitioner is given, and the nodes that it takes.

    Returns:
        What was made ready, and its diagnosis.

    Raises:
        LoweringError: ExecuTorch fails on the graph.
    """
    with torch.no_grad():
        with stage("exporting"):
            method = make()
            exported = export_graph(method.lowered, method.inputs)
        with stage("asking XNNPACK"):
            return method, _diagnosis(exported, watch)


def refuse_fragments(name: str, exported: torch.export.ExportedProgram, max_delegates: int) -> None:
    """Refuse a program that XNNPACK would take in too many pieces.

    Args:
        name: Method's name.
        exported: The program, before lowering.
        max_delegates: The most subgraphs that are wanted.

    Raises:
        LoweringError: There would be more; names every node that stays out.
    """
    diagnosis = _diagnosis(exported)
    if diagnosis.delegates > max_delegates:
        listed = "\n".join(f"  {node}" for node in diagnosis.outside)
        raise LoweringError(
            f"method {name!r} would have {diagnosis.delegates} delegates, at most {max_delegates} "
            f"are wanted; {len(diagnosis.outside)} nodes stay out:\n{listed}"
        )


def _diagnosis(
    exported: torch.export.ExportedProgram,
    watch: Callable[[fx.GraphModule, Collection[fx.Node]], None] | None = None,
) -> Diagnosis:
    partitioner = _watching_partitioner(watch)
    with _reasons() as reasons:
        try:
            to_edge(exported, partitioner)
        except LoweringError:
            # What it was to delegate was kept from being decomposed, and now nobody takes it.
            if partitioner.delegates is None:
                raise
    outside = tuple(
        _outside(node, reasons.get(node.name), partitioner.supported)
        for node in partitioner.outside
    )
    return Diagnosis(
        delegates=partitioner.delegates, delegated=partitioner.delegated, outside=outside
    )


def _watching_partitioner(
    watch: Callable[[fx.GraphModule, Collection[fx.Node]], None] | None,
) -> Any:
    """ExecuTorch's partitioner, which tells what it would delegate and delegates nothing."""
    with root_logger_kept():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class Watching(XnnpackPartitioner):  # type: ignore[misc]  # executorch is untyped
        delegates: int | None = None

        def generate_partitions(self, ep: Any) -> list[Any]:
            partitions = super().generate_partitions(ep)
            inside = {node for partition in partitions for node in partition.nodes}
            calls = [node for node in ep.graph_module.graph.nodes if node.op == "call_function"]
            self.delegates = len(partitions)
            self.delegated = sum(node in inside for node in calls)
            self.outside = [n for n in calls if n not in inside and "getitem" not in n.name]
            self.supported = frozenset(self.target_partitioner_configs)
            if watch is not None:
                watch(ep.graph_module, inside)
            return []

    return Watching()


@contextlib.contextmanager
def _reasons() -> Iterator[dict[str, str]]:
    """Reasons for refusals by node name, as the partitioner's configurations log them."""
    reasons: dict[str, str] = {}

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            node, reason = getattr(record.msg, "node", None), getattr(record.msg, "reason", None)
            if node is not None and reason:
                reasons.setdefault(node.name, str(reason))

    logger, handler = logging.getLogger(_PARTITION_LOGGER), Collect()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield reasons
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _outside(node: fx.Node, reason: str | None, supported: frozenset[str]) -> OutsideNode:
    op = _operator(node)
    if reason is None:
        short = op.removeprefix("aten.").removeprefix("quantized_decomposed.")
        reason = (
            "it depends on nodes that stay out" if short in supported else "XNNPACK has no such op"
        )
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) and value else value
    shape = tuple(map(int, value.shape)) if isinstance(value, torch.Tensor) else ()
    stack = node.meta.get("nn_module_stack") or {}
    module = next((str(entry[0]) for entry in reversed(stack.values())), "")
    return OutsideNode(
        name=node.name,
        op=op,
        module=module,
        shape=shape,
        reason=reason,
        advice=_ADVICE.get(op, ""),
    )


def _operator(node: fx.Node) -> str:
    """Operator in ATen's names: edge operators wrap ATen's."""
    return str(getattr(node.target, "_op", node.target))
