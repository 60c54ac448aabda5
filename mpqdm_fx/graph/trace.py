"""Capture a model as a module-level FX graph, bit-equal to eager execution.

``torch.fx.symbolic_trace`` traces no diffusers UNet; torch.export (non-strict) traces all of them.
So: export, then raise every leaf module back to one ``call_module`` (``raise_modules``).
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.raise_modules import raise_leaf_modules
from mpqdm_fx.graph.signature import Signature, bind_inputs, tensor_leaves

__all__ = ["trace"]

_LOGGER = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    dynamic_batch: bool = True,
) -> fx.GraphModule:
    """Trace ``model`` in evaluation mode to a module-level graph that shares its parameters.

    Args:
        model: Any module that torch.export takes; it is not changed.
        example_inputs: Keyword arguments, or a tuple of positional ones. Integer, float and 0-d
            timesteps become tensors of shape [B].
        dynamic_batch: Let the leading axis of batched inputs vary. Where the model does not allow
            it, the batch is fixed, a warning is logged, and the signature's ``note`` says why.

    Returns:
        The graph; ``gm.meta["signature"]`` is its ``Signature``.

    Raises:
        TraceError: If the inputs do not fit the model or the model cannot be captured.
    """
    signature, call = bind_inputs(model, example_inputs)
    with _evaluation_mode(model) as training, torch.no_grad():
        exported, signature, inputs = _export(model, call, signature, dynamic_batch)
        graph_module = raise_leaf_modules(exported, model, inputs, training)
    graph_module.meta["signature"] = signature
    return graph_module


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Put every module into evaluation mode and restore each flag afterwards, whatever happens."""
    training = {name: m.training for name, m in model.named_modules(remove_duplicate=False)}
    flags = [(m, m.training) for m in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield training
    finally:
        for module, flag in flags:
            module.training = flag


def _export(
    model: nn.Module, call: dict[str, Any], signature: Signature, dynamic_batch: bool
) -> tuple[ExportedProgram, Signature, dict[str, Any]]:
    batched = _batched_names(signature) if dynamic_batch else frozenset()
    if batched:
        size = _export_batch(signature)
        inputs = {n: _tile(v, n, batched, size) for n, v in call.items()}
        batch = Dim("batch", min=1, max=63)
        shapes = {n: _dynamic_shapes(v, n, batched, batch) for n, v in inputs.items()}
        try:
            exported = torch.export.export(
                model, (), inputs, dynamic_shapes=shapes, strict=False
            )
        except Exception as error:  # noqa: BLE001
            note = f"the batch cannot be dynamic: {str(error).strip().splitlines()[0]}"
            _LOGGER.warning("%s: %s", signature.model_class, note)
            signature = dataclasses.replace(signature, note=note)
        else:
            specs = tuple(
                dataclasses.replace(s, batch_axis=0 if s.name in batched else None)
                for s in signature.inputs
            )
            return (
                exported,
                dataclasses.replace(signature, inputs=specs, batch_range=(1, 63)),
                inputs,
            )
    try:
        return torch.export.export(model, (), call, strict=False), signature, call
    except Exception as error:
        raise TraceError(f"{signature.model_class}: {error}") from error


def _batched_names(signature: Signature) -> frozenset[str]:
    return frozenset(
        s.name for s in signature.inputs if s.shape and s.shape[0] == signature.batch
    )


def _export_batch(signature: Signature) -> int:
    """Return a batch size above 1 (export specialises 1) that no other axis has by chance."""
    taken = {n for s in signature.inputs for n in s.shape}
    return next(n for n in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37) if n not in taken)


def _tile(value: Any, name: str, batched: frozenset[str], size: int) -> Any:
    leaves, spec = pytree.tree_flatten(value)
    names = iter(n for n, _ in tensor_leaves({name: value}))
    tiled = [
        v[torch.arange(size) % v.shape[0]]
        if isinstance(v, torch.Tensor) and next(names) in batched
        else v
        for v in leaves
    ]
    return pytree.tree_unflatten(tiled, spec)


def _dynamic_shapes(value: Any, name: str, batched: frozenset[str], batch: Dim) -> Any:
    if isinstance(value, torch.Tensor):
        return {0: batch} if name in batched else None
    if isinstance(value, Mapping):
        return {k: _dynamic_shapes(v, f"{name}.{k}", batched, batch) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(
            _dynamic_shapes(v, f"{name}.{i}", batched, batch) for i, v in enumerate(value)
        )
    return None
