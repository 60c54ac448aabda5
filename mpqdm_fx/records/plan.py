"""The decision: how many bits each output channel gets, and what that costs in all."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.schema import Name, Strict, validated
from mpqdm_fx.numerics.levels.packing import StorageBits, coded_bits, storage_bits
from mpqdm_fx.records.config import Levels
from mpqdm_fx.records.validation import Between, Bits, check_fields, check_value

__all__ = [
    "FLOAT_REASON",
    "BitPlan",
    "Fate",
    "FloatTensor",
    "LayerPlan",
    "ParameterFate",
    "StoredFate",
]


FLOAT_REASON = "norm, bias or constant"
"""Why a tensor that is no layer's weight stays in floating point."""

Fate = Literal["quantized", "float", "shared", "folded", "unused"]
"""What becomes of a parameter of the model. The last three are not stored under its name: another
parameter has the same storage, its numbers are part of another tensor, or forward reads it not."""

_SAID_SHARE = 0.01  # of the weights: so many in float are said
_CHANNELS = 2**24  # more than any layer has
_NAMED = 3  # names of each kind in a remark


@dataclass(frozen=True, kw_only=True)
class FloatTensor:
    """A stored tensor in floating point.

    Attributes:
        name: Tensor's name in the graph.
        numel: Elements.
        bits: Stored bits of an element.
        is_weight: Whether it is a weight, of a layer or of none, and no norm, bias or constant;
            such a tensor counts against `effective_bits`.
        reason: Why it stays.
    """

    name: str
    numel: Annotated[int, Between(0, 2**62)]
    bits: Annotated[int, Between(1, 128)]
    is_weight: bool
    reason: str

    def __post_init__(self) -> None:
        check_value(self.name, str, "name")
        check_fields(self, f"{self.name}: ")


@dataclass(frozen=True, kw_only=True)
class ParameterFate:
    """What became of a parameter of the float model, or of a part of it.

    Attributes:
        name: Its name in the model.
        numel: Elements; 0 for a second name of the same parameter object.
        fate: `"quantized"` and `"float"` are stored; of the others see `Fate`.
        note: Why, or which tensor it shares, went into, or is stored as.
    """

    name: Name
    numel: Annotated[int, Between(0, 2**62)]
    fate: Fate
    note: str = ""

    def __post_init__(self) -> None:
        check_fields(self, f"{self.name}: ")


def _fields(row: Any) -> Any:
    """A fate of a file, which is short: `[name, numel, fate, note]`."""
    if not isinstance(row, list) or len(row) != 4:
        raise ValueError("the fate of a parameter has four parts")
    return dict(zip(("name", "numel", "fate", "note"), row, strict=True))


StoredFate = Annotated[ParameterFate, BeforeValidator(_fields)]
"""A fate as a field of a `Strict` record."""


