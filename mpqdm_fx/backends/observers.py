"""torch.ao observers that do not observe: they hand over what was decided before.

Weights are on their grid already (`RoundWeights`), so the scale is known and the integers are a
division away. The observer only makes sure that this is so: a weight that was changed after
rounding, or never rounded, must not be rounded silently a second time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.backends.ao import ObserverBase
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.layers import WEIGHT_LAYERS, weight_layers
from mpqdm_fx.passes.quantize.assign_qconfigs import assigned_qconfigs
from mpqdm_fx.records.activations import Activation

__all__ = [
    "GridObserver",
    "GridWeightObserver",
    "UnresolvedRangeObserver",
    "WeightGrid",
    "check_names",
    "given_activations",
    "weight_grids",
]

# Symmetric int8: -128 has no positive counterpart and no level uses it.
QUANT_MIN, QUANT_MAX = -127, 127

_REMEDY = "give a rounded graph, such as `QuantizedModel.rounded`"


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightGrid:
    """The int8 grid of one layer's weight: `weight == codes * scale`, per output channel.

    Attributes:
        layer: Fully qualified name of the layer.
        scale: float32 [out_channels], positive.
        four_bit: Whether the codes are to be within -8..7, which XNNPACK stores at four bits.
    """

    layer: str
    scale: Tensor
    four_bit: bool = False

    @property
    def quant_min(self) -> int:
        """Smallest code."""
        return -8 if self.four_bit else QUANT_MIN

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return 7 if self.four_bit else QUANT_MAX

    def codes(self, weight: Tensor) -> Tensor:
        """Integer codes of a weight that lies on this grid.

        Args:
            weight: [out_channels, ...] in any floating dtype.

        Returns:
            int8, the weight's shape, within quant_min..quant_max.

        Raises:
            ConfigError: The weight is off the grid; names the layer and the channel.
        """
        if weight.shape[0] != self.scale.shape[0]:
            raise ConfigError(
                f"{self.layer}: weight has {weight.shape[0]} output channels, its scale "
                f"{self.scale.shape[0]}; {_REMEDY}"
            )
        rows = weight.detach().flatten(1)
        # codes * scale is exact in float32, and so is the division that undoes it.
        codes = (rows.float() / self.scale[:, None]).round()
        restored = (codes * self.scale[:, None]).to(weight.dtype)
        fits = (restored == rows) & (codes >= self.quant_min) & (codes <= self.quant_max)
        if not bool(fits.all()):
            channel = int((~fits).any(dim=1).nonzero()[0])
            raise ConfigError(
                f"{self.layer}: its weight (shape {tuple(weight.shape)}) is not on the int8 grid "
                f"of its scales, first in output channel {channel}; {_REMEDY}, and do not change "
                f"its weights (batch-norm folding does)"
            )
        return codes.to(torch.int8).reshape(weight.shape)


def weight_grids(graph_module: fx.GraphModule) -> dict[str, WeightGrid]:
    """Grids of the rounded weight layers of a graph, by layer name in graph order.

    Embeddings are left out: no backend multiplies them, they stay in float on their grid.

    Args:
        graph_module: A module-level graph after `RoundWeights`.

    Raises:
        ConfigError: No layer carries `weight_scale`, or one carries scales that cannot be.
    """
    grids = {}
    layers = weight_layers(graph_module)
    for name, layer in layers.items():
        scale = getattr(layer.module, "weight_scale", None)
        if scale is None:
            continue
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ConfigError(f"{name}: weight_scale holds values that are not positive and finite")
        grids[name] = WeightGrid(layer=name, scale=scale.detach())
        grids[name].codes(_weight(layer.module))
    if not grids:
        names = ", ".join(kind.__name__ for kind in WEIGHT_LAYERS)
        raise ConfigError(
            f"none of the graph's {len(layers)} weight layers ({names}) carries weight_scale; "
            f"{_REMEDY}"
        )
    return grids


def check_names(activations: Mapping[str, object], grids: Mapping[str, object]) -> None:
    """Refuse ranges of layers that a graph did not round.

    Args:
        activations: What the names are of, by layer name.
        grids: Rounded layers by name; see `weight_grids`.

    Raises:
        ConfigError: A name is no rounded convolution or linear layer.
    """
    for name in activations:
        if name not in grids:
            raise ConfigError(
                f"ranges name {name!r}, which is no rounded convolution or linear layer of the "
                f"graph; {_REMEDY} with the ranges of the same model"
            )


def given_activations(
    graph_module: fx.GraphModule, ranges: Mapping[str, Activation] | Literal["observe"] | None
) -> Mapping[str, Activation] | None:
    """The activations that a door goes by; None if observers are to find ranges.

    Args:
        graph_module: A rounded graph.
        ranges: What the door was given; None for what the graph says of its layers.

    Raises:
        ConfigError: `ranges` are neither the word nor ranges by layer; or are left out, and the
            graph says nothing.
    """
    if ranges is None:
        qconfigs = assigned_qconfigs(graph_module)
        if not qconfigs:
            raise ConfigError(
                "the graph says nothing of its layers' activations: give their ranges, or run "
                "`passes.AssignQConfigs` on it"
            )
        return {name: q.activation for name, q in qconfigs.items() if q.activation is not None}
    if not isinstance(ranges, Mapping) and ranges != "observe":
        raise ConfigError(
            f"ranges={ranges!r}: give the ranges that were found (`QuantizedModel.ranges`), or "
            f'"observe" to calibrate anew on all of the data'
        )
    return ranges if isinstance(ranges, Mapping) else None


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


class GridObserver:
    """What the weight observers of FX mode and of PT2E have in common.

    Attributes:
        grid: Grid of the layer that uses this observer.
    """

    ch_axis = 0
    qscheme = torch.per_channel_symmetric
    grid: WeightGrid

    def forward(self, x: Tensor) -> Tensor:
        """Check that `x` lies on the grid and return it.

        Raises:
            ConfigError: It does not.
        """
        self.grid.codes(x)
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scales, float32 [out_channels], and zero points, int64 [out_channels], all 0."""
        return self.grid.scale, torch.zeros(self.grid.scale.shape, dtype=torch.int64)


class GridWeightObserver(GridObserver, ObserverBase):
    """Weight observer for FX mode: the grid's scales, zero point 0, and a check.

    Args:
        grid: Grid of the layer that uses this observer.
        dtype: Always `torch.qint8`; torch.ao passes it again.
        **kwargs: What torch.ao passes to every observer, unused.
    """

    quant_min, quant_max = QUANT_MIN, QUANT_MAX

    def __init__(self, grid: WeightGrid, dtype: torch.dtype = torch.qint8, **kwargs: Any) -> None:
        super().__init__(dtype=dtype)
        self.grid = grid


class UnresolvedRangeObserver(ObserverBase):
    """Stands where a fixed activation range will be put by `torch_ao.set_ranges`.

    A QConfig has one `activation` for a layer's input and its output; only after `prepare_fx` can
    be seen which of the two an observer watches.

    Args:
        layer: Fully qualified name of the layer.
        **kwargs: What torch.ao passes to every observer, unused.
    """

    qscheme = torch.per_tensor_affine
    quant_min, quant_max = 0, 255

    def __init__(self, layer: str, dtype: torch.dtype = torch.quint8, **kwargs: Any) -> None:
        super().__init__(dtype=dtype)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def calculate_qparams(self, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{self.layer}: its activation ranges were not put into the prepared graph; call "
            f"mpqdm_fx.backends.torch_ao.set_ranges(prepared, ranges) between prepare_fx and "
            f"convert_fx"
        )
