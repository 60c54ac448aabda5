"""Passes that only own kernels need: one pass, one file, one class, named by a verb."""

from mpqdm_fx.backends.lowbit.passes.fuse_norm_quantize import FuseNormQuantize
from mpqdm_fx.backends.lowbit.passes.move_layouts import MoveLayouts
from mpqdm_fx.backends.lowbit.passes.reuse_codes import ReuseCodes
from mpqdm_fx.backends.lowbit.passes.scale_mixed_norms import ScaleMixedNorms
from mpqdm_fx.backends.lowbit.passes.use_mixed_layers import UseMixedLayers
from mpqdm_fx.backends.lowbit.passes.use_mixed_norms import UseMixedNorms

__all__ = [
    "FuseNormQuantize",
    "MoveLayouts",
    "ReuseCodes",
    "ScaleMixedNorms",
    "UseMixedLayers",
    "UseMixedNorms",
]
