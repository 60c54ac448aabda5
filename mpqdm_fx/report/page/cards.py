"""The numbers of the first screen: of one model, or of a folder of several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpqdm_fx.report.page import text
from mpqdm_fx.report.record import Costs, PartRecord, ReportRecord
from mpqdm_fx.report.words import word_of_sqnr

__all__ = ["Card", "Whole", "cards_of", "whole_of"]

_GOOD_DB = 20  # "close"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One of the numbers on the first screen.

    Attributes:
        name: What it is.
        value: The number.
        unit: Behind it.
        note: What it is to be compared with.
        good: Whether it is what one would wish; None if that cannot be said.
    """

    name: str
    value: str
    unit: str = ""
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Several models of one folder together.

    Attributes:
        cards: The first screen.
        rows: A row of the table for each: name, weights, bytes, milliseconds, peak and the same in
            float, and its output's error.
    """

    cards: tuple[Card, ...]
    rows: tuple[tuple[str, ...], ...]


def cards_of(part: PartRecord) -> tuple[Card, ...]:
    """The five numbers that matter: size, time, memory, quality, whether the program is whole."""
    name = "Size" if part.program is None else "Program"
    return (
        _size(name, part.shipped_bytes, part.float32_bytes),
        _time(part),
        _memory(part),
        _quality(part),
        _bits(part) if part.program is None else _wholeness((part,)),
    )


def whole_of(record: ReportRecord) -> Whole | None:
    """What is to be said of all models of a folder together; None of one quantized model."""
    parts = record.all_parts
    if len(record.parts) == 1 == len(parts):
        return None
    denoiser = max(parts, key=lambda part: part.calls_per_step)
    largest = max(parts, key=lambda part: part.peak_bytes or 0)
    return Whole(
        cards=(
            _size(
                "Programs",
                sum(part.shipped_bytes for part in parts),
                sum(part.float32_bytes for part in parts),
            ),
            _time(denoiser),
            _memory(largest, f"{largest.name}, "),
            _quality(denoiser)
            if isinstance(denoiser, PartRecord)
            else Card(name="Noise SQNR", value="float", note="the denoiser was not quantized"),
            _wholeness(parts),
        ),
        rows=tuple(map(_row, parts)),
    )


def _row(part: Costs) -> tuple[str, ...]:
    weights, ratio = "float", ""
    if isinstance(part, PartRecord):
        weights = f"{text.bits_text(part.mean_bits)} bits"
        ratio = text.db_text(part.epsilon_sqnr_db)
    times, peaks = (
        (part.milliseconds, part.float_milliseconds),
        (part.peak_bytes, part.float_peak_bytes),
    )
    return (
        part.name,
        weights,
        text.bytes_text(part.shipped_bytes),
        text.bytes_text(part.float32_bytes),
        *(text.NONE if value is None else f"{value:,.2f}" for value in times),
        *(text.NONE if value is None else text.bytes_text(value) for value in peaks),
        ratio or text.NONE,
    )


def _size(name: str, size: int, whole: int) -> Card:
    value, _, unit = text.bytes_text(size).partition(" ")
    return Card(
        name=name,
        value=value,
        unit=unit,
        note=f"{text.size_text(size, whole)}, {text.bytes_text(whole)}",
        good=size < whole,
    )


def _time(part: Costs) -> Card:
    name = "Time a step" if part.calls_per_step else "Time a call"
    if part.milliseconds is None:
        return Card(name=name, value=text.NONE, note="not measured")
    note = ""
    if part.float_milliseconds:
        note = f"eager float takes {part.float_milliseconds:.1f} ms; "
    if part.calls_per_step > 1:
        note += f"{part.calls_per_step} calls, "
    return Card(
        name=name,
        value=f"{part.milliseconds:.1f}",
        unit="ms",
        note=f"{note}batch 1, {part.threads} thread{'' if part.threads == 1 else 's'}",
        good=None
        if part.float_milliseconds is None or part.program is None
        else part.milliseconds <= part.float_milliseconds,
    )


def _memory(part: Costs, of: str = "") -> Card:
    if part.peak_bytes is None:
        return Card(name="Peak memory", value=text.NONE, note="not measured")
    value, _, unit = text.bytes_text(part.peak_bytes).partition(" ")
    float_peak = part.float_peak_bytes
    call = "step" if part.calls_per_step == 1 else "call"
    floats = (
        ""
        if float_peak is None
        else f"float takes {text.bytes_text(float_peak)}; load and one {call}"
    )
    return Card(
        name="Peak memory",
        value=value,
        unit=unit,
        note=f"{of}{floats}".removesuffix(", "),
        good=None if float_peak is None or part.program is None else part.peak_bytes <= float_peak,
    )


def _quality(part: PartRecord) -> Card:
    output = "Noise" if part.calls_per_step else "Output"
    db = part.backend_epsilon_sqnr_db
    db = part.epsilon_sqnr_db if db is None else db
    if db is None:
        return Card(name=f"{output} SQNR", value=text.NONE, note="not measured")
    exact = db == math.inf
    subject = "output of one call" if part.calls_per_step else "its output"
    return Card(
        name=f"{output} SQNR",
        value=text.db_text(db),
        unit="" if exact else "dB",
        note=f"{word_of_sqnr(db)}: {subject} against float",
        good=db >= _GOOD_DB,
    )


def _bits(part: PartRecord) -> Card:
    return Card(
        name="Bits a weight",
        value=text.bits_text(part.effective_bits),
        note="of all weights, all overhead counted",
    )


def _wholeness(parts: Sequence[Costs]) -> Card:
    """Whether XNNPACK runs each method whole, but for one node that it may not know.

    Own kernels part a program; where there are some, their layers are told in its place.
    """
    methods = [method for part in parts for method in part.programs]
    whole = all(method.undelegated <= 1 and method.subgraphs == 1 for method in methods)
    subgraphs = sum(method.subgraphs for method in methods)
    outside = sum(method.undelegated for method in methods)
    note = f"{subgraphs} XNNPACK subgraph{'' if subgraphs == 1 else 's'}"
    if len(methods) > 1:
        note += f" in {len(methods)} methods"
    if own := sum(len(method.own_layers) for method in methods):
        crossings = sum(method.crossings for method in methods)
        copies = sum(method.layout_copies for method in methods)
        return Card(
            name="In own kernels",
            value=f"{own}",
            unit="layers",
            note=f"{crossings} crossings, {copies} layout copies; {note}",
        )
    return Card(
        name="One whole program" if len(methods) == 1 else "Whole programs",
        value="yes" if whole else "no",
        note=f"{note}, {outside} node{'' if outside == 1 else 's'} outside",
        good=whole,
    )
