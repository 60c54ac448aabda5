"""Graph passes: one pass, one file, one class, named by a verb."""

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
from mpqdm_fx.backends.xnnpack.passes.split_mixed_rows import SplitMixedRows
from mpqdm_fx.backends.xnnpack.passes.unshare_dequantize import UnshareDequantize
from mpqdm_fx.backends.xnnpack.passes.unshare_dynamic_quantizers import UnshareDynamicQuantizers
from mpqdm_fx.passes.base import GraphPass
from mpqdm_fx.passes.normalize.drop_assertions import DropAssertions
from mpqdm_fx.passes.normalize.drop_dropout import DropDropout
from mpqdm_fx.passes.normalize.drop_noop_casts import DropNoopCasts
from mpqdm_fx.passes.normalize.fold_batch_norm import FoldBatchNorm
from mpqdm_fx.passes.normalize.normalize_padding import NormalizePadding
from mpqdm_fx.passes.normalize.split_geglu import SplitGeglu
from mpqdm_fx.passes.normalize.split_skip_concat import SplitSkipConcat
from mpqdm_fx.passes.quantize.carry_error_lane import CarryErrorLane
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.passes.quantize.round_weights import RoundWeights
from mpqdm_fx.passes.quantize.scale_inputs import ScaleInputs

__all__ = [
    "NORMALIZE",
    "CarryErrorLane",
    "CastEarly",
    "DecomposeAttention",
    "DecomposeGroupNorm",
    "DecomposeLayerNorm",
    "DecomposeUpsample",
    "DivideReciprocals",
    "DropAssertions",
    "DropDropout",
    "DropNoopCasts",
    "DropNoopSlices",
    "DropUnitFactors",
    "ExcludePadding",
    "FloatScalars",
    "FoldBatchNorm",
    "FoldConstants",
    "LinearizePointwise",
    "NormalizePadding",
    "PinLayouts",
    "QuantizeActivations",
    "RequantizeCopies",
    "ReshapeUnitAxes",
    "RoundWeights",
    "ScaleInputs",
    "SliceChunks",
    "SplitGeglu",
    "SplitMixedRows",
    "SplitSkipConcat",
    "UnshareDequantize",
    "UnshareDynamicQuantizers",
]

#: What runs on a traced graph before anything is quantized, in running order. First goes what
#: only hides patterns (checks are extra users, casts and dropout stand between layers), then
#: weights are merged, then layers are split. Padding that is an op of its own is taken out of the
#: convolutions last: it would stand between them and the concatenations that are split.
NORMALIZE: tuple[GraphPass, ...] = (
    DropAssertions(),
    DropNoopCasts(),
    DropDropout(),
    FoldBatchNorm(),
    SplitGeglu(),
    SplitSkipConcat(),
    NormalizePadding(),
)
