"""The lists of passes between a rounded graph and its program, in running order."""

from mpqdm_fx.backends.xnnpack.passes.cast_early import CastEarly
from mpqdm_fx.backends.xnnpack.passes.decompose_attention import DecomposeAttention
from mpqdm_fx.backends.xnnpack.passes.decompose_group_norm import DecomposeGroupNorm
from mpqdm_fx.backends.xnnpack.passes.decompose_layer_norm import DecomposeLayerNorm
from mpqdm_fx.backends.xnnpack.passes.decompose_upsample import DecomposeUpsample
from mpqdm_fx.backends.xnnpack.passes.divide_reciprocals import DivideReciprocals
from mpqdm_fx.backends.xnnpack.passes.drop_noop_slices import DropNoopSlices
from mpqdm_fx.backends.xnnpack.passes.drop_unit_factors import DropUnitFactors
from mpqdm_fx.backends.xnnpack.passes.float_scalars import FloatScalars
from mpqdm_fx.backends.xnnpack.passes.fold_constants import FoldConstants
from mpqdm_fx.backends.xnnpack.passes.gather_codes import GatherCodes
from mpqdm_fx.backends.xnnpack.passes.pin_layouts import PinLayouts
from mpqdm_fx.backends.xnnpack.passes.requantize_copies import RequantizeCopies
from mpqdm_fx.backends.xnnpack.passes.reshape_unit_axes import ReshapeUnitAxes
from mpqdm_fx.backends.xnnpack.passes.slice_chunks import SliceChunks
from mpqdm_fx.backends.xnnpack.passes.unshare_dequantize import UnshareDequantize
from mpqdm_fx.backends.xnnpack.passes.unshare_dynamic_quantizers import UnshareDynamicQuantizers
from mpqdm_fx.backends.xnnpack.passes.view_means import ViewMeans
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.passes.normalize.normalize_padding import NormalizePadding

__all__ = ["DECOMPOSE", "REMEDIES"]

#: On the module-level graph, before conversion: what XNNPACK does not know becomes what it knows.
#: First goes what computes nothing: a factor of one hides that a chain is constant. Then single
#: ops are written out; they meet no others' results but for attention, whose pieces stay. What
#: moves axes comes last, because earlier passes leave such moves behind.
DECOMPOSE = Pipeline(
    passes=(
        DropUnitFactors(),
        FoldConstants(),
        GatherCodes(),
        NormalizePadding(),
        DecomposeAttention(),
        DecomposeGroupNorm(),
        DecomposeLayerNorm(),
        ViewMeans(),
        DecomposeUpsample(),
        FloatScalars(),
        DivideReciprocals(),
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
