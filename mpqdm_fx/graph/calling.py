"""Call a traced graph like its model: example inputs, output classes, JSON round trip."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.nested import map_tensors
from mpqdm_fx.graph.signature import InputSpec, Signature, tensor_leaves

__all__ = [
    "TracedGraph",
    "example_call",
    "example_inputs",
    "in_dtype",
    "join_outputs",
    "output_class",
    "pack_output",
    "signature_to_dict",
    "split_batch",
]

_LIBRARIES = ("diffusers", "transformers")


class TracedGraph(fx.GraphModule):
    """A graph that takes the very inputs that its model was traced with.

    Tensors in the order or by the names of its placeholders go straight in. A call of the model,
    with numbers for timesteps and arguments that are constants of the graph, goes through
    `Signature.normalize`, which refuses other constants by name.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph.

        Raises:
            TraceError: The arguments are not those of the model, or not those that were traced.
        """
        signature: Signature | None = self.meta.get("signature")
        if signature is not None:
            args, kwargs = _placed(signature, args, kwargs)
        return super().__call__(*args, **kwargs)


def _placed(
    signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call as the graph takes it."""
    names = signature.arguments
    if len(args) > len(names):  # in the order of the model, with its constants
        return (), signature.normalize(args, kwargs)
    values = dict(zip(names, args, strict=False))
    if values.keys() & kwargs.keys():
        return (), signature.normalize(args, kwargs)
    values.update(kwargs)
    if values.keys() != set(names):
        return (), signature.normalize((), values)
    return (args, kwargs) if _is_as_traced(signature, values) else ((), signature.fit(values))


def _is_as_traced(signature: Signature, values: Mapping[str, Any]) -> bool:
    """Whether no value has to be turned into what the graph takes, but for its sizes."""
    constants = (bool, int, float, str, type(None))
    if any(isinstance(leaf, constants) for leaf in pytree.tree_leaves(values)):
        return False
    specs = {spec.name: spec for spec in signature.inputs}
    return all(
        name in specs and _is_like(tensor, specs[name], signature.dtype)
        for name, tensor in tensor_leaves(values)
    )


def _is_like(tensor: Tensor, spec: InputSpec, dtype: torch.dtype) -> bool:
    """Whether a tensor has an input's rank and kind of number, and not the caller's half precision.

    Other precisions go in as they are: a graph that was cast (`graph.double()`) takes its own.
    """
    same = tensor.dtype == spec.dtype
    floating = tensor.dtype.is_floating_point and spec.dtype.is_floating_point
    return tensor.ndim == len(spec.shape) and (same or (floating and tensor.dtype != dtype))


