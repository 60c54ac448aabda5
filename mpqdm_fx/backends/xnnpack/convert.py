"""From a rounded graph to one that ExecuTorch's XNNPACK partitioner handles right."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from mpqdm_fx.activations import LayerActivation
from mpqdm_fx.backends.fit_channels import fit_channels, round_biases, split_calls
from mpqdm_fx.backends.pt2e import convert_pt2e_graph
from mpqdm_fx.graph.base import Pipeline
from mpqdm_fx.passes.cast_early import CastEarly
from mpqdm_fx.passes.decompose_attention import DecomposeAttention
from mpqdm_fx.passes.decompose_group_norm import DecomposeGroupNorm
from mpqdm_fx.passes.decompose_layer_norm import DecomposeLayerNorm
from mpqdm_fx.passes.decompose_upsample import DecomposeUpsample
from mpqdm_fx.passes.drop_noop_slices import DropNoopSlices
from mpqdm_fx.passes.drop_unit_factors import DropUnitFactors
from mpqdm_fx.passes.fold_constants import FoldConstants
from mpqdm_fx.passes.normalize_padding import NormalizePadding
from mpqdm_fx.passes.requantize_copies import RequantizeCopies
from mpqdm_fx.passes.reshape_unit_axes import ReshapeUnitAxes
from mpqdm_fx.passes.unshare_dequantize import UnshareDequantize

__all__ = ["DECOMPOSE", "REMEDIES", "converted_graph", "decomposed"]

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
        CastEarly(),
        ReshapeUnitAxes(),
    )
)

#: On the converted graph, before lowering: int8 values that its partitioner would mishandle.
REMEDIES = Pipeline(passes=(DropNoopSlices(), UnshareDequantize(), RequantizeCopies()))


def decomposed(
    rounded: fx.GraphModule, ranges: Mapping[str, LayerActivation]
) -> tuple[fx.GraphModule, dict[str, LayerActivation]]:
    """Write the graph in ops that XNNPACK knows, with weights and biases that its kernels can hold.

    Args:
        rounded: Module-level graph after rounding; it is not changed.
        ranges: Static range of each int8 layer.

    Returns:
        The graph, and the ranges with those of layers that were split.
    """
    plain, static = split_calls(DECOMPOSE(rounded).graph_module, ranges)
    return round_biases(fit_channels(plain, static), static), static


def converted_graph(
    plain: fx.GraphModule, ranges: Mapping[str, LayerActivation], inputs: Sequence[Any]
) -> fx.GraphModule:
    """Convert to int8 weights and q/dq ops, and see to what the partitioner would mishandle.

    Args:
        plain: From `decomposed`.
        ranges: From `decomposed`.
        inputs: Example inputs in order; the result takes their shapes only.
    """
    result: fx.GraphModule = REMEDIES(convert_pt2e_graph(plain, ranges, inputs)).graph_module
    return result
