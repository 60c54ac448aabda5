"""The list of passes that put own operators into a rounded graph, in running order."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from mpqdm_fx.backends.lowbit.passes.fuse_norm_quantize import FuseNormQuantize
from mpqdm_fx.backends.lowbit.passes.move_layouts import MoveLayouts
from mpqdm_fx.backends.lowbit.passes.reuse_codes import ReuseCodes
from mpqdm_fx.backends.lowbit.passes.scale_mixed_norms import ScaleMixedNorms
from mpqdm_fx.backends.lowbit.passes.use_mixed_layers import UseMixedLayers
from mpqdm_fx.backends.lowbit.passes.use_mixed_norms import UseMixedNorms
from mpqdm_fx.backends.xnnpack.passes.linearize_pointwise import LinearizePointwise
from mpqdm_fx.backends.xnnpack.pipelines import DECOMPOSE
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.records.activations import StaticActivation

__all__ = ["own_operators"]


def own_operators(
    blobs: Mapping[str, Tensor],
    static: Mapping[str, Sequence[StaticActivation]] | None = None,
    left: Collection[str] = (),
) -> Pipeline:
    """Layers first, then the norms that they read, before XNNPACK's passes write those out.

    XNNPACK runs 1x1 convolutions as linear layers over pixels that lie channels last; written as
    such they need no permutation between own layers. Permutations move when all is written in
    operators that stay: upsampling brings some of its own. Codes and their readers, and a norm and
    its quantizer, meet only behind that.

    Args:
        blobs: Weight blob by layer name.
        static: Of layers with fixed ranges, those of each call; all others are dynamic.
        left: Names of layers that XNNPACK runs in float, or on ranges chosen at run time.
    """
    return Pipeline(
        passes=(
            UseMixedLayers(blobs=blobs, static=static or {}),
            UseMixedNorms(),
            LinearizePointwise(layers=frozenset(left)),
            *DECOMPOSE.passes,
            MoveLayouts(),
            ScaleMixedNorms(),
            ReuseCodes(),
            FuseNormQuantize(),
        )
    )
