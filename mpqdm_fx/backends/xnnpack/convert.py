"""From a rounded graph to one that ExecuTorch's XNNPACK partitioner handles right."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from mpqdm_fx.activations import KernelActivation
from mpqdm_fx.backends.fit_channels import fit_channels, round_biases, split_calls
from mpqdm_fx.backends.pt2e import convert_pt2e_graph
from mpqdm_fx.backends.xnnpack.activations import split_activations
from mpqdm_fx.graph.base import Pipeline
from mpqdm_fx.passes.decompose_attention import DecomposeAttention
from mpqdm_fx.passes.drop_noop_slices import DropNoopSlices
from mpqdm_fx.passes.pin_layouts import PinLayouts
from mpqdm_fx.passes.quantize_activations import QuantizeActivations
from mpqdm_fx.passes.requantize_copies import RequantizeCopies
from mpqdm_fx.passes.unshare_dequantize import UnshareDequantize
from mpqdm_fx.passes.unshare_dynamic_quantizers import UnshareDynamicQuantizers

__all__ = ["DECOMPOSE", "REMEDIES", "converted_graph", "decomposed", "quantized_graph"]

#: On the module-level graph, before conversion: what XNNPACK does not know becomes what it knows.
DECOMPOSE = Pipeline(passes=(DecomposeAttention(),))

#: On the converted graph, before lowering: int8 values that its partitioner would mishandle, and
#: layouts that its channels-last pass would change far from where it should.
REMEDIES = Pipeline(
    passes=(
        DropNoopSlices(),
        UnshareDynamicQuantizers(),
        PinLayouts(),
        UnshareDequantize(),
        RequantizeCopies(),
    )
)


def decomposed(
    rounded: fx.GraphModule, ranges: Mapping[str, KernelActivation]
) -> tuple[fx.GraphModule, dict[str, KernelActivation]]:
    """Write the graph in ops that XNNPACK knows, with weights and biases that its kernels can hold.

    Static kernels add biases in integers; dynamic ones add them in float, so dynamic layers keep
    theirs, and their scales.

    Args:
        rounded: Module-level graph after rounding; it is not changed.
        ranges: Activation of each int8 layer.

    Returns:
        The graph, and the activations with those of layers that were split.
    """
    static, dynamic = split_activations(ranges)
    plain, static = split_calls(DECOMPOSE(rounded).graph_module, static)
    return round_biases(fit_channels(plain, static), static), {**static, **dynamic}


def quantized_graph(
    plain: fx.GraphModule, ranges: Mapping[str, KernelActivation]
) -> fx.GraphModule:
    """The graph that computes what the program is to compute, in float: what it is checked against.

    Static layers are those of the converted graph, bit for bit. Dynamic ones have their ranges per
    sample or per row, as XNNPACK's kernels do; the converted graph names one range per tensor.

    Args:
        plain: From `decomposed`.
        ranges: From `decomposed`.
    """
    result: fx.GraphModule = QuantizeActivations(ranges=ranges)(plain).graph_module
    return result


def converted_graph(
    plain: fx.GraphModule, ranges: Mapping[str, KernelActivation], inputs: Sequence[Any]
) -> fx.GraphModule:
    """Convert to int8 weights and q/dq ops, and see to what the partitioner would mishandle.

    Args:
        plain: From `decomposed`.
        ranges: From `decomposed`.
        inputs: Example inputs in order; the result takes their shapes only.
    """
    result: fx.GraphModule = REMEDIES(convert_pt2e_graph(plain, ranges, inputs)).graph_module
    return result
