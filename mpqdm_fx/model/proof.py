"""What a saved model proves itself with: its outputs on an input that needs no storing.

The stored graph says what is computed; the outputs say that it was understood. Where the same
machine runs the same torch, a loaded model has to return the stored bits. Elsewhere kernels sum in
another order. In the graph with float activations that moves the output by about 1e-6 of its
size, and 1e-3 (60 dB) is asked for. In the quantized graph one such difference can move a value
across a rounding threshold, and its consequences through all layers behind; so there the bound is
what two independent roundings would differ by: twice the energy of the stored rounding error.
"""

import hashlib
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.difference import same_bits
from mpqdm_fx.graph.nested import tensors_of, to_device
from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.io.folders import OUTPUTS
from mpqdm_fx.io.schema import Strict
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.numerics.metrics import float64_parts

__all__ = ["KERNEL_TOLERANCE", "Environment", "check_outputs", "proof_inputs", "write_outputs"]

KERNEL_TOLERANCE = 1e-3
"""Largest difference that other kernels may make, in units of the output's root mean square."""

_POSITIVE = "positive"


def proof_inputs(signature: Signature, *, positive: bool = False) -> dict[str, Any]:
    """Inputs that are the same on every machine and in every version: bytes of SHAKE-128.

    Random generators promise neither; storing inputs would cost more than storing outputs.

    Args:
        signature: Signature of a traced graph.
        positive: Make numbers per sample positive, for models that take their logarithm (sigma).

    Returns:
        Argument name to tensor or container, batch 1 where the graph takes that, else the traced
        batch. Floats lie in -2 to 2 in steps of 1/64, which half precision holds too; integers are
        0 or 1, which every embedding table has; booleans are mostly true.
    """
    smallest = signature.batch_range[0] if signature.batch_range else signature.batch
    leaves, tree = pytree.tree_flatten(example_inputs(signature, batch_size=smallest))
    values = [
        _values(leaf, seed, positive=positive and leaf.dim() <= 1)
        if isinstance(leaf, Tensor)
        else leaf
        for seed, leaf in enumerate(leaves)
    ]
    return dict(pytree.tree_unflatten(values, tree))


def _values(like: Tensor, seed: int, *, positive: bool) -> Tensor:
    if not like.numel():
        return like
    data = bytearray(hashlib.shake_128(f"mpqdm_fx {seed}".encode()).digest(like.numel()))
    numbers = torch.frombuffer(data, dtype=torch.uint8).reshape(like.shape)
    if like.dtype == torch.bool:
        return numbers % 8 > 0
    if not like.dtype.is_floating_point:
        return (numbers % 2).to(like.dtype)
    return ((numbers.float() + 1 if positive else numbers.float() - 128) / 64).to(like.dtype)


class Environment(Strict):
    """What decides the last bits of a sum: two of these are equal where bits have to be."""

    torch: str
    machine: str
    kernels: str
    threads: Annotated[int, Field(ge=1, le=2**20)]
    precision: str
    device: str


def environment(device: torch.device) -> Environment:
    """That of this process.

    Args:
        device: Where the graph runs.
    """
    return Environment(
        torch=str(torch.__version__),
        machine=hashlib.sha256(platform.node().encode()).hexdigest()[:16],
        kernels=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        precision=torch.get_float32_matmul_precision(),
        device=device.type,
    )


def write_outputs(path: Path, quantized: QuantizedModel) -> Environment:
    """Write what a model and its graph with float activations return for `proof_inputs`.

    Two calls, of batch 1 where the graph takes that; three where the first gives NaN, which proves
    nothing: then numbers per sample are positive.

    Args:
        path: The file, safetensors.
        quantized: The model.

    Returns:
        Where they were computed.
    """
    tensors = {}
    rounded = _run(quantized.rounded, quantized, positive=False)
    if positive := any(bool(output.isnan().any()) for output in rounded):
        rounded = _run(quantized.rounded, quantized, positive=True)
        tensors[_POSITIVE] = torch.ones(1)
    fake_quantized = _run(quantized.graph_module, quantized, positive=positive)
    for form, outputs in (("quantized", fake_quantized), ("rounded", rounded)):
        for index, output in enumerate(outputs):
            tensors[f"{form}.{index}"] = output.clone(memory_format=torch.contiguous_format)
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors writes for the owner alone
    return environment(quantized.device)


