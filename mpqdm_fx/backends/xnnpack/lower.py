"""ExecuTorch with XNNPACK: a rounded graph becomes a `.pte` for phone CPUs, executed once.

The road: decompose what XNNPACK does not know -> stock PT2E conversion -> two remedies for what
its partitioner does to shared and moved int8 values -> `to_edge_transform_and_lower` -> file ->
one execution, compared with the converted graph. Lowering that succeeds proves nothing in this
backend; only running the file does.
"""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.activations import Activation
from mpqdm_fx.backends.observers import weight_grids
from mpqdm_fx.backends.pt2e import export_graph
from mpqdm_fx.backends.torch_ao import check_ranges
from mpqdm_fx.backends.xnnpack.convert import DECOMPOSE, converted_graph, decomposed
from mpqdm_fx.backends.xnnpack.edge import delegation, to_edge
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.backends.xnnpack.runner import (
    TensorSpec,
    XnnpackRunner,
    flat_inputs,
    require_executorch,
    sorted_entries,
)
from mpqdm_fx.backends.xnnpack.stages import Stages
from mpqdm_fx.errors import ArtifactError, LoweringError
from mpqdm_fx.graph.editing import replace_module, shallow_clone
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.qdq import is_dequantize, qdq_parameters
from mpqdm_fx.numerics.metrics import sqnr_db

__all__ = ["lower_xnnpack", "lower_xnnpack_float"]

logger = logging.getLogger(__name__)

# The graph has the program's int32 biases, so integers agree bit for bit but where a float op
# before them (a norm, a softmax) sums in another order and a value next to a tie falls elsewhere.
# Every later rounding spreads such a step, and in the end the program's rounding errors are another
# draw of the same noise: two draws differ by 3 dB more than each from the truth. 6 dB leaves as
# much again; a wrong layout or scale costs tens of dB.
MARGIN_DB = 6.0
# Where activations are in float, only the order of sums differs.
FLOAT_SQNR_DB = 60.0


def lower_xnnpack(
    rounded: fx.GraphModule,
    ranges: Mapping[str, Activation],
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | Path,
) -> XnnpackProgram:
    """Lower a rounded graph to a static int8 `.pte`, write it and execute it once.

    Convolutions and linear layers with a range run as int8 with int8 weights per channel; all else
    runs in float. Shapes are those of the example inputs.

    Args:
        rounded: Module-level graph after `RoundWeights`; it is not changed.
        ranges: Input and output range by layer name, 8 bits. Layers without an entry stay in
            float with their rounded weights.
        example_inputs: Inputs of `rounded`, by name or in order; also what the program is tried on.
        path: File to write. It appears only if the program ran with the right numbers.

    Returns:
        What was written and measured.

    Raises:
        ConfigError: No layer is rounded, or `ranges` names a layer that is not.
        LoweringError: ExecuTorch is missing or failed, a range is not static and 8 bits wide, the
            graph has a Conv3d, or the program computes other numbers than the converted graph.
    """
    require_executorch()
    static = check_ranges(ranges, weight_grids(rounded), "XNNPACK")
    _refuse_conv3d(rounded)
    inputs = _positional(example_inputs)
    with Stages() as stage, torch.no_grad():
        stage("decompose")
        plain, static = decomposed(rounded, static)
        stage("convert")
        converted = converted_graph(plain, static, inputs)
        expected = _leaves(converted(*inputs))
        reference = sqnr_db(_joined(_leaves(rounded(*inputs))), _joined(expected))
        names = _argument_names(rounded)
        return _write(converted, inputs, names, Path(path), expected, stage, reference)


def lower_xnnpack_float(
    graph: fx.GraphModule,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | Path,
) -> XnnpackProgram:
    """Lower a float graph to an fp32 `.pte`, write it and execute it once: the baseline.

    Args:
        graph: Module-level graph; it is not changed.
        example_inputs: Inputs of `graph`, by name or in order.
        path: File to write. It appears only if the program ran with the right numbers.

    Raises:
        LoweringError: ExecuTorch is missing or failed, or the program computes other numbers.
    """
    require_executorch()
    _refuse_conv3d(graph)
    inputs = _positional(example_inputs)
    with Stages() as stage, torch.no_grad():
        stage("decompose")
        plain = _without_codes(DECOMPOSE(graph).graph_module)
        expected, names = _leaves(graph(*inputs)), _argument_names(graph)
        return _write(plain, inputs, names, Path(path), expected, stage, None)


def _write(
    graph: fx.GraphModule,
    inputs: tuple[Any, ...],
    names: Sequence[str],
    path: Path,
    expected: list[Tensor],
    stage: Stages,
    reference: float | None,
) -> XnnpackProgram:
    """Lower, write beside `path`, execute, compare, and only then rename."""
    stage("export")
    exported = export_graph(graph, inputs)
    stage("lower")
    edge = to_edge(exported)
    stage("serialise")
    program = edge.to_executorch()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            program.write_to_file(file)
        stage("execute")
        found = _execute(part, path.name, inputs)
        scale = _output_scale(graph)
        sqnr = sqnr_db(_joined(expected), _joined(found))
        lsb = None if scale is None else float((found[0] - expected[0]).abs().max()) / scale
        _check(path, sqnr, lsb, reference)
        size = part.stat().st_size
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    info = delegation(edge)
    result = XnnpackProgram(
        path=path,
        bytes=size,
        inputs=tuple(_spec(name, value) for name, value in flat_inputs(inputs, names)),
        outputs=tuple(_spec(str(i), value) for i, value in enumerate(expected)),
        output_scale=scale,
        sqnr_db=sqnr,
        max_lsb=lsb,
        reference_sqnr_db=reference,
        seconds=stage.seconds,
        **info,
    )
    logger.info(
        "%s: %d bytes, %d delegates, %d nodes delegated and %d not, %.1f dB against the graph",
        path, size, result.subgraphs, result.delegated, result.undelegated, sqnr,
    )  # fmt: skip
    return result


def _execute(part: Path, name: str, inputs: tuple[Any, ...]) -> list[Tensor]:
    try:
        return list(XnnpackRunner(part)(*inputs))
    except (ArtifactError, LoweringError) as error:
        raise LoweringError(
            f"{name}: ExecuTorch lowered the graph, but its own runtime refuses the program "
            f"({error.__cause__ or error}); nothing was written. This is a bug of the backend or "
            f"of its remedies: please report the model"
        ) from error


def _check(path: Path, sqnr: float, lsb: float | None, reference: float | None) -> None:
    bound = FLOAT_SQNR_DB if reference is None else min(reference - MARGIN_DB, FLOAT_SQNR_DB)
    close = lsb is not None and lsb <= 1.0 + 1e-3
    if sqnr >= bound or close:
        return
    step = "" if lsb is None else f" (up to {lsb:.0f} steps of its integers)"
    raise LoweringError(
        f"{path.name}: the program ran, but its output differs from the graph it was made of: "
        f"{sqnr:.1f} dB{step}, expected at least {bound:.1f} dB; nothing was written. This is a "
        f"bug of the backend or of its remedies: please report the model"
    )


def _refuse_conv3d(graph: fx.GraphModule) -> None:
    for name, layer in weight_layers(graph).items():
        if isinstance(layer.module, torch.nn.Conv3d):
            raise LoweringError(
                f"{name}: neither XNNPACK nor ExecuTorch's portable kernels have a Conv3d; use the "
                f"torch_ao backend, or a model without volumetric convolutions"
            )


def _without_codes(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop the integers of rounded layers from a private copy: a float program would ship them."""
    for name, layer in weight_layers(graph, embeddings=True).items():
        if "weight_codes" in layer.module._buffers:
            clone = shallow_clone(layer.module)
            del clone._buffers["weight_codes"], clone._buffers["weight_scale"]
            replace_module(graph, name, clone)
    return graph


def _positional(example_inputs: Mapping[str, Any] | Sequence[Any]) -> tuple[Any, ...]:
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    return tuple(sorted_entries(value) for value in values)


def _argument_names(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten().float() for t in tensors])


def _spec(name: str, value: Tensor) -> TensorSpec:
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return TensorSpec(name=name, shape=shape, dtype=dtype)


def _output_scale(graph: fx.GraphModule) -> float | None:
    """Step of the first output, if it comes from integers."""
    (output,) = graph.graph.find_nodes(op="output")
    first = output.all_input_nodes[0]
    return float(qdq_parameters(first)[0]) if is_dequantize(first) else None
