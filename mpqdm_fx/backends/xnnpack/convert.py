"""From a rounded graph to one that ExecuTorch's XNNPACK partitioner handles right."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx

from mpqdm_fx.backends.fit_channels import fit_channels, round_biases, split_calls
from mpqdm_fx.backends.pt2e import convert_pt2e_graph
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, four_bit_convolutions, split_mixed_layers
from mpqdm_fx.backends.xnnpack.passes.linearize_pointwise import LinearizePointwise
from mpqdm_fx.backends.xnnpack.pipelines import DECOMPOSE, REMEDIES
from mpqdm_fx.backends.xnnpack.runnable_activations import runnable_activations, split_activations
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import Activation, KernelActivation

__all__ = ["converted_graph", "decomposed", "fitted", "quantized_graph"]


def decomposed(
    rounded: fx.GraphModule, activations: Mapping[str, Activation], *, four_bit: FourBit = "whole"
) -> tuple[fx.GraphModule, dict[str, KernelActivation], dict[str, str]]:
    """Write the graph in ops that XNNPACK knows, with weights and biases that its kernels can hold.

    Args:
        rounded: Module-level graph after rounding; it is not changed.
        activations: By layer.
        four_bit: Which weights are stored at four bits.

    Returns:
        The graph; the activations of its int8 layers, with those of layers that were split; and the
        layers that stay in float for want of a kernel, with the reason.

    Raises:
        ConfigError, LoweringError: see `runnable_activations`.
    """
    written = DECOMPOSE(rounded).graph_module
    runnable, floats = runnable_activations(written, activations)
    return *fitted(written, runnable, four_bit=four_bit), floats


def fitted(
    written: fx.GraphModule,
    runnable: Mapping[str, KernelActivation],
    *,
    four_bit: FourBit = "whole",
    exact: Collection[str] = (),
) -> tuple[fx.GraphModule, dict[str, KernelActivation]]:
    """Bring weights and biases to what the kernels can hold.

    Static kernels add biases in integers; dynamic ones add them in float, so dynamic layers keep
    theirs, and their scales.

    Args:
        written: Graph in ops that XNNPACK knows.
        runnable: Activations of its int8 layers.
        four_bit: Which weights are stored at four bits.
        exact: Static layers that other kernels run, which add biases in float.

    Returns:
        The graph, and the activations with those of layers that were split.
    """
    runnable = dict(runnable)
    if four_bit != "never":
        pointwise = four_bit_convolutions(written, runnable)
        written = LinearizePointwise(layers=pointwise)(written).graph_module
    if four_bit == "split":
        written, runnable = split_mixed_layers(written, runnable)
    static, dynamic = split_activations(runnable)
    plain, static = split_calls(written, static, exact)
    plain = round_biases(fit_channels(plain, static, exact), static, exact)
    return plain, {**static, **dynamic}


def quantized_graph(
    plain: fx.GraphModule, activations: Mapping[str, KernelActivation]
) -> fx.GraphModule:
    """The graph that computes what the program is to compute, in float: what it is checked against.

    Static layers are those of the converted graph, bit for bit. Dynamic ones have their ranges per
    sample or per row, as XNNPACK's kernels do; the converted graph names one range per tensor.

    Args:
        plain: From `decomposed`.
        activations: From `decomposed`.
    """
    result: fx.GraphModule = QuantizeActivations(ranges=activations)(plain).graph_module
    return result


def converted_graph(
    plain: fx.GraphModule,
    activations: Mapping[str, KernelActivation],
    inputs: Sequence[Any],
    four_bit: Collection[str] = (),
) -> fx.GraphModule:
    """Convert to int8 weights and q/dq ops, and see to what the partitioner would mishandle.

    Args:
        plain: From `decomposed`.
        activations: From `decomposed`.
        inputs: Example inputs in order; the result takes their shapes only.
        four_bit: Layers whose weights are stored at four bits (`four_bit_layers`).
    """
    converted = convert_pt2e_graph(plain, activations, inputs, four_bit=four_bit)
    result: fx.GraphModule = REMEDIES(converted).graph_module
    return result
