"""Settings of a quantization run: frozen, validated, JSON round trip."""

import dataclasses
import difflib
import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import PlainValidator

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.validation import Between, Bits, Bytes, Count, Seed, check_fields, check_value

__all__ = [
    "MAX_TIMESTEP_GROUPS",
    "ActivationAllocation",
    "ActivationLevels",
    "ActivationMode",
    "Allocation",
    "Levels",
    "MPQConfig",
    "Override",
    "Rounding",
    "RowWeighting",
    "StoredSettings",
    "WeightStorage",
]

Allocation = Literal["measured", "omq", "uniform"]
Rounding = Literal["nearest", "gptq"]
Levels = Literal["uniform", "codebook", "int4"]
WeightStorage = Literal["fixed", "entropy"]
RowWeighting = Literal["output", "plain"]
ActivationAllocation = Literal["auto", "measured", "uniform"]
ActivationLevels = Literal["codebook", "uniform"]
ActivationMode = Literal["measured", "static", "timestep", "dynamic", "float"]

MAX_TIMESTEP_GROUPS = 64
"""Most groups of noise levels; each has a table entry for every quantized value."""

_WIDEST_MEASURED = 4  # average bits of inputs up to which widths of their own help samples
_LEAST = "a weight takes one bit at least, and scales come on top"

_WeightBits = Annotated[
    int,
    Between(
        1, 8, hint="every level is an int8 value; for an average between two give effective_bits"
    ),
]


@dataclass(frozen=True, kw_only=True)
class Override:
    """A rule for the layers whose name matches; of several matching rules the later one wins.

    Weights and activations are apart: a rule that says nothing of one leaves it to earlier rules.

    Attributes:
        pattern: Module name, shell-style glob over it (`"mid_block.*"`), or, after `re:`, a
            regular expression that is searched in it.
        weight_bits: Bits of every output channel of the layer (1..8), off the budget.
        skip: Leave the layer in floating point, activations included.
        activation_bits: Bits of the layer's input (1..8).
    """

    pattern: str
    weight_bits: Bits | None = None
    skip: bool = False
    activation_bits: Bits | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ConfigError("an override needs a non-empty `pattern`")
        check_fields(self, f"override {self.pattern!r}: ")
        bits = (self.weight_bits, self.activation_bits)
        if (bits == (None, None)) == (not self.skip):
            raise ConfigError(
                f"override {self.pattern!r}: give either skip=True, or weight_bits=1..8, "
                f"activation_bits=1..8 or both"
            )
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise ConfigError(
                    f"override {self.pattern!r}: not a regular expression: {error}"
                ) from None

    def matches(self, name: str) -> bool:
        """Whether the rule applies to the module called `name`."""
        if self.pattern.startswith("re:"):
            return re.search(self.pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)


def _as_override(entry: object) -> Override:
    if isinstance(entry, Override):
        return entry
    if isinstance(entry, Mapping):
        unknown = set(entry) - {field.name for field in dataclasses.fields(Override)}
        if unknown or "pattern" not in entry:
            raise ConfigError(
                f"override {dict(entry)!r}: the keys are pattern, weight_bits, "
                f"activation_bits, skip"
            )
        return Override(**entry)
    raise ConfigError(
        f"override {entry!r}: give an Override or a mapping with pattern and weight_bits, "
        f"activation_bits or skip"
    )


