"""One part of a pipeline: quantize it, judge it, and write its programs."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.graph.layers import replace_module, weight_layers
from mpqdm_fx.graph.signature import tensor_leaves
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.quantized import QuantizedModel
from mpqdm_fx.stages import assemble, normalized

__all__ = ["Judged", "quantize_part", "side_settings", "sqnr_of", "write_program"]

logger = logging.getLogger(__name__)

Call = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A part as it is to be lowered, and how good it is.

    Attributes:
        quantized: The quantized part, or None where it stays in float.
        sqnr_db: Quantized against float on held-out calls; None if it was not tried.
    """

    quantized: QuantizedModel | None
    sqnr_db: float | None


def side_settings(config: MPQConfig) -> MPQConfig:
    """Settings of text encoders and VAE: 8-bit weights, activations as the denoiser's.

    They run once per image, so that their bytes matter less than the denoiser's and nothing is
    searched; nearest rounding to 8 bits costs less than their activations' rounding.
    """
    return MPQConfig(
        weight_bits=8,
        activation_bits=config.activation_bits,
        activation_mode=config.activation_mode,
        allocation="uniform",
        levels="uniform",
        rounding="nearest",
        refinements=0,
        propagation=0.0,
        max_rows=config.max_rows,
        seed=config.seed,
    )


def quantize_part(
    part: Part, calls: list[dict[str, Any]], config: MPQConfig, *, bound: float, **options: Any
) -> Judged:
    """Quantize a text encoder or a half of the VAE, and keep that only if it is good.

    Args:
        part: The part.
        calls: Its calls; the last quarter, at least one, judges and is not calibrated on.
        config: Settings of the denoiser; see `side_settings`.
        bound: Least signal-to-noise ratio in dB of the quantized part.
        **options: Of `quantize`: directory, resume, device, max_activations.

    Raises:
        MPQError: The part cannot be traced or quantized.
    """
    held_out = max(1, len(calls) // 4)
    known = calls[:-held_out] or calls
    quantized = quantize(part.module, side_settings(config), known, **options)
    found = sqnr_of(part.module, quantized, calls[-held_out:])
    if found >= bound:
        return Judged(quantized=quantized, sqnr_db=found)
    logger.warning(
        "%s stays in float: quantized to 8 bits it has %.1f dB on held-out inputs, less than %.1f",
        part.name, found, bound,
    )  # fmt: skip
    return Judged(quantized=None, sqnr_db=found)


def sqnr_of(reference: nn.Module, quantized: nn.Module, calls: Iterable[Call]) -> float:
    """Signal-to-noise ratio in dB of a quantized part's outputs over all calls together.

    Args:
        reference: The float part.
        quantized: The quantized one.
        calls: Keyword arguments.
    """
    expected, found = [], []
    with torch.no_grad():
        for call in calls:
            expected.append(_flat(reference(**call)))
            found.append(_flat(quantized(**call)))
    return sqnr_db(torch.cat(expected), torch.cat(found))


def _flat(output: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(output)])


def write_program(
    part: Part, quantized: QuantizedModel | None, inputs: Call, path: Path
) -> XnnpackProgram:
    """Lower one part for the shapes of one call to a file with the method `forward`.

    Args:
        part: The part.
        quantized: The quantized part, for whatever shapes it was made; None for a float program.
        inputs: Keyword arguments of a call with batch 1.
        path: File to write.

    Raises:
        LoweringError: The backend cannot run the part.
    """
    # importing the package must not load torchao
    from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float

    if quantized is None:
        graph = normalized(part.module, dict(inputs), MPQConfig())
        return lower_xnnpack_float(graph, _ordered(graph, inputs), path)
    fitted = _at_shapes(part, quantized, inputs)
    values = _ordered(fitted.rounded, inputs)
    if not fitted.ranges:
        return lower_xnnpack_float(fitted.rounded, values, path)
    return lower_xnnpack(fitted.rounded, fitted.ranges, values, path)


def _at_shapes(part: Part, quantized: QuantizedModel, inputs: Call) -> QuantizedModel:
    """The same integers and ranges in a graph of other shapes than those calibrated at."""
    signature = quantized.signature
    wanted = {name: tuple(value.shape) for name, value in tensor_leaves(dict(inputs))}
    if all(wanted.get(spec.name) == spec.shape_at(1) for spec in signature.inputs):
        return quantized
    graph = normalized(part.module, dict(inputs), quantized.settings)
    for name in weight_layers(quantized.rounded, embeddings=True):
        replace_module(graph, name, quantized.rounded.get_submodule(name))
    return assemble(
        graph,
        plan=quantized.plan,
        ranges=quantized.ranges,
        settings=quantized.settings,
        report=quantized.report,
        model_config=quantized.config,
        noise_levels=quantized.noise_levels,
    )


def _ordered(graph: fx.GraphModule, inputs: Call) -> tuple[Any, ...]:
    """Inputs in the order of the graph's placeholders."""
    given = graph.meta["signature"].normalize((), dict(inputs))
    return tuple(given[str(node.target)] for node in graph.graph.find_nodes(op="placeholder"))
