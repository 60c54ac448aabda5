"""Graph passes: one pass, one file, one class, named by a verb."""

from mpqdm_fx.passes.normalize.drop_assertions import DropAssertions
from mpqdm_fx.passes.normalize.drop_dropout import DropDropout
from mpqdm_fx.passes.normalize.drop_noop_casts import DropNoopCasts
from mpqdm_fx.passes.normalize.fold_batch_norm import FoldBatchNorm
from mpqdm_fx.passes.normalize.normalize_padding import NormalizePadding
from mpqdm_fx.passes.normalize.split_geglu import SplitGeglu
from mpqdm_fx.passes.normalize.split_skip_concat import SplitSkipConcat
from mpqdm_fx.passes.normalize.subpixel_convolutions import SubpixelConvolutions
from mpqdm_fx.passes.pipelines import NORMALIZE, QUANTIZE
from mpqdm_fx.passes.quantize.assign_qconfigs import AssignQConfigs
from mpqdm_fx.passes.quantize.carry_error_lane import CarryErrorLane
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.passes.quantize.round_weights import RoundWeights
from mpqdm_fx.passes.quantize.scale_inputs import ScaleInputs
from mpqdm_fx.passes.registry import graph_pass, known_passes, name_of, parse

__all__ = [
    "NORMALIZE",
    "QUANTIZE",
    "AssignQConfigs",
    "CarryErrorLane",
    "DropAssertions",
    "DropDropout",
    "DropNoopCasts",
    "FoldBatchNorm",
    "NormalizePadding",
    "QuantizeActivations",
    "RoundWeights",
    "ScaleInputs",
    "SplitGeglu",
    "SplitSkipConcat",
    "SubpixelConvolutions",
    "graph_pass",
    "known_passes",
    "name_of",
    "parse",
]
