"""From a rounded graph to one that ExecuTorch's XNNPACK partitioner handles right."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx

from mpqdm_fx.backends.fit_channels import fit_channels, round_biases, split_calls
from mpqdm_fx.backends.pt2e import convert_pt2e_graph
from mpqdm_fx.backends.xnnpack.activations import runnable_activations, split_activations
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, four_bit_convolutions, split_mixed_layers
from mpqdm_fx.backends.xnnpack.passes.cast_early import CastEarly
from mpqdm_fx.backends.xnnpack.passes.decompose_attention import DecomposeAttention
from mpqdm_fx.backends.xnnpack.passes.decompose_group_norm import DecomposeGroupNorm
from mpqdm_fx.backends.xnnpack.passes.decompose_layer_norm import DecomposeLayerNorm
from mpqdm_fx.backends.xnnpack.passes.decompose_upsample import DecomposeUpsample
from mpqdm_fx.backends.xnnpack.passes.divide_reciprocals import DivideReciprocals
from mpqdm_fx.backends.xnnpack.passes.drop_noop_slices import DropNoopSlices
from mpqdm_fx.backends.xnnpack.passes.drop_unit_factors import DropUnitFactors
from mpqdm_fx.backends.xnnpack.passes.exclude_padding import ExcludePadding
from mpqdm_fx.backends.xnnpack.passes.float_scalars import FloatScalars
from mpqdm_fx.backends.xnnpack.passes.fold_constants import FoldConstants
from mpqdm_fx.backends.xnnpack.passes.linearize_pointwise import LinearizePointwise
from mpqdm_fx.backends.xnnpack.passes.pin_layouts import PinLayouts
from mpqdm_fx.backends.xnnpack.passes.requantize_copies import RequantizeCopies
from mpqdm_fx.backends.xnnpack.passes.reshape_unit_axes import ReshapeUnitAxes
from mpqdm_fx.backends.xnnpack.passes.slice_chunks import SliceChunks
from mpqdm_fx.backends.xnnpack.passes.unshare_dequantize import UnshareDequantize
from mpqdm_fx.backends.xnnpack.passes.unshare_dynamic_quantizers import UnshareDynamicQuantizers
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.passes.normalize.normalize_padding import NormalizePadding
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import Activation, KernelActivation

__all__ = ["DECOMPOSE", "REMEDIES", "converted_graph", "decomposed", "quantized_graph"]

#: On the module-level graph, before conversion: what XNNPACK does not know becomes what it knows.
#: First goes what computes nothing: a factor of one hides that a chain is constant. Then single
#: ops are written out; they meet no others' results but for attention, whose pieces stay. What
#: moves axes comes last, because earlier passes leave such moves behind.
DECOMPOSE = Pipeline(
    passes=(
        DropUnitFactors(),
        FoldConstants(),
        NormalizePadding(),
        DecomposeAttention(),
        DecomposeGroupNorm(),
        DecomposeLayerNorm(),
        DecomposeUpsample(),
        FloatScalars(),
        DivideReciprocals(),
        ExcludePadding(),
        SliceChunks(),
        CastEarly(),
        ReshapeUnitAxes(),
    )
)

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
    rounded: fx.GraphModule, ranges: Mapping[str, Activation], *, four_bit: FourBit = "whole"
) -> tuple[fx.GraphModule, dict[str, KernelActivation], dict[str, str]]:
    """Write the graph in ops that XNNPACK knows, with weights and biases that its kernels can hold.

    Static kernels add biases in integers; dynamic ones add them in float, so dynamic layers keep
    theirs, and their scales.

    Args:
        rounded: Module-level graph after rounding; it is not changed.
        ranges: Activation by layer.
        four_bit: Which weights are stored at four bits.

    Returns:
        The graph; the activations of its int8 layers, with those of layers that were split; and the
        layers that stay in float for want of a kernel, with the reason.

    Raises:
        ConfigError, LoweringError: see `runnable_activations`.
    """
    written = DECOMPOSE(rounded).graph_module
    runnable, floats = runnable_activations(written, ranges)
    if four_bit != "never":
        pointwise = four_bit_convolutions(written, runnable)
        written = LinearizePointwise(layers=pointwise)(written).graph_module
    if four_bit == "split":
        written, runnable = split_mixed_layers(written, runnable)
    static, dynamic = split_activations(runnable)
    plain, static = split_calls(written, static)
    return round_biases(fit_channels(plain, static), static), {**static, **dynamic}, floats


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
    plain: fx.GraphModule,
    ranges: Mapping[str, KernelActivation],
    inputs: Sequence[Any],
    four_bit: Collection[str] = (),
) -> fx.GraphModule:
    """Convert to int8 weights and q/dq ops, and see to what the partitioner would mishandle.

    Args:
        plain: From `decomposed`.
        ranges: From `decomposed`.
        inputs: Example inputs in order; the result takes their shapes only.
        four_bit: Layers whose weights are stored at four bits (`four_bit_layers`).
    """
    converted = convert_pt2e_graph(plain, ranges, inputs, four_bit=four_bit)
    result: fx.GraphModule = REMEDIES(converted).graph_module
    return result
