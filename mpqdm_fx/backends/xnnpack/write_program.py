"""Lower what was made ready, write it, execute it once, compare, and only then let it appear."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, fx

from mpqdm_fx.backends.pt2e import export_graph
from mpqdm_fx.backends.xnnpack.doctor import refuse_fragments
from mpqdm_fx.backends.xnnpack.edge import (
    delegation,
    move_weights_out,
    runnable,
    to_edge,
    to_program,
)
from mpqdm_fx.backends.xnnpack.lowering_stages import Stages
from mpqdm_fx.backends.xnnpack.method import Method
from mpqdm_fx.backends.xnnpack.output_files import written
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.backends.xnnpack.runner import TensorSpec, XnnpackRunner, weights_path
from mpqdm_fx.errors import ArtifactError, LoweringError

__all__ = ["FORWARD", "execute_method", "write_program"]

logger = logging.getLogger(__name__)

FORWARD = "forward"
"""Name of the only method of a program that has one."""

_Method = TypeVar("_Method", bound=Method)


def write_program(
    methods: Mapping[str, _Method],
    path: Path,
    stage: Stages,
    *,
    max_delegates: int | None = None,
    external_weights: bool = False,
    edges: list[fx.GraphModule] | None = None,
    execute: Callable[[Sequence[Path], str, str, _Method], list[Tensor]] | None = None,
    inspect: Callable[[Any], None] | None = None,
) -> dict[str, XnnpackProgram]:
    """Lower, write beside `path`, execute, compare, and only then rename.

    Args:
        methods: What is lowered, by name.
        path: File to write.
        stage: Told of every stage.
        max_delegates: The most subgraphs of a method; None takes any number.
        external_weights: Whether the weights go into a file of their own.
        edges: Receives the edge graph of each method.
        execute: Gives what a method of the written files computes on its example inputs: files,
            name of the program, name of the method, method. Default: `execute_method`.
        inspect: Called with ExecuTorch's partitioned program.

    Returns:
        What was written and measured, by method.

    Raises:
        LoweringError: As of `lower_xnnpack`.
    """
    stage("export")
    exported = {name: export_graph(m.lowered, m.inputs) for name, m in methods.items()}
    if max_delegates is not None:
        for name, program in exported.items():
            refuse_fragments(name, program, max_delegates)
    weights = weights_path(path) if external_weights else None
    if weights is not None:
        for program in exported.values():
            move_weights_out(program)
    stage("lower")
    watch = None if edges is None else lambda program: edges.append(runnable(program))
    edge = to_edge(exported, watch=watch)
    if inspect is not None:
        inspect(edge)
    stage("serialise")
    measured = {}
    program = to_program(edge, external_weights=external_weights)
    delegated = {name: delegation(edge, name) for name in methods}
    # Executing takes memory of its own; what is in the file need not be here as well.
    writing = written(program, path, weights)
    del program, edge, exported
    with writing as parts:
        stage("execute")
        for name, method in methods.items():
            outputs = (execute or execute_method)(parts, path.name, name, method)
            measured[name] = method.expected.check(path, outputs, method.output_scale)
        sizes = [part.stat().st_size for part in parts]
    result = {}
    for name, method in methods.items():
        sqnr, steps = measured[name]
        result[name] = XnnpackProgram(
            path=path,
            bytes=sizes[0],
            weights_path=weights,
            weights_bytes=sum(sizes[1:]),
            inputs=tuple(_spec(*entry) for entry in method.named_inputs),
            outputs=tuple(_spec(*entry) for entry in method.named_outputs.items()),
            output_scale=method.output_scale,
            sqnr_db=sqnr,
            max_lsb=steps,
            reference_sqnr_db=method.expected.quality_db,
            float_layers=method.floats,
            seconds=stage.seconds,
            four_bit_layers=method.four_bit,
            eight_bit_layers=method.eight_bit,
            **delegated[name],
        )
        logger.info(
            "%s, method %s: %d bytes, %d delegates, %d nodes delegated and %d not, %.1f dB against "
            "the graph", path, name, sum(sizes), result[name].subgraphs, result[name].delegated,
            result[name].undelegated, sqnr,
        )  # fmt: skip
    return result


def execute_method(parts: Sequence[Path], file: str, name: str, method: Method) -> list[Tensor]:
    """Run one method of a written program on its example inputs.

    Args:
        parts: The program, and its weights if they are apart.
        file: What messages call the program.
        name: The method.
        method: What it was made of.

    Raises:
        LoweringError: The runtime refuses the program.
    """
    try:
        weights = parts[1] if len(parts) > 1 else None
        return list(XnnpackRunner(parts[0], name, weights=weights)(*method.inputs))
    except (ArtifactError, LoweringError) as error:
        place = file if name == FORWARD else f"{file}, method {name!r}"
        raise LoweringError(
            f"{place}: ExecuTorch lowered the graph, but its own runtime refuses the program "
            f"({error.__cause__ or error}); nothing was written. This is a bug of the backend or "
            f"of its remedies: please report the model"
        ) from error


def _spec(name: str, value: Tensor) -> TensorSpec:
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return TensorSpec(name=name, shape=shape, dtype=dtype)
