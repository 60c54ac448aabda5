"""Which samples are probed, and how many at once: parts of calls that fit in memory."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.calling import split_batch
from mpqdm_fx.graph.signature import Signature, tensor_leaves
from mpqdm_fx.run.cost import bind_sizes, value_bytes

__all__ = ["PROBED_BYTES", "probed_parts"]

PROBED_BYTES = 2**30
"""Of activations kept for one backward pass; one sample may need more."""


def probed_parts(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    weights: Sequence[Tensor] | None,
    samples: int,
    groups: NoiseGroups,
) -> list[tuple[dict[str, Any], Tensor]]:
    """Split calls into parts of few samples and take evenly as many as are wanted.

    Evenly over the noise levels first: calls along runs repeat their levels, and every so many of
    them may all have the same one.

    Args:
        graph_module: Normalized float graph.
        calls: Tensors by placeholder name.
        weights: Importance of each sample, one tensor [B] per call; None for all alike.
        samples: How many samples are wanted.
        groups: Groups of noise levels.

    Returns:
        Inputs of each part, and the importance of its samples [b].

    Raises:
        CalibrationError: The weights do not fit the calls.
    """
    signature: Signature = graph_module.meta["signature"]
    parts: list[tuple[dict[str, Any], Tensor]] = []
    for index, call in enumerate(calls):
        size = max(1, min(samples, PROBED_BYTES // max(1, _sample_bytes(graph_module, call))))
        pieces = [dict(call)]
        if signature.batch_range is not None:
            low, high = signature.batch_range
            size = max(low, size if high is None else min(size, high))
            narrow = dataclasses.replace(signature, batch_range=(low, size))
            pieces = split_batch(narrow, call)
        counts = [_samples(signature, piece) for piece in pieces]
        importance = torch.ones(sum(counts)) if weights is None else weights[index].float().cpu()
        if importance.shape != (sum(counts),) or not bool(
            (importance.isfinite() & (importance >= 0)).all()
        ):
            raise CalibrationError(
                f"weights of call {index} have shape {tuple(importance.shape)}; give one number "
                f"that is finite and not negative for each of its {sum(counts)} samples"
            )
        parts += zip(pieces, torch.split(importance, counts), strict=True)
    mean = sum(len(importance) for _, importance in parts) / len(parts)
    count = min(len(parts), max(1, math.ceil(samples / mean)))
    level = [float(groups.of_samples(piece).double().mean()) for piece, _ in parts]
    order = sorted(range(len(parts)), key=level.__getitem__)
    picks = [order[(2 * place + 1) * len(parts) // (2 * count)] for place in range(count)]
    return [parts[place] for place in sorted(picks)]


def _samples(signature: Signature, call: Mapping[str, Any]) -> int:
    """Batch size of a call."""
    specs = {spec.name: spec for spec in signature.inputs if spec.batch_axis == 0}
    for name, tensor in tensor_leaves(call):
        if name in specs and tensor.ndim > 1:
            return len(tensor) // specs[name].batch_multiple
    return signature.batch


def _sample_bytes(graph_module: fx.GraphModule, call: Mapping[str, Any]) -> int:
    """Bytes of all activations of one sample."""
    sizes = bind_sizes(graph_module, call)
    total = sum(value_bytes(node, sizes) for node in graph_module.graph.nodes)
    return total // _samples(graph_module.meta["signature"], call)