@dataclass(frozen=True, kw_only=True)
class MPQConfig:
    """What to quantize to, and how.

    Attributes:
        weight_bits: Average bits of a weight over the layers that share the budget, 1..8.
        activation_bits: Bits of a weight layer's input where no override says otherwise, 1..8.
            Programs for phones and torch.ao kernels run 8; other widths are for measuring.
        allocation: `"measured"` shares one budget of stored bits among all channels of all layers
            by what each channel's rounding does to the model's output; `"uniform"` gives every
            channel N bits; `"omq"` gives the output channels of a layer N-1, N or N+1 bits by the
            kurtosis of their weights (MPQ-DM, arXiv 2412.11549, section on Outlier-driven Mixed
            Quantization). The last two keep first, last, time and class layers at 8 bits.
        rounding: `"gptq"` rounds column by column with error feedback (arXiv 2210.17323);
            `"nearest"` rounds each weight to its nearest level.
        refinements: Rounds of coordinate descent and scale refits after GPTQ, 0..64.
        propagation: Strength of quantization error propagation (QEP, arXiv 2504.09629, equation
            6): 0 for none, up to 1; `"auto"` chooses strength and ridge of each layer on held-out
            calibration calls; 0.5 is the paper's mode.
        residuals: With `propagation="auto"`, let a layer whose output is added to another value
            make up for that value's error too (LoaQ, arXiv 2509.06297).
        bias_correction: Refit a bias to the mean error of its layer, where that lowers the error on
            held-out calls.
        judge: Compare the result with plain rounding at the same bits (nearest levels, scales that
            clip nothing) at the model's output on held-out calls, and take that where it errs less.
        row_weights: `"output"`: rows of a layer's statistics count by what errors do to the model's
            output at their noise level; `"plain"`: all alike, as in the papers.
        effective_bits: With `allocation="measured"`, stored bits over all weights: codes, scales,
            tables, tags, layers left in float. Default: what `allocation="uniform"` takes at
            `weight_bits`, its layers of 8 bits included.
        weight_bytes: The same budget in bytes; give one of the two.
        align: Channels that share a width, with `allocation="measured"`.
        max_rows: Input rows (positions) that a layer's statistics use at most.
        levels: `"uniform"`: evenly spaced, balanced levels; `"codebook"` fits 2^b int8 values for
            each channel of at most 4 bits, in layers whose measured output error it lowers, which
            pays where all channels have the same bits (`allocation="uniform"`, `"omq"`);
            `"int4"` has the uniform ones, but -8..7 in 4-bit channels of linear layers and 1x1
            convolutions, which XNNPACK stores at four bits a weight.
        weight_storage: `"fixed"`: each channel has codes of one width; `"entropy"`: whole numbers
            within int8 that an arithmetic coder stores by how frequent they are, rounded to least
            error plus the price of their bits. Programs have them as int8, which `--compress` takes
            to about the same size.
        overrides: Rules for single layers; later ones win; a rule that matches nothing is an
            error.
        seed: Seed of every sampled choice (which activations are kept for statistics).
        split_skips: Quantize the two halves of a skip concatenation with ranges of their own
            (Q-Diffusion's split shortcut) where a layer reads the concatenation directly.
        activation_mode: `"static"`: one range per tensor, what XNNPACK and torch.ao run;
            `"timestep"`: one per group of noise levels, told apart by the model's
            `noise_argument`, whatever that is; `"dynamic"`: computed at run time, per sample for
            convolutions, per row for linear layers and per pixel for 1x1 convolutions, what
            XNNPACK runs too; `"float"`: weights alone are quantized.
        activation_allocation: `"measured"` gives each input a width of its own, so that the average
            over all elements that layers read is `activation_bits`, by what its rounding does to
            the model's output; `"uniform"` gives all the same; `"auto"` measures up to 4 bits,
            where samples gain too, and gives all the same above. Without effect at 8 bits.
        activation_levels: `"codebook"` fits 2^b int8 values for each input of at most 4 bits whose
            range is fixed; `"uniform"`: evenly spaced codes.
        timestep_groups: Groups of noise levels, 1..64, for `activation_mode="timestep"`.
        noise_argument: The model's argument that tells noise levels, a number per sample: sigma,
            log-SNR, a time in 0..1, a timestep. Statistics, ranges by noise level and reports go
            by it. None finds it: `timestep`, else `sigma` and the field's other names.

    Raises:
        ConfigError: A value is outside its range.
    """

    weight_bits: _WeightBits = 4
    activation_bits: Bits = 8
    allocation: Allocation = "measured"
    rounding: Rounding = "gptq"
    refinements: Annotated[int, Between(0, 64)] = 4
    propagation: Annotated[float, Between(0, 1)] | Literal["auto"] = "auto"
    residuals: bool = False
    bias_correction: bool = True
    judge: bool = True
    row_weights: RowWeighting = "output"
    effective_bits: Annotated[float, Between(1, 32, hint=_LEAST)] | None = None
    weight_bytes: Bytes | None = None
    align: Annotated[int, Between(1, 4096)] = 1
    max_rows: Count = 8192
    levels: Levels = "uniform"
    weight_storage: WeightStorage = "fixed"
    overrides: Sequence[Override | Mapping[str, Any]] = ()
    seed: Seed = 0
    split_skips: bool = True
    activation_mode: ActivationMode = "static"
    slowdown: Annotated[float, Between(1, 100)] = 1.1
    activation_allocation: ActivationAllocation = "auto"
    activation_levels: ActivationLevels = "codebook"
    timestep_groups: Annotated[int, Between(1, MAX_TIMESTEP_GROUPS)] = 5
    noise_argument: str | None = None

    def __post_init__(self) -> None:
        check_value(self.overrides, Sequence, "overrides")
        object.__setattr__(self, "overrides", tuple(_as_override(e) for e in self.overrides))
        check_fields(self)
        self._check_budget()
        self._check_storage()

    def _check_storage(self) -> None:
        if self.weight_storage == "fixed":
            return
        wanted = {"allocation": "measured", "rounding": "gptq", "levels": "uniform"}
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"weight_storage='entropy' has no widths to share and levels of its own: it "
                    f"needs {name}={value!r}, not {getattr(self, name)!r}"
                )

    def _check_budget(self) -> None:
        budgets = [n for n in ("effective_bits", "weight_bytes") if getattr(self, n) is not None]
        if len(budgets) > 1:
            raise ConfigError("give effective_bits or weight_bytes, not both")
        if budgets and self.allocation != "measured":
            raise ConfigError(
                f"{budgets[0]} is a budget for allocation='measured', not for {self.allocation!r}"
            )

    def override_for(self, name: str) -> Override | None:
        """The rule for the weights of the layer called `name`: the last one that has a say."""
        for rule in reversed(self.rules):
            if (rule.skip or rule.weight_bits is not None) and rule.matches(name):
                return rule
        return None

    def activation_bits_of(self, name: str) -> int:
        """Bits of the input of the layer called `name`, where they are not measured."""
        return self.own_activation_bits(name) or self.activation_bits

    def own_activation_bits(self, name: str) -> int | None:
        """Bits of its input that an override gives the layer called `name`; None for none."""
        for rule in reversed(self.rules):
            if rule.activation_bits is not None and rule.matches(name):
                return rule.activation_bits
        return None

    @property
    def has_narrow_weights(self) -> bool:
        """Whether weights may have fewer bits than eight."""
        given = self.effective_bits is not None or self.weight_bytes is not None
        ruled = any((rule.weight_bits or 8) < 8 for rule in self.rules)
        return given or ruled or self.weight_bits < 8

    @property
    def measures_widths(self) -> bool:
        """Whether the width of each input is chosen by what its rounding costs."""
        widest = {"auto": _WIDEST_MEASURED, "measured": 7, "uniform": 0}[self.activation_allocation]
        return self.activation_mode != "float" and self.activation_bits <= widest

    @property
    def fits_activation_levels(self) -> bool:
        """Whether inputs of at most 4 bits get fitted levels where their ranges are fixed."""
        return self.activation_levels == "codebook"

    @property
    def narrowest_activation_bits(self) -> int:
        """The fewest bits that the input of a layer can have."""
        widths = [rule.activation_bits or self.activation_bits for rule in self.rules]
        return min([self.activation_bits, *widths])

    @property
    def rules(self) -> tuple[Override, ...]:
        """`overrides`, every entry as an `Override`."""
        return tuple(_as_override(entry) for entry in self.overrides)

    def check_overrides(self, names: Iterable[str]) -> None:
        """Refuse rules that match none of `names`.

        Raises:
            ConfigError: A rule matches nothing; the message lists the nearest names.
        """
        layers = list(names)
        for rule in self.rules:
            if not any(rule.matches(name) for name in layers):
                pattern = rule.pattern.removeprefix("re:")
                near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3) or layers[:3]
                raise ConfigError(
                    f"override {rule.pattern!r} matches no layer; nearest names: {', '.join(near)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "overrides": [dataclasses.asdict(rule) for rule in self.rules],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: A key is unknown, or a value out of range.
        """
        check_value(data, Mapping, "settings")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in set(data) - known)
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown setting {unknown[0]!r}{hint}")
        return cls(**data)

    def to_json(self) -> str:
        """JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)


StoredSettings = Annotated[MPQConfig, PlainValidator(MPQConfig.from_dict)]
"""Settings as a field of a `Strict` record."""
