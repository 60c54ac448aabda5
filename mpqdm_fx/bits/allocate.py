"""From statistics to decisions: bits of every channel of a layer, what stays in float."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.pinning import EMBEDDING, pinned_layers
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import WeightLayer, is_pointwise, weight_layers, weight_rows
from mpqdm_fx.numerics.bits.allocation import omq_search, output_errors
from mpqdm_fx.numerics.lazy_tensor import row_blocks
from mpqdm_fx.numerics.levels.codebook import quantize_codebook
from mpqdm_fx.numerics.levels.grids import dequantize
from mpqdm_fx.numerics.levels.level_sets import LEVEL_SETS
from mpqdm_fx.numerics.levels.packing import storage_bits
from mpqdm_fx.numerics.solve.outliers import kurtosis, smoothing_factors
from mpqdm_fx.numerics.solve.scales import quantize_uniform
from mpqdm_fx.records.config import Levels, MPQConfig
from mpqdm_fx.records.plan import LayerPlan

__all__ = [
    "Limits",
    "check_weight",
    "decide_layer",
    "even_levels",
    "few_levels",
    "fixed_plan",
    "layer_limits",
]

PINNED_BITS = 8
_CHECKED_NUMBERS = 1 << 22  # of a weight, at once
FEW_LEVELS = 8
"""With fewer noise levels among the calls, time layers are not for the budget to decide."""
MAX_TABLE_SHARE = 1.0  # of the bits of a layer's codes, for its codebook tables


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Layers whose bits are not for the budget to decide.

    Attributes:
        fixed: Bits and reason by layer name.
        skipped: Reason by name of a layer that stays in float.
    """

    fixed: Mapping[str, tuple[int, str]]
    skipped: Mapping[str, str]


def layer_limits(graph_module: fx.GraphModule, settings: MPQConfig) -> Limits:
    """What overrides and the recipe fix.

    With `allocation="measured"` every layer competes for bits (but see `few_levels`); else the
    first and the last layer, the time and class embeddings and the embedding tables have 8 bits, as
    in MPQ-DM.

    Args:
        graph_module: Normalized graph.
        settings: The run's settings.
    """
    fixed: dict[str, tuple[int, str]] = {}
    skipped: dict[str, str] = {}
    pinned = {} if settings.allocation == "measured" else pinned_layers(graph_module)
    for name in weight_layers(graph_module, embeddings=True):
        rule = settings.override_for(name)
        if rule is not None and rule.skip:
            skipped[name] = f"override {rule.pattern!r}"
        elif rule is not None and rule.weight_bits is not None:
            fixed[name] = (rule.weight_bits, f"override {rule.pattern!r}")
        elif name in pinned:
            fixed[name] = (PINNED_BITS, pinned[name])
    return Limits(fixed=fixed, skipped=skipped)


def few_levels(
    limits: Limits, graph_module: fx.GraphModule, settings: MPQConfig, groups: NoiseGroups
) -> Limits:
    """Limits under which time layers keep 8 bits where calls have few noise levels.

    Such a layer reads one row a level. Feedback and bias fit a handful of rows at any width, so its
    bits look worthless, and at all other levels it errs: `digits` with 4 bits, calibrated at 4
    steps, has 49.4 dB at these and 30.9 at 20 steps; with 8 bits here 48.7 and 43.8. The default
    budget holds 8 bits for them; a budget that is given is shared as it is measured.

    Args:
        limits: Of `layer_limits`.
        graph_module: Normalized graph.
        settings: The run's settings.
        groups: Noise levels of the calls.
    """
    has_budget = settings.effective_bits is not None or settings.weight_bytes is not None
    told = groups.levels.argument is not None and groups.count < FEW_LEVELS
    if settings.allocation != "measured" or has_budget or not told:
        return limits
    layers = weight_layers(graph_module)  # tables of classes are told no noise level
    kept = {
        name: (PINNED_BITS, f"{reason}, calibrated at {groups.count} noise levels")
        for name, reason in pinned_layers(graph_module).items()
        if reason == EMBEDDING and name in layers and name not in limits.skipped
    }
    return Limits(fixed={**kept, **limits.fixed}, skipped=limits.skipped)


def check_weight(layer: WeightLayer) -> None:
    """Refuse a layer whose weight cannot be rounded.

    Raises:
        CalibrationError: It holds NaN or infinity.
    """
    blocks = row_blocks(layer.weight.detach(), _CHECKED_NUMBERS)
    bad = sum(int((~torch.isfinite(block)).sum()) for block in blocks)
    if bad:
        raise CalibrationError(
            f"{layer.name} ({type(layer.module).__name__}): {bad} of {layer.weight.numel()} "
            f"weights are NaN or infinite; repair the checkpoint"
        )


