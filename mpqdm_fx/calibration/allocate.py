"""From statistics to decisions: activation ranges, bits of every channel, what stays in float."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from mpqdm_fx.calibration.pinning import FIRST_LAYER, pinned_layers
from mpqdm_fx.calibration.statistics import LayerStatistics, TensorStatistics
from mpqdm_fx.config import Levels, MPQConfig
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.layers import WeightLayer, weight_layers, weight_rows
from mpqdm_fx.numerics.allocation import PROMOTED_FRACTIONS, omq_search, output_errors
from mpqdm_fx.numerics.codebook import quantize_codebook
from mpqdm_fx.numerics.grids import dequantize, quantize_uniform
from mpqdm_fx.numerics.halves import stored_float_bits
from mpqdm_fx.numerics.outliers import kurtosis, smoothing_factors
from mpqdm_fx.numerics.packing import storage_bits
from mpqdm_fx.numerics.ranges import fake_quantize, search_range
from mpqdm_fx.plan import (
    FLOAT_REASON,
    ActivationRange,
    BitPlan,
    FloatTensor,
    LayerActivation,
    LayerPlan,
)

__all__ = ["allocate", "float_tensors", "measure_layers", "search_ranges"]

PINNED_BITS = 8
_QUANTIZE = {"uniform": quantize_uniform, "codebook": quantize_codebook}
MAX_TABLE_SHARE = 1.0  # of the bits of a layer's codes, for its codebook tables
OUTPUT_BITS = 8  # a static integer kernel writes int8, whatever width it reads


def search_ranges(
    graph_module: fx.GraphModule, statistics: Mapping[str, LayerStatistics], settings: MPQConfig
) -> dict[str, LayerActivation]:
    """Static range of every weight layer's input and output, by least squared error.

    The layers that read the noisy sample get none, so they run in float (with rounded weights):
    late in a denoising run the noise in the sample is smaller than one step of a static 8-bit
    range over all timesteps, and rounding the sample erases what the model is asked to predict.

    Args:
        graph_module: Normalized graph.
        statistics: Statistics by layer.
        settings: The run's settings; `activation_bits` holds for the inputs.

    Returns:
        Ranges by layer. Layers that read the same tensor get the same range.
    """
    reads_sample = {name for name, why in pinned_layers(graph_module).items() if why == FIRST_LAYER}
    found: dict[tuple[int, int], ActivationRange] = {}

    def search(tensor: TensorStatistics, bits: int) -> ActivationRange:
        key = (id(tensor), bits)
        if key not in found:
            scale, zero_point = search_range(tensor.samples, tensor.minimum, tensor.maximum, bits)
            found[key] = ActivationRange(scale=scale, zero_point=zero_point, bits=bits)
        return found[key]

    return {
        name: LayerActivation(
            input=search(seen.input, settings.activation_bits),
            output=search(seen.output, OUTPUT_BITS),
        )
        for name, seen in tqdm(statistics.items(), desc="ranges", unit="layer", disable=None)
        if name not in reads_sample
    }


def allocate(
    graph_module: fx.GraphModule,
    statistics: Mapping[str, LayerStatistics],
    ranges: Mapping[str, LayerActivation],
    settings: MPQConfig,
) -> tuple[BitPlan, dict[str, Tensor]]:
    """Decide the bits of every channel.

    Args:
        graph_module: Normalized graph.
        statistics: Statistics by layer.
        ranges: Activation ranges by layer.
        settings: The run's settings.

    Returns:
        The plan, and by layer the importance of each row entry (its mean square, [K] or [O, K]),
        which the rounding must use too.

    Raises:
        CalibrationError: A weight holds NaN or infinity.
    """
    layers = weight_layers(graph_module, embeddings=True)
    pinned = pinned_layers(graph_module)
    plans: list[LayerPlan] = []
    importance: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for name, layer in tqdm(layers.items(), desc="bits", unit="layer", disable=None):
        _check_weight(layer)
        rule = settings.override_for(name)
        if rule is not None and rule.skip:
            skipped[name] = f"override {rule.pattern!r}"
            continue
        seen = statistics.get(name)
        if seen is not None:
            importance[name] = _importance(layer, seen)
        reason, bits = pinned.get(name), PINNED_BITS
        if rule is not None and rule.weight_bits is not None:
            reason, bits = f"override {rule.pattern!r}", rule.weight_bits
        if reason is not None or seen is None or name not in ranges:
            plans.append(_fixed(layer, bits, reason or "not reached by calibration"))
        else:
            plans.append(_decide(layer, seen, ranges[name].input, importance[name], settings))
    plan = BitPlan(
        layers=tuple(plans),
        floats=float_tensors(graph_module, {entry.name for entry in plans}, skipped),
        activation_bits=settings.activation_bits,
    )
    return plan, importance


def _check_weight(layer: WeightLayer) -> None:
    weight = weight_rows(layer.module)
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise CalibrationError(
            f"{layer.name} ({type(layer.module).__name__}): {bad} of {weight.numel()} weights are "
            f"NaN or infinite; repair the checkpoint"
        )


def _importance(layer: WeightLayer, seen: LayerStatistics) -> Tensor:
    moment = seen.second_moment  # [G, K]
    if len(moment) == 1:
        return moment[0]
    channels = weight_rows(layer.module).shape[0]
    return moment.repeat_interleave(channels // len(moment), dim=0)


def _fixed(layer: WeightLayer, bits: int, reason: str) -> LayerPlan:
    shape = tuple(layer.weight.shape)
    return LayerPlan(
        name=layer.name,
        kind=type(layer.module).__name__,
        shape=shape,
        bits=(bits,) * shape[0],
        reason=reason,
    )


def _decide(
    layer: WeightLayer,
    seen: LayerStatistics,
    range_: ActivationRange,
    importance: Tensor,
    settings: MPQConfig,
) -> LayerPlan:
    """Bits and levels of one layer, by its own output error on the sampled rows."""
    weight = weight_rows(layer.module).float()
    rows = seen.rows
    quantized_rows = fake_quantize(rows, range_.scale, range_.zero_point, range_.bits)
    levels: Levels = "uniform"
    if settings.levels == "codebook" and _codebook_helps(
        layer, importance, rows, quantized_rows, settings.weight_bits
    ):
        levels = "codebook"
    choice = omq_search(
        weight,
        rows,
        quantized_rows,
        _outlier_score(layer, weight, rows),
        settings.weight_bits,
        partial(_QUANTIZE[levels], importance=importance),
        fractions=PROMOTED_FRACTIONS if settings.allocation == "omq" else (0.0,),
    )
    return LayerPlan(
        name=layer.name,
        kind=type(layer.module).__name__,
        shape=tuple(layer.weight.shape),
        bits=tuple(choice.bits.tolist()),
        levels=levels,
        fraction=choice.fraction,
    )


def _codebook_helps(
    layer: WeightLayer, importance: Tensor, rows: Tensor, quantized_rows: Tensor, bits: int
) -> bool:
    """Whether a codebook lowers the layer's output error, with a table that its rows can bear.

    A table of 2^b int8 values is paid per channel: 0.15 bits a weight for 4 bits over 864 weights,
    5.3 over 24. Layers whose table would take more bits than their codes stay uniform. (Stricter
    rules were tried on the bundled model and were worse: half as many bits cost 1 dB at W3A6, and
    6.02 dB per bit of table cost as much; the short rows of attention and of the shortcuts weigh
    little in bytes and much in quality.)
    """
    weight = weight_rows(layer.module).float()
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
    if rows.shape[1] != 1:
        return kurtosis(weight)
    channels = layer.weight.shape[1]
    activation_max = rows.abs().amax(dim=(0, 1)).reshape(channels, -1).amax(dim=1)
    weight_max = weight.abs().amax(dim=0).reshape(channels, -1).amax(dim=1)
    factors = smoothing_factors(activation_max, weight_max)
    smoothed = weight.reshape(len(weight), channels, -1) * factors[None, :, None]
    return kurtosis(smoothed.flatten(1))


def measure_layers(
    graph_module: fx.GraphModule,
    rounded: fx.GraphModule,
    statistics: Mapping[str, LayerStatistics],
    ranges: Mapping[str, LayerActivation],
) -> dict[str, float]:
    """Output SQNR in dB of each layer on its calibration rows, input and weight quantized."""
    result = {}
    for name, layer in weight_layers(graph_module).items():
        if name not in statistics:
            continue
        rows = quantized_rows = statistics[name].rows
        if name in ranges:
            range_ = ranges[name].input
            quantized_rows = fake_quantize(rows, range_.scale, range_.zero_point, range_.bits)
        weight = weight_rows(layer.module).float()
        test = weight_rows(rounded.get_submodule(name)).float()
        noise = float(output_errors(weight, test, rows, quantized_rows).sum())
        signal = float(output_errors(weight, torch.zeros_like(weight), rows, rows).sum())
        result[name] = 10 * math.log10(signal / noise) if noise and signal else math.inf
    return result


def float_tensors(
    graph_module: fx.GraphModule, quantized: set[str], skipped: Mapping[str, str]
) -> tuple[FloatTensor, ...]:
    """All parameters and buffers that stay in floating point, with the reason.

    Args:
        graph_module: Normalized graph.
        quantized: Names of the quantized layers.
        skipped: Reason by name of a layer that an override leaves in float.
    """
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
    entries = []
    for name, tensor in graph_module.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in quantized:
            continue
        module = graph_module.get_submodule(owner)
        is_weight = leaf == "weight" and isinstance(module, kinds)
        reason = skipped.get(owner, f"{type(module).__name__} is not quantized")
        entries.append(
            FloatTensor(
                name=name,
                numel=tensor.numel(),
                bits=stored_float_bits(tensor),
                is_weight=is_weight,
                reason=reason if is_weight else FLOAT_REASON,
            )
        )
    return tuple(entries)
