"""Weights at their own bits in one safetensors file, and back.

All layers share a handful of long tensors, because a safetensors header entry costs about 90 bytes
and a small UNet has hundreds of tensors: at two bits those headers would outweigh the scales.
Where each layer's part begins follows from the layout, which is small enough for the manifest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.parameters import first_names
from mpqdm_fx.io.fast_coder import installed_coder
from mpqdm_fx.io.schema import Name, Shape, Strict
from mpqdm_fx.numerics.halves import fits_half
from mpqdm_fx.numerics.levels.entropy_code import decode, encode
from mpqdm_fx.numerics.levels.packing import PackedLayer, pack_layer, storage_bits, unpack_layer
from mpqdm_fx.numerics.levels.packing import unpack_bits as unpack_integers
from mpqdm_fx.records.config import Levels
from mpqdm_fx.records.plan import FLOAT_REASON, BitPlan, FloatTensor, LayerPlan, StoredFate

__all__ = ["Layout", "PackedWeights", "read_packed", "write_packed"]

_INTEGER_BITS_OF_WIDTH = 3  # a width 1..8 is stored as width - 1
_DTYPES = {"codes": "uint8", "widths": "uint8", "tables": "int8", "scales": "bfloat16"}


_StoredDType = Literal[
    "float16", "bfloat16", "float32", "float64", "complex64", "bool",
    "uint8", "int8", "int16", "int32", "int64",
]  # fmt: skip
_Width = Annotated[int, Field(ge=1, le=8)]


class LayerLayout(Strict):
    """A `LayerPlan` whose widths are in the file of the weights where they are not all equal."""

    name: Name
    kind: Name
    shape: Annotated[tuple[Annotated[int, Field(ge=1, lt=2**40)], ...], Field(min_length=1)]
    bits: _Width | Literal["mixed"]
    levels: Levels
    reason: str | None
    fraction: Annotated[float, Field(ge=0, le=1)]
    coded: Annotated[int, Field(ge=1, lt=2**40)] | None = None


class Layout(Strict):
    """What `read_packed` needs beside the file.

    Attributes:
        layers: Quantized layers in the order of their codes.
        floats: Name, stored dtype, dtype and shape of every other tensor, in their order.
        float_weights: Why each weight stays in float.
        activation_bits: As of `BitPlan`; `parameters` and `copies` too.
        shared: Further names of tensors, and the name that each is stored under.
    """

    layers: tuple[LayerLayout, ...]
    floats: tuple[tuple[Name, _StoredDType, _StoredDType, Shape], ...]
    float_weights: dict[str, str]
    activation_bits: _Width
    shared: dict[str, str] = Field(default_factory=dict)
    parameters: tuple[StoredFate, ...] = ()
    copies: tuple[Name, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PackedWeights:
    """What a packed file holds.

    Attributes:
        plan: The plan, with the width of every channel.
        codes: int8 codes in the weight's shape, by layer name.
        scales: float32 scales [out_channels], by layer name.
        floats: All other parameters and buffers, by name in the graph, each once.
        shared: Further names of tensors, and the name that each is stored under.
    """

    plan: BitPlan
    codes: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    floats: Mapping[str, Tensor]
    shared: Mapping[str, str]


def write_packed(path: Path, rounded: fx.GraphModule, plan: BitPlan) -> dict[str, Any]:
    """Write the weights of a rounded graph.

    A float tensor is stored as float16 where that loses nothing, else as it is. A tensor of several
    names is stored once.

    Args:
        path: File to write.
        rounded: Graph after `RoundWeights(plan=plan)`.
        plan: The plan.

    Returns:
        A `Layout` in plain JSON types.

    Raises:
        ArtifactError: A tensor is of a kind that no packed file holds.
    """
    parts: dict[str, list[Tensor]] = {"codes": [], "widths": [], "tables": [], "scales": []}
    layers = []
    for planned in plan.layers:
        codes = rounded.get_buffer(f"{planned.name}.weight_codes")
        scale = rounded.get_buffer(f"{planned.name}.weight_scale")
        packed = _packed(codes.flatten(1), planned)
        parts["codes"].append(packed.stream)
        parts["widths"].append(packed.widths)
        parts["tables"].append(packed.tables.flatten())
        parts["scales"].append(scale.to(torch.bfloat16))
        entry = {**planned.to_dict(), "shape": list(planned.shape)}
        entry["bits"] = planned.bits[0] if len(set(planned.bits)) == 1 else "mixed"
        layers.append(entry)
    tensors = {key: torch.cat(value) for key, value in parts.items() if value}
    owned = [name for planned in plan.layers for name in planned.tensors]
    first = first_names(rounded, owned)
    floats = _write_floats(rounded, {*owned, *(n for n in first if first[n] != n)}, tensors)
    save_file({key: value.contiguous() for key, value in tensors.items() if value.numel()}, path)
    path.chmod(0o644)  # safetensors writes for the owner alone
    return {
        "layers": layers,
        "floats": floats,
        "float_weights": {tensor.name: tensor.reason for tensor in plan.floats if tensor.is_weight},
        "activation_bits": plan.activation_bits,
        "shared": {name: other for name, other in first.items() if name != other},
        **plan.fates_to_dict(),
    }


def _packed(codes: Tensor, planned: LayerPlan) -> PackedLayer:
    """The codes [O, K] of a layer as bytes."""
    if planned.coded is None:
        return pack_layer(codes, planned.bits_tensor(), planned.levels)
    stream = encode(codes, planned.places, installed_coder())
    if len(stream) != planned.coded:
        raise ArtifactError(
            f"{planned.name}: its codes take {len(stream)} bytes, and the plan says {planned.coded}"
        )
    nothing = torch.empty(0, dtype=torch.uint8)
    return PackedLayer(stream=stream, widths=nothing, tables=nothing.view(torch.int8))


def _write_floats(
    rounded: fx.GraphModule, skipped: set[str], tensors: dict[str, Tensor]
) -> list[list[Any]]:
    """Add all remaining tensors to `tensors`, one long tensor a dtype; return their layout."""
    layout: list[list[Any]] = []
    by_dtype: dict[str, list[Tensor]] = {}
    for name, tensor in rounded.state_dict().items():
        if name in skipped:
            continue
        stored = tensor.half() if fits_half(tensor) else tensor
        key = str(stored.dtype).removeprefix("torch.")
        if key not in get_args(_StoredDType):
            raise ArtifactError(
                f"{name} is {key}, which a packed file does not hold; convert it before the model "
                f"is quantized, to one of {', '.join(sorted(get_args(_StoredDType)))}"
            )
        by_dtype.setdefault(key, []).append(stored.flatten())
        layout.append([name, key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
    for key, values in by_dtype.items():
        tensors[f"rest.{key}"] = torch.cat(values)
    return layout


class _Reader:
    """Takes consecutive slices of the long tensors; too short or left-over data is an error."""

    def __init__(self, path: Path, name: object) -> None:
        self.name = name
        try:
            self.tensors = load_file(path)
        except FileNotFoundError:
            raise ArtifactError(f"{name} does not exist") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"{name} is corrupted or truncated: {error}") from None
        self.position = dict.fromkeys(self.tensors, 0)
        for key, tensor in self.tensors.items():
            dtype = _DTYPES.get(key, key.removeprefix("rest."))
            if tensor.ndim != 1 or str(tensor.dtype) != f"torch.{dtype}":
                raise ArtifactError(
                    f"{name}: {key!r} is {tensor.dtype} {list(tensor.shape)}; corrupted"
                )

    def check(self, key: str, count: int) -> None:
        """Refuse to go on if fewer than `count` elements are left."""
        left = self.tensors[key].numel() - self.position[key] if key in self.tensors else 0
        if count > left:
            raise ArtifactError(f"{self.name} is truncated: {key!r} ends too early")

    def take(self, key: str, count: int) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=torch.uint8)
        self.check(key, count)
        start = self.position[key]
        self.position[key] = start + count
        part: Tensor = self.tensors[key][start : start + count]
        return part

    def finish(self) -> None:
        for key, tensor in self.tensors.items():
            if self.position[key] != tensor.numel():
                raise ArtifactError(f"{self.name}: {key!r} is longer than its layout; corrupted")


def read_packed(path: Path, layout: Layout, *, name: object | None = None) -> PackedWeights:
    """Inverse of `write_packed`.

    Args:
        path: The file.
        layout: Of what is in it.
        name: What messages call it, if `path` is no name of its own.

    Raises:
        ArtifactError: The file is missing, truncated or corrupted, or does not fit the layout.
    """
    reader = _Reader(path, name or path)
    layers: list[LayerPlan] = []
    codes: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for entry in layout.layers:
        shape = entry.shape
        rows = (shape[0], math.prod(shape[1:]))
        # Nothing is made of a size that the file does not have: a bit and a scale at the least.
        reader.check("scales", shape[0])
        reader.check("codes", math.prod(shape) // 8 if entry.coded is None else entry.coded)
        bits, widths = _read_widths(reader, entry.bits, shape[0])
        if entry.coded is not None:
            values = _decoded(reader, entry, rows)
        else:
            size = storage_bits(rows, bits, entry.levels)
            packed = PackedLayer(
                stream=reader.take("codes", -(-size.codes // 8)),
                widths=widths,
                tables=reader.take("tables", size.tables // 8).view(torch.int8),
            )
            values, _ = unpack_layer(packed, rows, bits, entry.levels)
        codes[entry.name] = values.reshape(shape)
        scales[entry.name] = reader.take("scales", shape[0]).float()
        layers.append(LayerPlan(**{**dict(entry), "bits": tuple(bits.tolist())}))
    floats = {
        # A copy: kernels round by where memory begins, and a slice begins anywhere.
        name: reader.take(f"rest.{stored}", math.prod(shape))
        .to(getattr(torch, dtype))
        .reshape(shape)
        for name, stored, dtype, shape in layout.floats
    }
    reader.finish()
    plan = BitPlan(
        layers=tuple(layers),
        floats=tuple(_float_tensor(entry, layout.float_weights) for entry in layout.floats),
        activation_bits=layout.activation_bits,
        parameters=layout.parameters,
        copies=layout.copies,
    )
    return PackedWeights(plan=plan, codes=codes, scales=scales, floats=floats, shared=layout.shared)


def _decoded(reader: _Reader, entry: LayerLayout, rows: tuple[int, int]) -> Tensor:
    """Codes [O, K] of an entropy-coded layer."""
    assert entry.coded is not None
    if (entry.bits, entry.levels) != (8, "uniform"):
        raise ArtifactError(
            f"{reader.name}: {entry.name} is entropy-coded, and its layout says {entry.bits} bits "
            f"and {entry.levels} levels; corrupted"
        )
    stream, places = reader.take("codes", entry.coded), math.prod(entry.shape[2:])
    try:
        return decode(stream, rows, places, installed_coder())
    except ArtifactError as error:
        raise ArtifactError(f"{reader.name}: {entry.name}: {error}") from None


def _float_tensor(entry: Sequence[Any], weights: Mapping[str, str]) -> FloatTensor:
    name, dtype, _, shape = entry
    return FloatTensor(
        name=name,
        numel=math.prod(shape),
        bits=8 * torch.empty(0, dtype=getattr(torch, dtype)).element_size(),
        is_weight=name in weights,
        reason=weights.get(name, FLOAT_REASON),
    )


def _read_widths(reader: _Reader, bits: int | str, channels: int) -> tuple[Tensor, Tensor]:
    """Width of every channel, and the bytes that told it (none if all are equal)."""
    if isinstance(bits, int):
        return torch.full((channels,), bits, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
    packed = reader.take("widths", -(-channels * _INTEGER_BITS_OF_WIDTH // 8))
    return unpack_integers(packed, _INTEGER_BITS_OF_WIDTH, channels).long() + 1, packed