def fixed_plan(
    layer: WeightLayer, bits: int, reason: str | None, levels: Levels = "uniform"
) -> LayerPlan:
    """A plan of equal bits; the reason says why a layer is off the budget, None that it is not."""
    shape = tuple(layer.weight.shape)
    return LayerPlan(
        name=layer.name,
        kind=type(layer.module).__name__,
        shape=shape,
        bits=(bits,) * shape[0],
        levels=levels,
        reason=reason,
    )


def even_levels(layer: WeightLayer, settings: MPQConfig) -> Levels:
    """`"int4"` for linear layers and 1x1 convolutions if the settings say so, else `"uniform"`."""
    return "int4" if settings.levels == "int4" and is_pointwise(layer.module) else "uniform"


def decide_layer(
    layer: WeightLayer, rows: Tensor, quantized_rows: Tensor, settings: MPQConfig
) -> LayerPlan:
    """Bits and levels of one layer by its own output error: `"uniform"` and `"omq"`.

    Args:
        layer: The float layer.
        rows: Float input rows, [P, K] or [P, G, K].
        quantized_rows: The same rows as the quantized model has them.
        settings: The run's settings.
    """
    weight = weight_rows(layer.module).float()
    importance = _importance(len(weight), quantized_rows)
    levels = even_levels(layer, settings)
    if settings.levels == "codebook" and _codebook_helps(
        weight, importance, rows, quantized_rows, settings.weight_bits
    ):
        levels = "codebook"
    bits, fraction = [settings.weight_bits] * len(weight), 0.0
    if settings.allocation == "omq":
        choice = omq_search(
            weight,
            rows,
            quantized_rows,
            _outlier_score(layer, weight, rows),
            settings.weight_bits,
            partial(LEVEL_SETS[levels].quantize, importance=importance),
        )
        bits, fraction = choice.bits.tolist(), choice.fraction
    return LayerPlan(
        name=layer.name,
        kind=type(layer.module).__name__,
        shape=tuple(layer.weight.shape),
        bits=tuple(bits),
        levels=levels,
        fraction=fraction,
    )


def _importance(channels: int, rows: Tensor) -> Tensor:
    """Mean square of each row entry: [K], or [O, K] for a grouped layer."""
    moment = rows.square().mean(dim=0)
    if moment.dim() == 1 or len(moment) == 1:
        return moment.reshape(-1)
    return moment.repeat_interleave(channels // len(moment), dim=0)


def _codebook_helps(
    weight: Tensor, importance: Tensor, rows: Tensor, quantized_rows: Tensor, bits: int
) -> bool:
    """Whether a codebook lowers the layer's output error, with a table that its rows can bear.

    A table of 2^b int8 values is paid per channel: 0.15 bits a weight for 4 bits over 864 weights,
    5.3 over 24. Layers whose table would take more bits than their codes stay uniform. (Stricter
    rules were tried on the bundled model and were worse: half as many bits cost 1 dB at W3A6, and
    6.02 dB per bit of table cost as much; the short rows of attention and of the shortcuts weigh
    little in bytes and much in quality.)
    """
    widths = torch.full((len(weight),), bits)
    storage = storage_bits((len(weight), weight.shape[1]), widths, "codebook")
    if storage.tables > MAX_TABLE_SHARE * storage.codes:
        return False
    uniform, fitted = (
        output_errors(
            weight, dequantize(*quantize(weight, widths, importance)), rows, quantized_rows
        ).sum()
        for quantize in (quantize_uniform, quantize_codebook)
    )
    return bool(fitted < uniform)


def _outlier_score(layer: WeightLayer, weight: Tensor, rows: Tensor) -> Tensor:
    """Kurtosis of the smoothed rows; grouped layers are ranked unsmoothed.

    Smoothing scales weights per input channel, which a grouped convolution does not share.
    """
    if rows.dim() == 3 and rows.shape[1] != 1:
        return kurtosis(weight)
    channels = layer.weight.shape[1]
    activation_max = rows.abs().reshape(len(rows), channels, -1).amax(dim=(0, 2))
    weight_max = weight.abs().amax(dim=0).reshape(channels, -1).amax(dim=1)
    factors = smoothing_factors(activation_max, weight_max)
    smoothed = weight.reshape(len(weight), channels, -1) * factors[None, :, None]
    return kurtosis(smoothed.flatten(1))
