"""A quantized model becomes what a backend runs: one verb a backend, and one front for all."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from mpqdm_fx.backends.check_settings import check_kernel_options
from mpqdm_fx.backends.lowbit.program import LowbitProgram
from mpqdm_fx.backends.names import Backend, Cpu, FourBit, Kernels
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.errors import ConfigError, LoweringError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.stages import positional_inputs
from mpqdm_fx.model.storage import save
from mpqdm_fx.records.validation import Count, check_value, checked

__all__ = [
    "lower",
    "lower_to_lowbit",
    "lower_to_packed",
    "lower_to_torch_ao",
    "lower_to_xnnpack",
]


@overload
def lower(
    quantized: QuantizedModel, backend: Literal["torch_ao"], *, engine: str = ...
) -> fx.GraphModule: ...
@overload
def lower(
    quantized: QuantizedModel,
    backend: Literal["xnnpack"],
    *,
    output: str | Path,
    batch_size: int = ...,
    max_delegates: int | None = ...,
    keep_graphs: bool = ...,
    external_weights: bool = ...,
    four_bit: FourBit = ...,
) -> XnnpackProgram: ...
@overload
def lower(
    quantized: QuantizedModel,
    backend: Literal["lowbit"],
    *,
    output: str | Path,
    kernels: Kernels = ...,
    cpu: Cpu = ...,
    batch_size: int = ...,
    max_delegates: int | None = ...,
    keep_graphs: bool = ...,
    external_weights: bool = ...,
    four_bit: FourBit = ...,
) -> LowbitProgram: ...
@overload
def lower(quantized: QuantizedModel, backend: Literal["packed"], *, output: str | Path) -> Path: ...


def lower(quantized: QuantizedModel, backend: Backend, **options: Any) -> Any:
    """Turn a quantized model into what a backend runs.

    Args:
        quantized: Quantized model.
        backend: `"torch_ao"`: a GraphModule of torch.ao quantized operators, see
            `lower_to_torch_ao`. `"xnnpack"`: an ExecuTorch program, see `lower_to_xnnpack`.
            `"lowbit"`: one with own kernels for weights at their own bits, which needs the native
            library where it runs, see `lower_to_lowbit`. `"packed"`: a folder with the weights at
            their own bits, see `lower_to_packed`.
        options: Of that function.

    Returns:
        A GraphModule, an `XnnpackProgram`, a `LowbitProgram`, or the folder's path.

    Raises:
        ConfigError: `backend` is unknown, does not take an option, or needs one that is missing.
        LoweringError: The backend cannot run this model, or runs it with other numbers.
    """
    check_value(backend, Backend, "backend")
    verb = _VERBS[backend]
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(verb).parameters.items()
        if name != "quantized"
    }
    for name in options:
        if name not in parameters:
            raise ConfigError(
                f"backend={backend!r} takes no {name}; it takes {', '.join(parameters)}"
            )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"backend={backend!r} writes files: give `{name}`")
    return verb(quantized, **options)


@plain_torch()
@checked
def lower_to_torch_ao(quantized: QuantizedModel, *, engine: str = "onednn") -> fx.GraphModule:
    """Turn a quantized model into a graph of torch.ao quantized operators.

    Args:
        quantized: Quantized model with static activations of 8 bits.
        engine: `"onednn"`, `"fbgemm"` or `"qnnpack"`.

    Raises:
        ConfigError: The engine is none, or no layer has an activation.
        LoweringError: torch.ao has no kernel for a layer or an activation.
    """
    from mpqdm_fx.backends.torch_ao import lower_torch_ao

    inputs = positional_inputs(quantized.rounded, example_inputs(quantized.signature))
    return lower_torch_ao(quantized.rounded, quantized.ranges, inputs, engine=engine)


@plain_torch()
@checked
def lower_to_packed(quantized: QuantizedModel, *, output: str | Path) -> Path:
    """Write a quantized model's folder: the weights at their own bits.

    Args:
        quantized: Quantized model.
        output: Folder; it appears whole or not at all.

    Raises:
        ArtifactError: `output` holds something else.
    """
    return save(quantized, output)


@plain_torch()
@checked
def lower_to_xnnpack(
    quantized: QuantizedModel,
    *,
    output: str | Path,
    batch_size: Count = 1,
    max_delegates: Count | None = None,
    keep_graphs: bool = False,
    external_weights: bool = False,
    four_bit: FourBit = "whole",
) -> XnnpackProgram:
    """Write a quantized model's ExecuTorch program, and execute it once.

    Args:
        quantized: Quantized model; its activations are static or dynamic, layer by layer.
        output: File; it appears whole or not at all.
        batch_size: Batch that the program is made for: its shapes are static.
        max_delegates: Refuse a program of more XNNPACK subgraphs, with a list of all that stays out
            of them.
        keep_graphs: Return the graphs that the program was made of, too: several times the model.
        external_weights: Write the weights to a file of their own, `<stem>.ptd`, beside `output`.
        four_bit: Which weights the program stores at four bits: none, those of linear layers and
            1x1 convolutions that fit as a whole (`levels="int4"` sees to that, at up to four bits),
            or also the channels that fit in layers of mixed widths: fewer bytes, more time.

    Raises:
        ConfigError: No layer has an activation.
        LoweringError: XNNPACK cannot run this model, or runs it with other numbers.
    """
    from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack

    return lower_xnnpack(
        quantized.rounded,
        quantized.ranges,
        _program_inputs(quantized, batch_size),
        Path(output),
        max_delegates=max_delegates,
        keep_graphs=keep_graphs,
        external_weights=external_weights,
        four_bit=four_bit,
    )


@plain_torch()
@checked
def lower_to_lowbit(
    quantized: QuantizedModel,
    *,
    output: str | Path,
    kernels: Kernels = "auto",
    cpu: Cpu = "avx2",
    batch_size: Count = 1,
    max_delegates: Count | None = None,
    keep_graphs: bool = False,
    external_weights: bool = False,
    four_bit: FourBit = "whole",
) -> LowbitProgram:
    """Write an ExecuTorch program with own kernels beside XNNPACK's, for weights at their own bits.

    What runs the program needs the native library `mpqdm_kernels`. It is executed here if the
    library is installed; without it, its graph is, with the operators' references in Python.

    Args:
        quantized: Quantized model; own kernels run layers with static or dynamic activations of 8
            bits, and XNNPACK's run the others.
        output: File; it appears whole or not at all.
        kernels: `"auto"`: own kernels run the layers for which the cost table says that they are
            faster; `"memory"`: all that they can run, for least memory; `"xnnpack"`: none.
        cpu: Class of CPUs that the cost table is asked about: `"avx2"`, `"vnni"` or `"dotprod"`.
        batch_size: Batch that the program is made for: its shapes are static.
        max_delegates: Refuse a program of more XNNPACK subgraphs. Own operators part the program:
            there are about as many subgraphs as own layers.
        keep_graphs: Return the graphs that the program was made of, too: several times the model.
        external_weights: Write the weights to a file of their own, `<stem>.ptd`, beside `output`.
        four_bit: Which of the weights that XNNPACK runs are stored at four bits, as of
            `lower_to_xnnpack`.

    Raises:
        ConfigError: No layer has an activation, or `cpu` is given where no table is asked.
        LoweringError: XNNPACK cannot run the rest of the model, or the program computes other
            numbers.
    """
    check_kernel_options("lowbit", kernels, cpu)
    from mpqdm_fx.backends.lowbit.lower import lower_lowbit

    return lower_lowbit(
        quantized.rounded,
        quantized.ranges,
        _program_inputs(quantized, batch_size),
        Path(output),
        kernels=kernels,
        cpu=cpu,
        max_delegates=max_delegates,
        keep_graphs=keep_graphs,
        external_weights=external_weights,
        four_bit=four_bit,
    )


_VERBS: Mapping[Backend, Callable[..., Any]] = {
    "torch_ao": lower_to_torch_ao,
    "xnnpack": lower_to_xnnpack,
    "lowbit": lower_to_lowbit,
    "packed": lower_to_packed,
}


def _program_inputs(quantized: QuantizedModel, batch_size: int) -> tuple[Any, ...]:
    """What a program is made for and tried on: tensors in order."""
    example = example_inputs(quantized.signature, batch_size=batch_size)
    inputs = _in_domain(quantized.rounded, positional_inputs(quantized.rounded, example))
    if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise LoweringError(
            "an XNNPACK program takes tensors alone, and a list among the inputs holds constants "
            "beside them; let the model take these as arguments of their own"
        )
    return inputs


def _in_domain(graph_module: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random inputs, their numbers per sample positive where the graph gives NaN for others.

    Models that are told a sigma take its logarithm.
    """
    with torch.no_grad():
        outputs = tree_leaves(graph_module(*inputs))
    if not any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in outputs):
        return inputs

    def positive(leaf: Tensor) -> Tensor:
        return leaf.abs() + 0.5 if leaf.is_floating_point() and leaf.dim() <= 1 else leaf

    return tuple(tree_map_only(Tensor, positive, inputs))
