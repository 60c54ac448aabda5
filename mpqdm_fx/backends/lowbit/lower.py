"""ExecuTorch with own kernels beside XNNPACK: rounded graphs become a `.pte`.

The road is that of `backends.xnnpack.lower`, with one step in front: layers that own kernels run
become own operators on values that lie channels last. What is left goes to XNNPACK as it always
does. The graph with own operators is run in Python, by their references, and compared with the
fake-quantized graph; the written file is run too, where the native library is installed.

Own kernels add biases in float. So biases and scales of static own layers stay as they are, in the
fake-quantized graph too, where those of XNNPACK's static layers are fitted to integers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.backends.kernel_library import has_kernels
from mpqdm_fx.backends.lowbit.costs import Cpu, check_cpu
from mpqdm_fx.backends.lowbit.counting import Borders, count_borders
from mpqdm_fx.backends.lowbit.layers import Kernels, check_kernels
from mpqdm_fx.backends.lowbit.method import LowbitMethod
from mpqdm_fx.backends.lowbit.program import LowbitProgram
from mpqdm_fx.backends.lowbit.road import LowbitGraphs
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, check_four_bit
from mpqdm_fx.backends.xnnpack.lowering_stages import Stages
from mpqdm_fx.backends.xnnpack.method import make_methods
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.backends.xnnpack.write_program import FORWARD, execute_method, write_program
from mpqdm_fx.graph.nested import tensors_of
from mpqdm_fx.records.activations import Activation

__all__ = ["lower_lowbit", "lower_lowbit_methods"]

logger = logging.getLogger(__name__)


def lower_lowbit(
    rounded: fx.GraphModule,
    ranges: Mapping[str, Activation],
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | Path,
    *,
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
    max_delegates: int | None = None,
    keep_graphs: bool = False,
    external_weights: bool = False,
    four_bit: FourBit = "whole",
) -> LowbitProgram:
    """Lower a rounded graph to a `.pte` with own kernels beside XNNPACK's, write it and run it.

    Args:
        rounded: Module-level graph after `RoundWeights`; it is not changed.
        ranges: Activation by layer name, static or dynamic, of 8 bits, as in `lower_xnnpack`.
        example_inputs: Inputs of `rounded`, by name or in order; also what the program is tried on.
        path: File to write. It appears only if the program computes the right numbers.
        kernels: `"auto"`: own kernels run the layers for which the cost table says that they are
            faster; `"memory"`: all layers that they can run, for least memory; `"xnnpack"`: none.
        cpu: Class of CPUs that the cost table is asked about.
        max_delegates: Refuse a program of more XNNPACK subgraphs; None takes any number. Own
            operators part the program: there are about as many subgraphs as own layers.
        keep_graphs: Return the graphs that the program was made of, too: several times the model.
        external_weights: Write the weights to a file of their own beside `path`, `<stem>.ptd`.
        four_bit: Which of XNNPACK's weights are stored at four bits, as of `lower_xnnpack`.

    Returns:
        What was written and measured.

    Raises:
        ConfigError: No layer is rounded, `ranges` names a layer that is not, or a setting is
            unknown.
        LoweringError: As of `lower_xnnpack`; or the graph with own operators computes other
            numbers than the fake-quantized graph.
    """
    _check(kernels, cpu, four_bit)
    with Stages() as stage, torch.no_grad():
        stage("decompose")
        method = LowbitMethod(
            rounded, example_inputs, ranges, kernels=kernels, cpu=cpu, four_bit=four_bit
        )
        methods = {FORWARD: method}
        edges: list[fx.GraphModule] | None = [] if keep_graphs else None
        result = _write(methods, Path(path), stage, max_delegates, external_weights, edges=edges)[
            FORWARD
        ]
    return replace(result, graphs=LowbitGraphs.of_method(method, edges[0])) if edges else result


def lower_lowbit_methods(
    graphs: Mapping[str, fx.GraphModule],
    example_inputs: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    ranges: Mapping[str, Activation] | None = None,
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
    max_delegates: int | None = None,
    external_weights: bool = False,
    four_bit: FourBit = "whole",
) -> dict[str, LowbitProgram]:
    """Lower several graphs to one `.pte` with own kernels beside XNNPACK's.

    Args:
        graphs: As of `backends.xnnpack.lower.lower_methods`; so are `example_inputs`, `path` and
            `ranges`.
        example_inputs: Inputs of each method by its name.
        path: File to write.
        ranges: Activation by layer name; None for a float program.
        kernels: As of `lower_lowbit`, like all that follow.
        cpu: Class of CPUs.
        max_delegates: Refuse a method of more subgraphs.
        external_weights: Write the weights to a file of their own.
        four_bit: Which of XNNPACK's weights are stored at four bits.

    Returns:
        What was written and measured, by method.

    Raises:
        ConfigError, LoweringError: As of `lower_methods` and `lower_lowbit`.
    """
    _check(kernels, cpu, four_bit)
    make = partial(LowbitMethod, kernels=kernels, cpu=cpu, four_bit=four_bit)
    with Stages() as stage, torch.no_grad():
        stage("decompose")
        methods = make_methods(graphs, example_inputs, ranges or {}, make)
        return _write(methods, Path(path), stage, max_delegates, external_weights)


def _check(kernels: Kernels, cpu: Cpu, four_bit: FourBit) -> None:
    check_kernels(kernels)
    check_cpu(cpu)
    check_four_bit(four_bit)
    require_executorch()


def _write(
    methods: Mapping[str, LowbitMethod],
    path: Path,
    stage: Stages,
    max_delegates: int | None,
    external_weights: bool,
    *,
    edges: list[fx.GraphModule] | None = None,
) -> dict[str, LowbitProgram]:
    for method in methods.values():
        method.expected.check(path, _by_references(method), method.output_scale)
    runs = not any(method.choice.own for method in methods.values()) or has_kernels()
    if not runs:
        logger.warning(
            "%s: the native library is not installed, so the program was not run; its graph was, "
            "with the operators' references in Python", path,
        )  # fmt: skip
    borders: dict[str, Borders] = {}

    def count(edge: Any) -> None:
        for name in methods:
            borders[name] = count_borders(edge.exported_program(name).graph_module)

    programs = write_program(
        methods,
        path,
        stage,
        max_delegates=max_delegates,
        external_weights=external_weights,
        execute=execute_method if runs else _in_python,
        inspect=count,
        edges=edges,
    )
    return {
        name: LowbitProgram.of(program, methods[name], borders[name], executed=runs)
        for name, program in programs.items()
    }


def _in_python(_: Sequence[Path], __: str, ___: str, method: LowbitMethod) -> list[Tensor]:
    return _by_references(method)


def _by_references(method: LowbitMethod) -> list[Tensor]:
    """What a program is to compute, by the references of own operators."""
    graph = method.lowered if method.prepared is None else method.prepared
    return list(tensors_of(graph(*method.inputs)))
