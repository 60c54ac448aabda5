"""Passes that only XNNPACK needs: one pass, one file, one class, named by a verb."""

from mpqdm_fx.backends.xnnpack.passes.average_sums import AverageSums
from mpqdm_fx.backends.xnnpack.passes.blend_branches import BlendBranches
from mpqdm_fx.backends.xnnpack.passes.cast_early import CastEarly
from mpqdm_fx.backends.xnnpack.passes.crop_negative_pads import CropNegativePads
from mpqdm_fx.backends.xnnpack.passes.decompose_attention import DecomposeAttention
from mpqdm_fx.backends.xnnpack.passes.decompose_gelu import DecomposeGelu
from mpqdm_fx.backends.xnnpack.passes.decompose_group_norm import DecomposeGroupNorm
from mpqdm_fx.backends.xnnpack.passes.decompose_layer_norm import DecomposeLayerNorm
from mpqdm_fx.backends.xnnpack.passes.decompose_matmul import DecomposeMatmul
from mpqdm_fx.backends.xnnpack.passes.decompose_prelu import DecomposePrelu
from mpqdm_fx.backends.xnnpack.passes.decompose_upsample import DecomposeUpsample
from mpqdm_fx.backends.xnnpack.passes.divide_reciprocals import DivideReciprocals
from mpqdm_fx.backends.xnnpack.passes.drop_copies import DropCopies
from mpqdm_fx.backends.xnnpack.passes.drop_expansions import DropExpansions
from mpqdm_fx.backends.xnnpack.passes.drop_noop_slices import DropNoopSlices
from mpqdm_fx.backends.xnnpack.passes.drop_unit_factors import DropUnitFactors
from mpqdm_fx.backends.xnnpack.passes.float_scalars import FloatScalars
from mpqdm_fx.backends.xnnpack.passes.fold_constants import FoldConstants
from mpqdm_fx.backends.xnnpack.passes.forward_slices import ForwardSlices
from mpqdm_fx.backends.xnnpack.passes.gather_codes import GatherCodes
from mpqdm_fx.backends.xnnpack.passes.join_scatters import JoinScatters
from mpqdm_fx.backends.xnnpack.passes.linearize_patches import LinearizePatches
from mpqdm_fx.backends.xnnpack.passes.linearize_pointwise import LinearizePointwise
from mpqdm_fx.backends.xnnpack.passes.merge_reshapes import MergeReshapes
from mpqdm_fx.backends.xnnpack.passes.multiply_powers import MultiplyPowers
from mpqdm_fx.backends.xnnpack.passes.multiply_repeats import MultiplyRepeats
from mpqdm_fx.backends.xnnpack.passes.narrow_permutations import NarrowPermutations
from mpqdm_fx.backends.xnnpack.passes.pin_layouts import PinLayouts
from mpqdm_fx.backends.xnnpack.passes.requantize_copies import RequantizeCopies
from mpqdm_fx.backends.xnnpack.passes.reshape_unit_axes import ReshapeUnitAxes
from mpqdm_fx.backends.xnnpack.passes.slice_chunks import SliceChunks
from mpqdm_fx.backends.xnnpack.passes.split_complex import SplitComplex
from mpqdm_fx.backends.xnnpack.passes.split_mixed_rows import SplitMixedRows
from mpqdm_fx.backends.xnnpack.passes.stack_sequences import StackSequences
from mpqdm_fx.backends.xnnpack.passes.unshare_dequantize import UnshareDequantize
from mpqdm_fx.backends.xnnpack.passes.unshare_dynamic_quantizers import UnshareDynamicQuantizers
from mpqdm_fx.backends.xnnpack.passes.unshare_weights import UnshareWeights
from mpqdm_fx.backends.xnnpack.passes.view_means import ViewMeans
from mpqdm_fx.backends.xnnpack.passes.view_strided_slices import ViewStridedSlices
from mpqdm_fx.backends.xnnpack.passes.widen_sequences import WidenSequences

__all__ = [
    "AverageSums",
    "BlendBranches",
    "CastEarly",
    "CropNegativePads",
    "DecomposeAttention",
    "DecomposeGelu",
    "DecomposeGroupNorm",
    "DecomposeLayerNorm",
    "DecomposeMatmul",
    "DecomposePrelu",
    "DecomposeUpsample",
    "DivideReciprocals",
    "DropCopies",
    "DropExpansions",
    "DropNoopSlices",
    "DropUnitFactors",
    "FloatScalars",
    "FoldConstants",
    "ForwardSlices",
    "GatherCodes",
    "JoinScatters",
    "LinearizePatches",
    "LinearizePointwise",
    "MergeReshapes",
    "MultiplyPowers",
    "MultiplyRepeats",
    "NarrowPermutations",
    "PinLayouts",
    "RequantizeCopies",
    "ReshapeUnitAxes",
    "SliceChunks",
    "SplitComplex",
    "SplitMixedRows",
    "StackSequences",
    "UnshareDequantize",
    "UnshareDynamicQuantizers",
    "UnshareWeights",
    "ViewMeans",
    "ViewStridedSlices",
    "WidenSequences",
]
