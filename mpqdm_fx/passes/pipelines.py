"""The road of every graph: lists of passes in running order. A backend has lists of its own."""

from mpqdm_fx.passes.base import GraphPass
from mpqdm_fx.passes.normalize.drop_assertions import DropAssertions
from mpqdm_fx.passes.normalize.drop_dropout import DropDropout
from mpqdm_fx.passes.normalize.drop_noop_casts import DropNoopCasts
from mpqdm_fx.passes.normalize.fold_batch_norm import FoldBatchNorm
from mpqdm_fx.passes.normalize.normalize_padding import NormalizePadding
from mpqdm_fx.passes.normalize.split_geglu import SplitGeglu
from mpqdm_fx.passes.normalize.split_skip_concat import SplitSkipConcat
from mpqdm_fx.passes.normalize.subpixel_convolutions import SubpixelConvolutions
from mpqdm_fx.passes.quantize.assign_qconfigs import AssignQConfigs
from mpqdm_fx.passes.quantize.carry_error_lane import CarryErrorLane
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.passes.quantize.round_weights import RoundWeights
from mpqdm_fx.passes.quantize.scale_inputs import ScaleInputs

__all__ = ["NORMALIZE", "QUANTIZE"]

#: On a traced graph, before anything is quantized. First goes what only hides patterns, then
#: weights are merged, then layers are split.
NORMALIZE: tuple[GraphPass, ...] = (
    DropAssertions(),  # checks are extra users of what they look at
    DropNoopCasts(),  # casts stand between layers that belong together
    DropDropout(),  # so does dropout
    SubpixelConvolutions(),  # transposed layers become such as all later passes and kernels know
    FoldBatchNorm(),  # before layers are split: it belongs to one of them
    SplitGeglu(),  # gate and value have ranges of their own
    SplitSkipConcat(),  # so do the halves of a skip
    NormalizePadding(),  # last: an op of its own would stand between concatenations and layers
)

#: On the normalized graph, each with what calibration or a plan gave, in running order.
QUANTIZE: tuple[type[GraphPass], ...] = (
    AssignQConfigs,  # what was decided, layer by layer, in `node.meta`
    ScaleInputs,  # channels nearer to one size, where that was chosen
    QuantizeActivations,  # quantizers where layers read, and write
    CarryErrorLane,  # a twin for every node that an error reaches: what the sweep walks
    RoundWeights,  # nearest levels alone; the sweep rounds layer by layer instead
)
