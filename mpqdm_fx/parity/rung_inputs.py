"""The inputs that all rungs are run on: a few timesteps, drawn once, kept beside the weights."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.nested import first_row, map_tensors
from mpqdm_fx.graph.noise_names import NOISE_NAMES, TIMESTEP_NAMES
from mpqdm_fx.graph.signature import Signature, tensor_leaves
from mpqdm_fx.io.files import replacing
from mpqdm_fx.sources.source import Source

__all__ = ["INPUTS", "random_calls", "read_calls", "source_calls", "write_calls"]

INPUTS = "parity.safetensors"

_COUNT = 4
_SEED = 70_000  # neither calibration's nor evaluation's
_LAST_TIMESTEP = 999

Call = Mapping[str, Any]


def source_calls(source: Source, signature: Signature) -> list[Call]:
    """What a float model is called with on its way from noise, at a few timesteps.

    Args:
        source: The float model with its scheduler.
        signature: Signature of its graph.
    """
    data: Iterable[Call]
    if source.calls is not None:
        held_out = source.calls.held_out
        # spread over them, which may be in the order of the noise levels
        data = [
            first_row(held_out[len(held_out) * k // _COUNT])
            for k in range(min(_COUNT, len(held_out)))
        ]
        return [_as_traced(call, signature) for call in data]
    data = Trajectories(
        source.model,
        source.scheduler,
        num_trajectories=1,
        num_inference_steps=_COUNT,
        batch_size=1,
        seed=_SEED,
        sample_shape=source.sample_shape,
        convention=source.convention,
        conditions=source.conditions(1, _SEED),
        shuffle=False,
    )
    return [_as_traced(call, signature) for call in data]


def _as_traced(call: Call, signature: Signature) -> Call:
    dtypes = {spec.name: spec.dtype for spec in signature.inputs}
    cast = map_tensors(call, lambda name, tensor: tensor.to(dtypes.get(name, tensor.dtype)))
    return signature.normalize((), cast)


def random_calls(signature: Signature) -> list[Call]:
    """Seeded random inputs at timesteps from the first to the last of a usual schedule.

    Other noise levels are positive numbers: of a negative sigma nothing but NaN would be compared.

    Args:
        signature: Signature of a graph.
    """
    calls = []
    for number in range(_COUNT):
        step = _LAST_TIMESTEP * (_COUNT - 1 - number) // (_COUNT - 1)
        drawn = example_inputs(signature, batch_size=1, seed=_SEED + number)
        calls.append(map_tensors(drawn, partial(_at_step, step=step)))
    return calls


def _at_step(name: str, value: Tensor, *, step: int) -> Tensor:
    """A drawn input as a model can be told it."""
    if name in TIMESTEP_NAMES:
        return torch.full_like(value, step)
    return value.abs() + 0.125 if name in NOISE_NAMES else value


def write_calls(path: Path, calls: Sequence[Call], outputs: Sequence[Sequence[Tensor]]) -> None:
    """Write inputs and the float model's outputs.

    Args:
        path: File.
        calls: Inputs of each call.
        outputs: Float outputs of each call.
    """
    tensors: dict[str, list[Tensor]] = {}
    for call, results in zip(calls, outputs, strict=True):
        for name, tensor in tensor_leaves(call):
            tensors.setdefault(f"in.{name}", []).append(tensor)
        for index, tensor in enumerate(results):
            tensors.setdefault(f"out.{index}", []).append(tensor)
    stacked = {name: torch.stack(parts).contiguous() for name, parts in tensors.items()}
    with replacing(path) as part:
        save_file(stacked, part)


def read_calls(
    path: Path, signature: Signature, *, where: object = None
) -> tuple[list[Call], list[tuple[Tensor, ...]]]:
    """Read what `write_calls` wrote.

    Args:
        path: File.
        signature: Signature of the graph that takes the inputs.
        where: What to call the file in messages; default `path`.

    Raises:
        ArtifactError: The file is missing, damaged, or of another model.
    """
    name = where or path
    if not path.exists():
        raise ArtifactError(f"{name} is missing")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{name} is damaged: {error}") from None
    example = example_inputs(signature, batch_size=1)
    inputs = {f"in.{key}": tensor for key, tensor in tensor_leaves(example)}
    count = _checked(name, tensors, inputs)
    results = len(tensors) - len(inputs)
    calls = [
        map_tensors(example, partial(_stored, tensors=tensors, number=number))
        for number in range(count)
    ]
    outputs = [
        tuple(tensors[f"out.{index}"][number] for index in range(results))
        for number in range(count)
    ]
    return calls, outputs


def _checked(name: object, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> int:
    """Number of calls; refuses tensors that are not a graph's inputs and what it returns.

    Outputs may have any dtype, and infinities where a mask has them.
    """
    outputs = {f"out.{index}" for index in range(len(tensors) - len(inputs))}
    if not outputs or set(tensors) != {*inputs, *outputs}:
        raise ArtifactError(
            f"{name} is damaged or of another model: it holds {', '.join(sorted(tensors))[:300]}, "
            f"wanted are {', '.join(inputs)} and outputs"
        )
    count = len(tensors["out.0"]) if tensors["out.0"].dim() else 0
    for key, tensor in tensors.items():
        like = inputs.get(key)
        fits = tensor.dim() > 0 and 0 < len(tensor) == count
        if like is not None:
            fits = fits and tensor.shape[1:] == like.shape and tensor.dtype == like.dtype
        if not fits:
            expected = "" if like is None else f", wanted is {like.dtype} {list(like.shape)} a call"
            raise ArtifactError(
                f"{name} is damaged or of another model: {key} is {tensor.dtype} "
                f"{list(tensor.shape)}{expected}"
            )
        if bool((tensor.isnan() if like is None else ~tensor.isfinite()).any()):
            what = "NaN" if like is None else "NaN or infinity"
            raise ArtifactError(f"{name} is damaged: {key} holds {what}")
    return count


def _stored(key: str, _: Tensor, *, tensors: Mapping[str, Tensor], number: int) -> Tensor:
    """An input of one of the stored calls."""
    return tensors[f"in.{key}"][number]
