"""One check for every setting: a value against its annotation, in one line if it does not fit.

Bounds stand where the type stands, `weight_bits: Annotated[int, Between(1, 8)]`, so that a field is
declared, documented and checked in one place. `check_fields` judges a dataclass after it was made,
`checked` the arguments of a function before it runs.

Stricter than Python: `True` is no integer, 3.0 is none either, and NaN and infinity are no numbers.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from mpqdm_fx.errors import ConfigError

__all__ = [
    "MAX_SEED",
    "Between",
    "Bits",
    "Bytes",
    "Count",
    "DerivedSeed",
    "NonNegative",
    "Positive",
    "Seed",
    "Share",
    "Some",
    "check_fields",
    "check_value",
    "checked",
]

MAX_SEED = 2**62
"""Seeds are below it: generators take 64 bits, and counters are added."""

_LARGEST = 1e30
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Between:
    """Bounds of a number, both allowed, as metadata of `Annotated`.

    Attributes:
        low: Smallest value.
        high: Largest value.
        above: Whether `low` itself is too small.
        below: Whether `high` itself is too large.
        hint: What else the message is to say: the reason, or where to go with another value.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    hint: str = ""

    def holds(self, value: float) -> bool:
        """Whether a finite number is inside."""
        high_enough = value > self.low if self.above else value >= self.low
        return high_enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = _power(self.low), _power(self.high)
        if self.high >= _LARGEST:
            return f"above {low}" if self.above else f"of at least {low}"
        if self.above or self.below:
            start = "above" if self.above else "of at least"
            end = "below" if self.below else "up to"
            return f"{start} {low} and {end} {high}"
        return f"from {low} to {high}"


Bits = Annotated[int, Between(1, 8, hint="every level is an int8 value")]
"""Width of a code."""

Count = Annotated[int, Between(1, 2**20)]
"""How many of something that there has to be: runs, steps, rows."""

Some = Annotated[int, Between(0, 2**20)]
"""The same, where there may be none."""

Seed = Annotated[int, Between(0, MAX_SEED, below=True)]

DerivedSeed = Annotated[int, Between(0, 2 * MAX_SEED, below=True)]
"""A seed that a counter was added to."""

Bytes = Annotated[int, Between(1, 2**62)]
"""Memory or disk."""

Positive = Annotated[float, Between(0, _LARGEST, above=True)]
NonNegative = Annotated[float, Between(0, _LARGEST)]

Share = Annotated[float, Between(0, 1, below=True)]
"""A part that leaves something of the whole."""


def check_value(value: object, kind: Any, name: str) -> None:
    """Check one value against an annotation.

    Args:
        value: Any object.
        kind: Annotation: a class, `None`, `Annotated` with `Between`, `Literal`, a union, a tuple,
            sequence or mapping of such. Whatever else it says is not judged.
        name: What the value is, for the message.

    Raises:
        ConfigError: The value does not fit; names it, its type and what is allowed.
    """
    if not _fits(value, kind):
        raise ConfigError(f"{name}={_shown(value)}: give {_allowed(kind)}")


def check_fields(record: Any, where: str = "") -> None:
    """Check every field of a dataclass against its annotation; for `__post_init__`.

    Args:
        record: An instance; only fields that `__init__` takes are judged.
        where: What stands before a field's name in the message.

    Raises:
        ConfigError: A field does not fit.
    """
    for name, kind in _kinds(record.__class__).items():
        check_value(getattr(record, name), kind, f"{where}{name}")


def checked(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a function check numbers, words and flags among its arguments before it runs.

    Arguments of other kinds (models, tensors, paths) are left to the function.

    Raises:
        ConfigError: From the function, when an argument does not fit its annotation.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python says best what is wrong with the call
        for name, kind in _plain_arguments(function).items():
            if name in given:
                check_value(given[name], kind, name)
        return function(*args, **kwargs)

    return run


@functools.cache
def _kinds(record: type) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(record) if field.init]
    try:
        hints = get_type_hints(record, include_extras=True)
    except NameError:  # a user's pass that was defined in a function
        hints = {field.name: Any if isinstance(field.type, str) else field.type for field in fields}
    return {field.name: hints[field.name] for field in fields}


@functools.cache
def _plain_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    return {name: kind for name, kind in hints.items() if name != "return" and _is_plain(kind)}


def _is_plain(kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return all(_is_plain(part) for part in get_args(kind))
    if origin is tuple:
        return all(_is_plain(part) for part in get_args(kind) if part is not Ellipsis)
    return origin in (Annotated, Literal) or kind in (int, float, bool, types.NoneType)


def _fits(value: object, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        bounds = [part for part in parts[1:] if isinstance(part, Between)]
        return _fits(value, parts[0]) and all(bound.holds(value) for bound in bounds)  # type: ignore[arg-type]
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in parts)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return _is_finite(value)
    if origin is tuple and parts[-1:] != (Ellipsis,):
        return (
            isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
        )
    if origin is not None:
        return isinstance(value, origin) and _entries_fit(value, origin, parts)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _entries_fit(value: Any, origin: type, parts: tuple[Any, ...]) -> bool:
    if issubclass(origin, Mapping):
        return all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if isinstance(value, str | bytes):
        return False
    if not issubclass(origin, Sequence):
        return True
    entries: Iterable[tuple[type, object]] = ((type(entry), entry) for entry in value)
    with contextlib.suppress(TypeError):  # entries without a hash
        entries = {(type(entry), entry) for entry in value}  # a plan's widths come thousandfold
    return all(_fits(entry, parts[0]) for _, entry in entries)


def _is_finite(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _allowed(kind: Any) -> str:
    """`an integer from 1 to 8 or None`: what fits an annotation, in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [part for part in parts[1:] if isinstance(part, Between)]
        hints = "".join(f" ({bound.hint})" for bound in bounds if bound.hint)
        number = "an integer" if parts[0] is int else "a number"
        return f"{number} {' '.join(map(str, bounds))}{hints}"
    if origin is Literal:
        return _listed([repr(word) for word in parts])
    if origin in (Union, types.UnionType):
        return _listed([_allowed(part) for part in parts])
    if origin is tuple:
        if parts[-1:] == (Ellipsis,):
            return f"a tuple of {_plural(parts[0])}"
        return f"a tuple of {len(parts)}: {', '.join(map(_allowed, parts))}"
    if origin is not None:
        return f"a {origin.__name__.lower()} of {_plural(parts[-1])}"
    words = {int: "an integer", float: "a finite number", bool: "True or False", str: "a text"}
    if kind in words:
        return words[kind]
    return "None" if kind is types.NoneType else f"a {getattr(kind, '__name__', kind)}"


def _plural(kind: Any) -> str:
    return f"entries that are each {_allowed(kind)}"


def _listed(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _shown(value: object) -> str:
    """The value, cut short, and its type."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, an object that is half made
        text = "..."
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if value is None else f"{text} ({name})"


def _power(end: float) -> str:
    """A bound as people write it: `2^62`, not `4611686018427387904`."""
    for less in (0, 1):
        whole = int(end) + less
        if whole > 2**16 and whole & (whole - 1) == 0:
            return f"2^{whole.bit_length() - 1}" + (" - 1" if less else "")
    return f"{end:g}" if abs(end) < 1e6 else str(end)