def _run(graph: fx.GraphModule, quantized: QuantizedModel, *, positive: bool) -> list[Tensor]:
    device = quantized.device
    inputs = proof_inputs(quantized.signature, positive=positive)
    inputs = to_device(inputs, device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        outputs = tensors_of(graph(**inputs))
    return [output.detach().cpu() for output in outputs]


def check_outputs(path: Path, written_in: Environment, quantized: QuantizedModel) -> None:
    """Refuse a model that returns other numbers than those that were stored.

    One call if the bits are the same, else two.

    Args:
        path: File of `write_outputs`.
        written_in: What `write_outputs` returned.
        quantized: The model that should be the same.

    Raises:
        ArtifactError: It returns other bits where they should be the same, or numbers that are
            farther off than other kernels explain.
    """
    stored = _Stored(path)
    outputs = _run(quantized.graph_module, quantized, positive=stored.positive)
    expected = stored.outputs("quantized", outputs)
    if same_bits(outputs, expected):
        return
    here, there = environment(quantized.device), dict(written_in)
    changed = ", ".join(key for key, value in here if value != there[key])
    floats = _run(quantized.rounded, quantized, positive=stored.positive)
    stored_floats = stored.outputs("rounded", floats)
    noise = _energy(_minus(expected, stored_floats)) + KERNEL_TOLERANCE**2 * _signal(expected)
    far = _energy(_minus(floats, stored_floats)) > KERNEL_TOLERANCE**2 * _signal(stored_floats)
    far = far or math.isinf(noise)  # of such a model no bound tells anything
    if not changed or far or not _energy(_minus(outputs, expected)) <= 2 * noise:
        place = f"another {changed}" if changed else "same machine, same torch"
        raise ArtifactError(
            f"the loaded model returns other numbers than the one that was saved: "
            f"{_decibels(outputs, expected)} between them, {_decibels(floats, stored_floats)} with "
            f"float activations ({place}); load it with the versions that the manifest names, or "
            f"save it again"
        )


class _Stored:
    def __init__(self, path: Path) -> None:
        try:
            self.tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"{OUTPUTS} is corrupted or truncated: {error}") from None

    @property
    def positive(self) -> bool:
        """Whether the outputs are those of positive numbers per sample."""
        return _POSITIVE in self.tensors

    def outputs(self, form: str, like: list[Tensor]) -> list[Tensor]:
        """The stored outputs of a form, which must have the number and shapes of those found."""
        stored = [self.tensors[key] for key in self._keys(form)]
        shapes = [[(tuple(o.shape), o.dtype) for o in outputs] for outputs in (like, stored)]
        if shapes[0] != shapes[1]:
            raise ArtifactError(
                f"the loaded model returns {shapes[0]}, the one that was saved {shapes[1]}"
            )
        return stored

    def _keys(self, form: str) -> Iterator[str]:
        index = 0
        while f"{form}.{index}" in self.tensors:
            yield f"{form}.{index}"
            index += 1


def _minus(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
    """Differences; where both are NaN, or the same infinity, there is none."""
    return [
        torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)
        for a, b in zip(map(float64_parts, ours), map(float64_parts, theirs), strict=True)
    ]


def _signal(values: list[Tensor]) -> float:
    """Sum of squares of what is finite: infinities of a mask are no size."""
    return _energy([value.masked_fill(value.isinf(), 0.0) for value in map(float64_parts, values)])


def _energy(values: list[Tensor]) -> float:
    """Sum of squares; NaN counts as infinite, so that every bound is crossed."""
    total = sum(float(value.double().square().sum()) for value in values)
    return math.inf if math.isnan(total) else total


def _decibels(outputs: list[Tensor], expected: list[Tensor]) -> str:
    error = _energy(_minus(outputs, expected))
    signal = _signal(expected)
    if not 0 < error < math.inf or not signal:
        return "not one number alike" if error else "no difference"
    return f"{10 * math.log10(signal / error):.1f} dB"
