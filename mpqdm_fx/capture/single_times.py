"""Whether a model that is given one time for all samples takes one for each of them as well.

Most do, and are traced so: every sample of a batch can then be at a noise level of its own. The
code of some computes with a single number, and a tensor of shape [B] is refused, or broadcast along
another axis. These are traced with the number that they were given.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.noise_names import TIMESTEP_NAMES
from mpqdm_fx.graph.signature import Signature

__all__ = ["run_example"]

_ALIKE = 1e-3  # of the largest value: rows of another shape round otherwise


def run_example(
    run: Callable[[Signature, dict[str, Any]], Any],
    signature: Signature,
    call: dict[str, Any],
    example_inputs: Mapping[str, Any] | Sequence[Any],
) -> tuple[Signature, dict[str, Any], Any]:
    """Run a model on its example, with a time for each sample if it answers as to a single one.

    Args:
        run: Runs the model on a call.
        signature: Of a call with a time for each sample.
        call: That call.
        example_inputs: As the caller gave them.

    Returns:
        Signature, call and the model's answer to it.

    Raises:
        TraceError: The model takes neither.
    """
    single = _single_times(signature, call, example_inputs)
    if not single:
        return signature, call, run(signature, call)
    inputs = tuple(
        dataclasses.replace(spec, shape=tuple(single[spec.name].shape))
        if spec.name in single
        else spec
        for spec in signature.inputs
    )
    other, given = dataclasses.replace(signature, inputs=inputs), {**call, **single}
    try:
        expected = run(signature, call)
    except TraceError as refused:
        try:
            return other, given, run(other, given)
        except TraceError:
            raise refused from None
    try:
        answer = run(other, given)
    except TraceError:  # the usual case of a model that takes tensors of shape [B] alone
        return signature, call, expected
    return (signature, call, expected) if _alike(expected, answer) else (other, given, answer)


def _single_times(
    signature: Signature, call: Mapping[str, Any], example_inputs: Mapping[str, Any] | Sequence[Any]
) -> dict[str, Tensor]:
    """The times that were spread over the batch, as they were given."""
    if isinstance(example_inputs, Mapping):
        values = signature.bind((), example_inputs)
    else:
        values = signature.bind(example_inputs)
    times = {}
    for name in TIMESTEP_NAMES & values.keys():
        told = call[name]
        if isinstance(told, Tensor) and isinstance(values[name], int | float | Tensor):
            time = torch.as_tensor(values[name]).to(told.dtype)
            if time.shape != told.shape:
                times[name] = time
    return times


def _alike(expected: Any, answer: Any) -> bool:
    """Whether two answers are of the same numbers, but for rounding."""
    pairs = (pytree.tree_leaves(expected), pytree.tree_leaves(answer))
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(_close(one, other) for one, other in zip(*pairs, strict=True))


def _close(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    largest = float(one.abs().nan_to_num(posinf=0.0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=_ALIKE * largest, equal_nan=True)