def _widths(runs: Any) -> Any:
    """Inverse of `_run_lengths`: `[[2, 2], [3, 1]]` -> `(2, 2, 3)`."""
    if not isinstance(runs, list) or not all(isinstance(r, list) and len(r) == 2 for r in runs):
        raise ValueError("the widths are no pairs of bits and count")
    counts = [count for _, count in runs]
    if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) > _CHANNELS:
        raise ValueError(f"counts of channels are whole and at most {_CHANNELS} together")
    return tuple(bits for bits, count in runs for _ in range(count))


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Bits of one weight layer.

    Attributes:
        name: Module's fully qualified name in the graph.
        kind: Class name of the module, for example `Conv2d`.
        shape: Shape of its weight; axis 0 runs over output channels (rows, for an embedding).
        bits: Bits of each output channel, `len(bits) == shape[0]`.
        levels: `"uniform"`, `"codebook"` for fitted levels in channels of at most 4 bits, or
            `"int4"` for -8..7 in channels of 4 bits.
        reason: Why the layer is off the average budget, or None.
        fraction: Share of channels that OMQ promoted (and as many demoted).
        coded: Bytes of an entropy-coded layer's codes, which have no fixed width (`bits` are those
            of int8); 0 before they are decided, None for a layer of fixed widths.
    """

    name: str
    kind: str
    shape: tuple[Annotated[int, Between(1, 2**31)], ...]
    bits: Annotated[tuple[Bits, ...], BeforeValidator(_widths)]
    levels: Levels = "uniform"
    reason: Name | None = None
    fraction: Annotated[float, Between(0, 1)] = 0.0
    coded: Annotated[int, Between(0, 2**40)] | None = None

    def __post_init__(self) -> None:
        check_value(self.name, str, "name")
        check_fields(self, f"{self.name}: ")
        if self.coded is not None and (self.levels != "uniform" or {*self.bits} != {8}):
            raise ConfigError(f"{self.name}: an entropy-coded layer has whole numbers within int8")
        if len(self.shape) < 2:
            raise ConfigError(f"{self.name}: a weight has two axes at least, not {self.shape}")
        if len(self.bits) != self.shape[0]:
            raise ConfigError(
                f"{self.name}: {len(self.bits)} widths for {self.shape[0]} output channels"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as a field of a `Strict` record reads them."""
        fields = {**asdict(self), "bits": _run_lengths(self.bits)}
        if self.coded is None:  # older versions read layers of fixed widths
            del fields["coded"]
        return fields

    @property
    def num_weights(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def tensors(self) -> tuple[str, str, str]:
        """Names of the weight, its codes and its scale in a rounded graph."""
        return f"{self.name}.weight", f"{self.name}.weight_codes", f"{self.name}.weight_scale"

    @property
    def places(self) -> int:
        """Places of the kernel: 1 for linear layers and tables."""
        return math.prod(self.shape[2:])

    @property
    def mean_bits(self) -> float:
        """Average bits of a weight's code; all channels have equally many weights."""
        if self.coded is not None:
            return 8 * self.coded / self.num_weights
        return sum(self.bits) / len(self.bits)

    def bits_tensor(self) -> torch.Tensor:
        """`bits` as an int64 tensor [out_channels]."""
        return torch.tensor(self.bits, dtype=torch.int64)

    @cached_property
    def storage(self) -> StorageBits:
        """Stored bits by kind: codes, scales, tables, widths."""
        if self.coded is not None:
            return coded_bits(self.shape[0], self.coded)
        rows = (self.shape[0], self.num_weights // self.shape[0])
        return storage_bits(rows, self.bits_tensor(), self.levels)


@dataclass(frozen=True, kw_only=True)
class BitPlan:
    """Bits of every output channel of a model, and all that stays in floating point.

    Attributes:
        layers: Quantized layers in graph order.
        floats: All other tensors that are stored, each once.
        activation_bits: Bits of a weight layer's input where no override says otherwise.
        parameters: Fate of every parameter of the float model; their elements add up to
            `sum(p.numel() for p in model.parameters())`.
        copies: Names of stored weights whose parameter is stored under another name already: tied
            layers of different classes or widths have codes of their own.
    """

    layers: tuple[LayerPlan, ...]
    floats: tuple[FloatTensor, ...] = ()
    activation_bits: Bits = 8
    parameters: tuple[StoredFate, ...] = ()
    copies: tuple[str, ...] = ()
    _by_name: Mapping[str, LayerPlan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "plan: ")
        by_name = {layer.name: layer for layer in self.layers}
        if len(by_name) != len(self.layers):
            raise ConfigError("a plan names one layer twice")
        stored = {layer.tensors[0] for layer in self.layers} | {t.name for t in self.floats}
        if not stored.issuperset(self.copies):
            raise ConfigError(f"copies that are not stored: {sorted({*self.copies} - stored)[:3]}")
        object.__setattr__(self, "_by_name", by_name)

    def layer(self, name: str) -> LayerPlan:
        """The plan of the layer called `name`.

        Raises:
            ConfigError: The plan has no such layer.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise ConfigError(f"the plan has no layer {name!r}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def num_weights(self) -> int:
        """Weights of the model, quantized or not; a tied one counts once, however it is stored."""
        sizes = {layer.tensors[0]: layer.num_weights for layer in self.layers}
        sizes |= {tensor.name: tensor.numel for tensor in self.float_weights}
        return sum(sizes.values()) - sum(sizes[name] for name in self.copies)

    @property
    def float_weights(self) -> tuple[FloatTensor, ...]:
        """Weights left in floating point."""
        return tuple(tensor for tensor in self.floats if tensor.is_weight)

    @property
    def num_parameters(self) -> int:
        """Parameters of the float model: elements of all fates."""
        if not self.parameters:  # a plan of an older file
            return self.num_weights + sum(t.numel for t in self.floats if not t.is_weight)
        return sum(parameter.numel for parameter in self.parameters)

    def count(self, fate: Fate) -> int:
        """Elements of the model's parameters that have one fate."""
        return sum(entry.numel for entry in self.parameters if entry.fate == fate)

    @property
    def float_remark(self) -> str | None:
        """One line on the weights left in float, with reasons; None if they are at most 1 %."""
        left = sum(tensor.numel for tensor in self.float_weights)
        if left <= _SAID_SHARE * self.num_weights:
            return None
        names = _named([(tensor.reason, tensor.name) for tensor in self.float_weights])
        return (
            f"{left / self.num_weights:.1%} of the weights ({left:,} of {self.num_weights:,}) stay "
            f"in float: {names}"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """One line each on weights in float, tied weights stored twice, parameters not stored."""
        lines = [self.float_remark] if self.float_remark else []
        if self.copies:
            shared = {entry.name: entry.note for entry in self.parameters if entry.fate == "shared"}
            names = _named([(f"tied to {shared.get(n, 'another')}", n) for n in self.copies])
            lines.append(f"stored once more, with codes of their own: {names}")
        unused = [(entry.note, entry.name) for entry in self.parameters if entry.fate == "unused"]
        if unused:
            lines.append(f"{self.count('unused'):,} parameters are not stored: {_named(unused)}")
        return tuple(lines)

    @property
    def mean_bits(self) -> float:
        """Average bits of a code over the layers that share the budget."""
        budgeted = [layer for layer in self.layers if layer.reason is None]
        weights = sum(layer.num_weights for layer in budgeted)
        return sum(la.mean_bits * la.num_weights for la in budgeted) / weights if weights else 0.0

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as stored: codes, scales, tables, width tags, float weights."""
        stored = sum(-(-part // 8) for layer in self.layers for part in layer.storage)
        return stored + sum(t.numel * t.bits // 8 for t in self.float_weights)

    @property
    def float_bytes(self) -> int:
        """Bytes of norms, biases, constants and other tensors that are no weights."""
        return sum(t.numel * t.bits // 8 for t in self.floats if not t.is_weight)

    @property
    def effective_bits(self) -> float:
        """`8 * weight_bytes / num_weights`: every stored bit, over every weight.

        Layers pinned to 8 bits and layers left in float are counted.
        """
        return 8 * self.weight_bytes / self.num_weights if self.num_weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as a field of a `Strict` record reads them."""
        return {
            "activation_bits": self.activation_bits,
            "layers": [layer.to_dict() for layer in self.layers],
            "floats": [asdict(tensor) for tensor in self.floats],
            **self.fates_to_dict(),
        }

    def fates_to_dict(self) -> dict[str, Any]:
        """`parameters` and `copies` in plain JSON types, short."""
        return {
            "parameters": [[p.name, p.numel, p.fate, p.note] for p in self.parameters],
            "copies": list(self.copies),
        }

    def to_json(self) -> str:
        """JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "BitPlan":
        """Inverse of `to_json`.

        Raises:
            ArtifactError: It is no plan; the first field that does not fit is named.
        """
        return validated(_File, {"plan": json.loads(text)}, "the text of a plan").plan


class _File(Strict):
    plan: BitPlan


def _named(entries: list[tuple[str, str]]) -> str:
    """`[("why", "a"), ("why", "b")]` -> `"a, b (why)"`; of many names the first few."""
    by_reason: dict[str, list[str]] = {}
    for reason, name in entries:
        by_reason.setdefault(reason, []).append(name)
    parts = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        parts.append(f"{', '.join(names[:_NAMED])}{more} ({reason})")
    return "; ".join(parts)


def _run_lengths(bits: tuple[int, ...]) -> list[list[int]]:
    """`(2, 2, 3)` -> `[[2, 2], [3, 1]]`: pairs of value and count, short in JSON."""
    runs: list[list[int]] = []
    for value in bits:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs
