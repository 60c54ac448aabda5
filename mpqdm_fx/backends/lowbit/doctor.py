"""Tell what own kernels and XNNPACK would take of a graph, without lowering it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import fx

from mpqdm_fx.backends.lowbit.costs import Cpu, check_cpu
from mpqdm_fx.backends.lowbit.counting import Borders, OwnWork, count_borders, own_work
from mpqdm_fx.backends.lowbit.layers import Kernels, check_kernels
from mpqdm_fx.backends.lowbit.method import LowbitMethod
from mpqdm_fx.backends.lowbit.ops import NAMESPACE
from mpqdm_fx.backends.xnnpack.doctor import Diagnosis, diagnose_method
from mpqdm_fx.backends.xnnpack.four_bit import FourBit
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.records.activations import Activation

__all__ = ["LowbitDiagnosis", "diagnose_lowbit"]


@dataclass(frozen=True, kw_only=True)
class LowbitDiagnosis(OwnWork, Diagnosis):
    """What own kernels would take of a program, and XNNPACK of the rest.

    `outside` are nodes of portable kernels: own operators are not among them.
    """

    def __str__(self) -> str:
        own, left = len(self.own_layers), len(self.left_layers)
        reasons = [f"  {name}: {reason}" for name, reason in self.left_layers.items()]
        borders = f"{self.crossings} crossings between own kernels and delegates"
        copies = f"{self.layout_copies} layout copies of {self.layout_copy_bytes:,} bytes"
        lines = [f"{own} layers in own kernels, {left} left to XNNPACK", *reasons]
        return "\n".join([super().__str__(), *lines, f"{borders}, {copies}"])


def diagnose_lowbit(
    graph_module: fx.GraphModule,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    ranges: Mapping[str, Activation],
    *,
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
    four_bit: FourBit = "whole",
) -> LowbitDiagnosis:
    """Predict own layers, delegates and the borders between them.

    Args:
        graph_module: Rounded module-level graph; it is not changed.
        example_inputs: Its inputs, by name or in order: the shapes of the program.
        ranges: Activation by layer name.
        kernels: Which layers own kernels run, as of `lower_lowbit`.
        cpu: Class of CPUs that they are chosen for.
        four_bit: Which of XNNPACK's weights are stored at four bits.

    Raises:
        ConfigError: A setting is unknown.
        LoweringError: ExecuTorch is missing or fails on the graph.
    """
    check_kernels(kernels)
    check_cpu(cpu)
    require_executorch()
    counted: list[Borders] = []

    def watch(graph: fx.GraphModule, delegated: Collection[fx.Node]) -> None:
        counted.append(count_borders(graph, delegated))

    method, diagnosis = diagnose_method(
        lambda: LowbitMethod(
            graph_module, example_inputs, ranges, kernels=kernels, cpu=cpu, four_bit=four_bit
        ),
        watch,
    )
    known = {field.name: getattr(diagnosis, field.name) for field in fields(Diagnosis)}
    own = f"{NAMESPACE}."
    known["outside"] = tuple(n for n in diagnosis.outside if not n.op.startswith(own))
    work = own_work(method.choice, counted[-1], method.prepared)
    return LowbitDiagnosis(**known, **work)
