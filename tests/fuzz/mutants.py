"""Seeded mutants of files, and what may come of reading one.

A reader that is given a mutant refuses it in one of the package's own errors, or gives what the
original gives. It never raises anything else, takes bounded time and memory, and never ends the
process. `check_mutants` holds a reader to that.
"""

import copy
import json
import math
import random
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from mpqdm_fx.errors import MPQError

#: Mutants of each reader in the test command, and behind `-m matrix`.
FEW, MANY = 500, 10_000
AMOUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.matrix)]

SECONDS = 20.0  # for one mutant, on a busy machine
BYTES = 2**30  # the process may grow by while all are read

_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    9,
    255,
    2**31,
    2**53,
    -(2**63),
    0.0,
    -0.5,
    1e-320,
    1e308,
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/dev/zero",
    "os.system",
    "inf",
    "nan",
    "\u0000",
    "\ud7ff\u202e" * 100,
    "a" * 100_000,
    [],
    {},
    [[]],
    [0],
    {"": None},
    [[[[[[[[[[[[1]]]]]]]]]]]],
]

_TEXTS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 500 + "0" + "}" * 500,
    '{"a": 1, "a": 2}',
    "",
    "0x10",
    "'text'",
]


def json_mutants(original: Any, count: int, seed: int) -> Iterator[Any]:
    """Values in which one place is changed, removed, renamed, repeated or swapped with another."""
    generator = random.Random(seed)
    for _ in range(count):
        mutant = copy.deepcopy(original)
        for _ in range(generator.choice((1, 1, 1, 2, 4))):
            _change(mutant, generator)
        yield mutant


def _change(value: Any, generator: random.Random) -> None:
    places = [(node, key) for node in _nodes(value) for key in _keys(node)]
    if not places:
        return
    node, key = generator.choice(places)
    kind = generator.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[f"{key}_"] = node.pop(key)
    elif kind == 2 and isinstance(node, list):
        times = 1000 if generator.random() < 0.5 and len(json.dumps(node[key])) < 1000 else 1
        node.extend([copy.deepcopy(node[key]) for _ in range(times)])
    elif kind == 3:
        other, where = generator.choice(places)
        node[key] = copy.deepcopy(other[where]) if where in _keys(other) else None
    elif kind == 4 and type(node[key]) in (int, float):
        change = generator.choice((1, -1, 10**6, -(10**6), node[key], -2 * node[key]))
        node[key] += change if math.isfinite(node[key] + change) else 1  # JSON has no infinity
    else:
        node[key] = copy.deepcopy(generator.choice(_VALUES))


def _nodes(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _nodes(child)


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node)))


def text_mutants(original: Any, count: int, seed: int) -> Iterator[bytes]:
    """JSON texts that no `json.dumps` writes: a value in one place is replaced by raw text."""
    generator = random.Random(seed)
    mark = "\u0001mark\u0001"
    for _ in range(count):
        mutant = copy.deepcopy(original)
        node, key = generator.choice([(n, k) for n in _nodes(mutant) for k in _keys(n)])
        node[key] = mark
        yield json.dumps(mutant).replace(json.dumps(mark), generator.choice(_TEXTS)).encode()


def byte_mutants(original: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Contents with flipped bits, cut, lengthened, overwritten or moved parts."""
    generator = random.Random(seed)
    for _ in range(count):
        data = bytearray(original)
        # headers matter most
        start = generator.randrange(min(len(data), generator.choice((64, 4096, len(data)))))
        length = generator.choice((1, 4, 8, 100))
        kind = generator.randrange(6)
        if kind == 0:
            data[start] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del data[start : start + length]
        elif kind == 2:
            data[start:start] = generator.randbytes(length)
        elif kind == 3:
            data[start : start + length] = bytes([generator.choice((0, 255))]) * length
        elif kind == 4:
            del data[start:]
        else:
            other = generator.randrange(len(data))
            data[start : start + length] = data[other : other + length]
        yield bytes(data)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one mutant.

    Attributes:
        found: What was read; None if nothing was.
        reason: Why it was refused.
        fault: What else happened.
        seconds: How long it took.
    """

    found: Any = None
    reason: str | None = None
    fault: str | None = None
    seconds: float = 0.0


def outcome_of(
    read: Callable[[Any], Any], mutant: Any, refusal: type[BaseException] = MPQError
) -> Outcome:
    """Read one mutant."""
    start = time.perf_counter()
    told: dict[str, Any] = {}
    try:
        told["found"] = read(mutant)
    except refusal as error:
        told["reason"] = str(error)
    except BaseException:
        told["fault"] = traceback.format_exc()
    return Outcome(**told, seconds=time.perf_counter() - start)


def check_outcomes(outcomes: Iterable[Outcome], expected: Any, *, refused: float = 0.0) -> None:
    """Each mutant was refused in one line, or gave what is expected, in bounded time.

    Args:
        outcomes: What came of each.
        expected: What the original gives.
        refused: Least share of mutants that must be refused, so that the test reaches a reader.

    Raises:
        AssertionError: Something else came of one.
    """
    counts = {True: 0, False: 0}
    for number, outcome in enumerate(outcomes):
        reason = outcome.reason
        assert outcome.fault is None, f"mutant {number}: {outcome.fault}"
        counts[reason is not None] += 1
        if reason is None:
            assert outcome.found == expected, f"mutant {number} was read as something else"
        else:
            assert len(reason.splitlines()) == 1, f"mutant {number}: {reason}"
        assert outcome.seconds < SECONDS, f"mutant {number} took too long"
    assert counts[True] >= refused * sum(counts.values()), counts


def check_mutants(
    mutants: Iterable[Any], read: Callable[[Any], Any], expected: Any, *, refused: float = 0.0
) -> None:
    """Read every mutant: each is refused in an error of the package, or gives what is expected.

    Args:
        mutants: The mutants.
        read: Writes one and reads it; its result is compared by `==`.
        expected: What the original gives.
        refused: See `check_outcomes`.

    Raises:
        AssertionError: Something else came of one, or memory grew by too much.
    """
    before = peak_bytes()
    check_outcomes((outcome_of(read, mutant) for mutant in mutants), expected, refused=refused)
    grown = peak_bytes() - before
    assert grown < BYTES, f"reading took {grown} bytes"


def peak_bytes() -> int:
    """Most memory that this process had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
