"""Which axes of the inputs are the batch, and how to export with that axis free.

torch.export specialises an axis of size 1, and a size that another axis has by chance; so the
example is repeated to a batch size that no axis has. What is varied together is only a proposal:
the export itself proves that the graph holds for every size in the range, or refuses.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from mpqdm_fx.graph.signature import Signature, tensor_leaves

__all__ = ["BatchPlan", "batch_plans", "initial_range", "is_specialized", "refine_range"]

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """A proposal: which inputs vary with the batch, and the batch size to export with.

    Attributes:
        multiples: Input name to k, where the leading axis has size k times the batch.
        example_batch: Batch size of the example inputs.
        export_batch: Batch size to repeat them to.
    """

    multiples: Mapping[str, int]
    example_batch: int
    export_batch: int

    def tile(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Repeat the samples of every batched tensor up to ``export_batch``."""
        leaves, spec = pytree.tree_flatten(dict(call))
        names = iter([name for name, _ in tensor_leaves(call)])
        tiled = [self._tile(v, next(names)) if isinstance(v, torch.Tensor) else v for v in leaves]
        return dict(pytree.tree_unflatten(tiled, spec))

    def _tile(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if name not in self.multiples:
            return tensor
        rows = torch.arange(self.export_batch, device=tensor.device) % self.example_batch
        samples = tensor.reshape(self.example_batch, self.multiples[name], *tensor.shape[1:])
        return samples[rows].flatten(0, 1)

    def dynamic_shapes(
        self, call: Mapping[str, Any], batch_range: tuple[int, int | None]
    ) -> dict[str, Any]:
        """Return the ``dynamic_shapes`` of torch.export for the keyword arguments ``call``."""
        low, high = batch_range
        batch = Dim("batch", min=low, max=high) if high else Dim("batch", min=low)
        return {name: self._shapes(value, name, batch) for name, value in call.items()}

    def _shapes(self, value: Any, name: str, batch: Any) -> Any:
        if isinstance(value, torch.Tensor):
            multiple = self.multiples.get(name)
            if multiple is None:
                return None
            return {0: batch if multiple == 1 else multiple * batch}
        if isinstance(value, Mapping):
            return {k: self._shapes(v, f"{name}.{k}", batch) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._shapes(v, f"{name}.{i}", batch) for i, v in enumerate(value)])
        return None


def batch_plans(signature: Signature) -> Iterator[BatchPlan]:
    """Yield proposals, the likeliest first.

    Inputs whose leading axis equals the batch vary with it; then also inputs with k rows per sample
    (video models take one prompt per frame); then all but one (an axis of that size by chance).
    """
    batch = signature.batch
    equal = {s.name: 1 for s in signature.inputs if s.shape and s.shape[0] == batch}
    if batch < 1 or not equal:
        return
    several = {
        s.name: s.shape[0] // batch
        for s in signature.inputs
        if len(s.shape) > 1 and s.shape[0] > batch and s.shape[0] % batch == 0
    }
    proposals = [equal]
    proposals += [
        equal | {name: m for name, m in several.items() if m == k}
        for k in sorted(set(several.values()))
    ]
    proposals += [{n: m for n, m in equal.items() if n != name} for name in list(equal)[1:]]
    for multiples in proposals:
        yield BatchPlan(
            multiples=multiples, example_batch=batch, export_batch=_free_size(signature)
        )


def _free_size(signature: Signature) -> int:
    sizes = {n for s in signature.inputs for n in s.shape}
    return next((n for n in _PRIMES if n not in sizes), 2)


def initial_range(model: nn.Module) -> tuple[int, int | None]:
    """Return the batch range to ask for first: 1..63 for diffusers' UNets, else 1 and up.

    Upsample2D branches at 64 rows, which torch.export would refuse after the whole export.
    """
    return 1, 63 if any(type(m).__name__ == "Upsample2D" for m in model.modules()) else None


def is_specialized(message: str) -> bool:
    """Tell whether torch.export complains that the model's code fixes the batch to a number."""
    return "your code specialized it to be a constant" in message


def refine_range(
    message: str, batch_range: tuple[int, int | None]
) -> tuple[int, int | None] | None:
    """Return the batch range that torch.export's complaint allows, or None if it names no other.

    Args:
        message: The text of the error that ``torch.export.export`` raised.
        batch_range: The range that was asked for; None as upper bound means any.
    """
    low, high = batch_range
    if match := re.search(r"Dim\('batch'(?:, min=(\d+))?(?:, max=(\d+))?\)", message):
        low = max(low, int(match[1] or low))
        high = min(high or int(match[2]), int(match[2])) if match[2] else high
    elif match := re.search(r"batch (<=?) (\d+)(?:/(\d+))?", message):
        bound = int(match[2]) / int(match[3] or 1)
        limit = math.floor(bound) if match[1] == "<=" else math.ceil(bound) - 1
        high = min(high or limit, limit)
    refined = (low, high)
    if refined == batch_range or (high is not None and high < max(low, 2)):
        return None
    return refined
