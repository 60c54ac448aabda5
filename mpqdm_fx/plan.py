"""The decision: how many bits each output channel gets, and what that costs in all."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Self

import torch

from mpqdm_fx.activations import ActivationRange, LayerActivation
from mpqdm_fx.config import Levels
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.packing import StorageBits, storage_bits
from mpqdm_fx.validation import Between, Bits, check_fields, check_value

__all__ = [
    "FLOAT_REASON",
    "ActivationRange",
    "BitPlan",
    "FloatTensor",
    "LayerActivation",
    "LayerPlan",
]


FLOAT_REASON = "norm, bias or constant"
"""Why a tensor that is no layer's weight stays in floating point."""


@dataclass(frozen=True, kw_only=True)
class FloatTensor:
    """A parameter that stays in floating point.

    Attributes:
        name: Parameter's name in the graph.
        numel: Elements.
        bits: Stored bits of an element.
        is_weight: Whether it is the weight of a convolution, linear or embedding layer; such a
            tensor counts against `effective_bits`.
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
    """

    name: str
    kind: str
    shape: tuple[Annotated[int, Between(1, 2**31)], ...]
    bits: tuple[Bits, ...]
    levels: Levels = "uniform"
    reason: str | None = None
    fraction: Annotated[float, Between(0, 1)] = 0.0

    def __post_init__(self) -> None:
        check_value(self.name, str, "name")
        check_fields(self, f"{self.name}: ")
        if len(self.shape) < 2:
            raise ConfigError(f"{self.name}: a weight has two axes at least, not {self.shape}")
        if len(self.bits) != self.shape[0]:
            raise ConfigError(
                f"{self.name}: {len(self.bits)} widths for {self.shape[0]} output channels"
            )

    @property
    def num_weights(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def mean_bits(self) -> float:
        """Average bits of a weight's code; all channels have equally many weights."""
        return sum(self.bits) / len(self.bits)

    def bits_tensor(self) -> torch.Tensor:
        """`bits` as an int64 tensor [out_channels]."""
        return torch.tensor(self.bits, dtype=torch.int64)

    @cached_property
    def storage(self) -> StorageBits:
        """Stored bits by kind: codes, scales, tables, widths."""
        rows = (self.shape[0], self.num_weights // self.shape[0])
        return storage_bits(rows, self.bits_tensor(), self.levels)


@dataclass(frozen=True, kw_only=True)
class BitPlan:
    """Bits of every output channel of a model, and all that stays in floating point.

    Attributes:
        layers: Quantized layers in graph order.
        floats: Parameters left in floating point.
        activation_bits: Bits of a weight layer's input where no override says otherwise.
    """

    layers: tuple[LayerPlan, ...]
    floats: tuple[FloatTensor, ...] = ()
    activation_bits: Bits = 8
    _by_name: Mapping[str, LayerPlan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "plan: ")
        by_name = {layer.name: layer for layer in self.layers}
        if len(by_name) != len(self.layers):
            raise ConfigError("a plan names one layer twice")
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
        """Weights of all convolution, linear and embedding layers, quantized or not."""
        floats = sum(t.numel for t in self.floats if t.is_weight)
        return floats + sum(layer.num_weights for layer in self.layers)

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
        return stored + sum(t.numel * t.bits // 8 for t in self.floats if t.is_weight)

    @property
    def float_bytes(self) -> int:
        """Bytes of norms, biases and other parameters that are not weights of layers."""
        return sum(t.numel * t.bits // 8 for t in self.floats if not t.is_weight)

    @property
    def effective_bits(self) -> float:
        """`8 * weight_bytes / num_weights`: every stored bit, over every weight.

        Layers pinned to 8 bits and layers left in float are counted.
        """
        return 8 * self.weight_bytes / self.num_weights if self.num_weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return {
            "activation_bits": self.activation_bits,
            "layers": [
                {**asdict(layer), "bits": _run_lengths(layer.bits)} for layer in self.layers
            ],
            "floats": [asdict(tensor) for tensor in self.floats],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: A value is out of range.
        """
        layers = tuple(
            LayerPlan(
                **{
                    **entry,
                    "shape": tuple(entry["shape"]),
                    "bits": tuple(b for b, count in entry["bits"] for _ in range(count)),
                }
            )
            for entry in data["layers"]
        )
        floats = tuple(FloatTensor(**entry) for entry in data["floats"])
        return cls(layers=layers, floats=floats, activation_bits=data["activation_bits"])

    def to_json(self) -> str:
        """JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


def _run_lengths(bits: tuple[int, ...]) -> list[list[int]]:
    """`(2, 2, 3)` -> `[[2, 2], [3, 1]]`: pairs of value and count, short in JSON."""
    runs: list[list[int]] = []
    for value in bits:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs
