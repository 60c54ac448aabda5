"""ExecuTorch's own part: partition for XNNPACK, and tell what was delegated."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from mpqdm_fx.backends.xnnpack.flat_json import flatc_files
from mpqdm_fx.errors import LoweringError, MPQError

__all__ = [
    "delegation",
    "edge_graph",
    "move_weights_out",
    "root_logger_kept",
    "runnable",
    "to_edge",
    "to_program",
]

_EXTERNAL = "weights"  # tag of constants that go into a file of their own, and its stem


def to_edge(
    exported: torch.export.ExportedProgram | dict[str, torch.export.ExportedProgram],
    partitioner: Any = None,
    watch: Callable[[torch.export.ExportedProgram], None] | None = None,
) -> Any:
    """Partition for XNNPACK and preprocess every delegate.

    Args:
        exported: A program, which becomes the method `forward`, or programs by method.
        partitioner: Another partitioner than XNNPACK's own.
        watch: Called with the edge program of each method before it is partitioned.
    """
    with root_logger_kept():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    # The converted graph holds q/dq ops, which the validity check does not know. The partitioner
    # knows layout copies in their dimension-order form only, so that must not be skipped.
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=False)
    try:
        with _rare_collections(), _order_kept(), flatc_files():
            return to_edge_transform_and_lower(
                exported,
                transform_passes=None if watch is None else [_watching_pass(watch)],
                partitioner=[partitioner or XnnpackPartitioner()],
                compile_config=config,
            )
    except MPQError:
        raise
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        raise LoweringError(
            f"ExecuTorch cannot lower this graph: {type(error).__name__}: {message[0]}"
        ) from error


def edge_graph(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph that XNNPACK's partitioner is given, in edge operators; it runs in Python.

    Args:
        exported: A program; it is not lowered further.

    Raises:
        LoweringError: ExecuTorch failed on it.
    """
    graphs: list[fx.GraphModule] = []

    def keep(program: torch.export.ExportedProgram) -> None:
        graphs.append(runnable(program))
        raise _EnoughError

    try:
        to_edge(exported, watch=keep)
    except LoweringError:
        if not graphs:
            raise
    return graphs[0]


class _EnoughError(Exception):
    """Ends a lowering whose edge program is all that is wanted."""


def runnable(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """A graph that computes an edge program in Python; weights are shared."""
    return program.module(check_guards=False)


def _watching_pass(watch: Callable[[torch.export.ExportedProgram], None]) -> Any:
    from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult

    class Watch(ExportedProgramPassBase):  # type: ignore[misc]  # executorch is untyped
        def call(self, exported_program: Any) -> Any:
            watch(exported_program)
            return ExportedProgramPassResult(exported_program, False)

    return Watch()


def move_weights_out(exported: torch.export.ExportedProgram) -> None:
    """Mark all constants of a program, in place, to be written to a data file of their own.

    ExecuTorch's own pass for this marks an unlifted graph before it is exported again; there the
    marks of frozen int8 weights are lost (1.5.1).
    """
    inputs = set(exported.graph_signature.user_inputs)
    for node in exported.graph.find_nodes(op="placeholder"):
        if node.name not in inputs:
            node.meta["custom"] = {"delegate_constant_tag": _EXTERNAL}


def to_program(edge: Any, *, external_weights: bool = False) -> Any:
    """Plan memory and serialise; with `external_weights` after `move_weights_out`."""
    from executorch.exir import ExecutorchBackendConfig

    constants = (lambda node: _EXTERNAL) if external_weights else False
    try:
        with flatc_files():
            return edge.to_executorch(ExecutorchBackendConfig(external_constants=constants))
    except MPQError:
        raise
    except Exception as error:
        refused = {name for method in edge.methods for name in delegation(edge, method)["refusals"]}
        outside = sorted(name for name in refused if "quantize" in name)
        detail = f"; not delegated: {', '.join(outside)}" if outside else ""
        raise LoweringError(
            f"ExecuTorch cannot serialise this graph: {type(error).__name__}: "
            f"{(str(error).strip().splitlines() or [''])[0]}{detail}"
        ) from error


def delegation(edge: Any, method: str = "forward") -> dict[str, Any]:
    """Delegates and nodes of a partitioned method, by the names of `XnnpackProgram`'s fields."""
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(edge.exported_program(method).graph_module)
    refused = {
        name: entry.non_delegated
        for name, entry in sorted(info.delegation_by_operator.items())
        if entry.non_delegated and name not in ("getitem", "alloc")
    }
    return {
        "subgraphs": info.num_delegated_subgraphs,
        "delegated": info.num_delegated_nodes,
        "undelegated": sum(refused.values()),
        "refusals": refused,
    }


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the garbage collector run a hundred times less often.

    Lowering makes millions of small objects that mostly die by their reference count; searching
    them for cycles took a fifth of its time.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def _order_kept() -> Iterator[None]:
    """Let ExecuTorch keep the order of nodes where it sorts a graph behind each delegate.

    Its own sort is breadth first (docs/upstream.md): in all delegates but the first, independent
    chains advance together, and all that they hold is there at once.
    """
    from executorch.exir import lowered_backend_module
    from torch.fx.passes import tools_common

    before = lowered_backend_module.legalize_graph
    lowered_backend_module.legalize_graph = tools_common.stable_topological_sort
    try:
        yield
    finally:
        lowered_backend_module.legalize_graph = before


@contextlib.contextmanager
def root_logger_kept() -> Iterator[None]:
    """Undo `logging.basicConfig`, which ExecuTorch's partitioner calls when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