def example_inputs(
    signature: Signature, *, batch_size: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Inputs of the traced shapes with seeded random values.

    Args:
        signature: Signature of a traced graph.
        batch_size: Batch, by default the traced example's.
        seed: Seed of the values. Integers are 0 or 1, which every embedding table has; so are the
            numbers of an input called a mask, which models multiply by the largest number there is.

    Returns:
        Argument name to tensor or container, as the graph takes it: without constants, but for
        those that keep the places in a list.
    """
    call = _example_containers(signature, batch_size, seed)
    return {name: _lists(value, constants=False) for name, value in call.items()}


def example_call(
    signature: Signature, *, batch_size: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """`example_inputs` with all that is constant in the graph: a call of the model itself.

    Args: as of `example_inputs`.
    """
    call = _example_containers(signature, batch_size, seed)
    constants = {name: value for name, value in signature.baked if "." not in name}
    constants.pop("return_dict", None)
    return {name: _lists(value, constants=True) for name, value in call.items()} | constants


def _example_containers(signature: Signature, batch_size: int | None, seed: int) -> dict[str, Any]:
    """Tensors, and constants beside them in containers, all containers as dicts."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {}
    tensors = [(spec.name, _example(spec, batch_size, generator)) for spec in signature.inputs]
    constants = [(name, value) for name, value in signature.baked if "." in name]
    for dotted, value in (*tensors, *constants):
        name, *path = dotted.split(".")
        inputs[name] = _nest(inputs.get(name), path, value)
    return inputs


def _example(spec: InputSpec, batch_size: int | None, generator: torch.Generator) -> Tensor:
    shape = spec.shape if batch_size is None else spec.shape_at(batch_size)
    if spec.dtype.is_floating_point and not spec.name.endswith("mask"):
        return torch.randn(shape, generator=generator).to(spec.dtype)
    return torch.randint(2, shape, generator=generator).to(spec.dtype)


def _nest(container: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    entries = dict(container or {})
    entries[path[0]] = _nest(entries.get(path[0]), path[1:], value)
    return entries


def _lists(value: Any, *, constants: bool) -> Any:
    """Dicts whose keys are 0..n-1 were lists; of others, only tensors are left if so wanted."""
    if not isinstance(value, dict):
        return value
    entries = {key: _lists(entry, constants=constants) for key, entry in value.items()}
    indices = [str(index) for index in range(len(entries))]
    if entries.keys() == set(indices):
        return [entries[index] for index in indices]
    return {k: v for k, v in entries.items() if constants or any(True for _ in tensor_leaves(v))}


def split_batch(signature: Signature, kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a call whose batch is larger than the traced range into calls that fit.

    Samples do not see each other in a denoiser, so the outputs of the parts, one after the other,
    are the output of the whole.

    Args:
        signature: Signature of a traced graph.
        kwargs: Keyword arguments of one call.

    Returns:
        Keyword arguments of each part; `[kwargs]` if the batch fits.
    """
    largest = signature.batch_range[1] if signature.batch_range else None
    specs = {spec.name: spec for spec in signature.inputs if spec.batch_axis == 0}
    batches = [
        len(tensor) // specs[name].batch_multiple
        for name, tensor in tensor_leaves(kwargs)
        if name in specs and tensor.ndim > 1
    ]
    if largest is None or not batches or batches[0] <= largest:
        return [dict(kwargs)]

    def part(start: int) -> dict[str, Any]:
        def rows(name: str, value: Tensor) -> Tensor:
            if name not in specs or value.numel() == 1:
                return value
            multiple = specs[name].batch_multiple
            return value[start * multiple : (start + largest) * multiple]

        chosen: dict[str, Any] = map_tensors(dict(kwargs), rows)
        return chosen

    return [part(start) for start in range(0, batches[0], largest)]


def join_outputs(outputs: Sequence[Any]) -> Any:
    """The output of a call from those of its parts; inverse of `split_batch`.

    Args:
        outputs: Tensors with the batch in front, or tuples of such, one entry per part.
    """
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple):
        return tuple(join_outputs(part) for part in zip(*outputs, strict=True))
    return torch.cat(list(outputs))


def pack_output(signature: Signature, output: Any) -> Any:
    """The graph's output in the dataclass that the model's forward returns.

    Args:
        signature: Signature of the traced graph.
        output: What the graph returned: what the model returns for `return_dict=False`.

    Returns:
        An object of the model's output class, or `output` itself where it declares none.
    """
    kind = output_class(signature) if isinstance(output, tuple) else None
    return output if kind is None else kind(*output)


def output_class(signature: Signature) -> Callable[..., Any] | None:
    """The dataclass that the model's forward returns; None where it declares none.

    A name from a file imports nothing but the libraries of models.

    Raises:
        ArtifactError: It is no dataclass, or its module was neither imported nor is a library's.
    """
    path = signature.output_class
    if path is None:
        return None
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] in _LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    cls = getattr(sys.modules.get(module), name, None)
    if not isinstance(cls, type) or not is_dataclass(cls):
        raise ArtifactError(
            f"the model's output class {path!r} is no dataclass that is known here; import the "
            f"module that defines it before the model is loaded"
        )
    return cls


def in_dtype(output: Any, dtype: torch.dtype) -> Any:
    """Outputs of a graph, which computes in float32, as the caller's model would return them.

    Args:
        output: Tensors in nested dicts, lists and tuples.
        dtype: `Signature.dtype`.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype is torch.float32 else tensor

    return output if dtype is torch.float32 else pytree.tree_map_only(Tensor, cast, output)


def signature_to_dict(signature: Signature) -> dict[str, Any]:
    """Plain JSON types, as a field of a `Strict` record reads them.

    Args:
        signature: Its baked arguments must be plain JSON values.
    """
    data = asdict(signature)
    for entry in (data, *data["inputs"]):
        entry["dtype"] = str(entry["dtype"]).removeprefix("torch.")
    if not signature.defaults:
        del data["defaults"]
    return data
