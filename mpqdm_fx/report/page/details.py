"""One layer's row of a page, and the small drawings that open behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mpqdm_fx.report.page.text import bits_text, bytes_text, db_text, shape_text
from mpqdm_fx.report.record import LayerNumbers, LevelNumbers, PartRecord, Spread

__all__ = ["BIT_AXIS", "LayerRow", "layer_rows"]

_WIDTH, _HEIGHT = 260, 96  # of a drawing, in its own units


#: What every drawing of bits stands on, once in a page: a line and the eight widths.
BIT_AXIS = (
    '<svg width="0" height="0" aria-hidden="true" class="hidden"><defs><g id="bit-axis">'
    f'<path d="M0 76H{_WIDTH}" class="rule"/>'
    + "".join(
        f'<text x="{(width - 0.5) * _WIDTH / 8:.0f}" y="91" class="t">{width}</text>'
        for width in range(1, 9)
    )
    + "</g></defs></svg>"
)


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A row of the table of layers.

    Attributes:
        index: Place in running order.
        layer: Its numbers.
        shape: Its weight's shape.
        bits: Average bits.
        bytes: Stored bytes.
        sqnr: Its own SQNR.
        gain: What propagation brought.
        drawings: Title and `<svg>` of what opens behind it.
        missing: Why others are not there.
    """

    index: int
    layer: LayerNumbers
    shape: str
    bits: str
    bytes: str
    sqnr: str
    gain: str
    drawings: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]


def layer_rows(part: PartRecord) -> list[LayerRow]:
    """Rows of all layers of a part, in running order."""
    return [_row(part, index, layer) for index, layer in enumerate(part.layers)]


def _row(part: PartRecord, index: int, layer: LayerNumbers) -> LayerRow:
    drawings, missing = [], []
    if layer.bits:
        drawings.append(("Channels by their bits", _bits(layer)))
    else:
        missing.append("Entropy-coded: its channels have no fixed width.")
    if layer.kurtosis is not None:
        drawings.append(("Kurtosis of channels (3 is Gaussian)", _box(layer.kurtosis, "kurtosis")))
    elif "kurtosis" in part.missing:
        missing.append(f"No kurtosis: {part.missing['kurtosis']}.")
    if layer.sensitivity is not None:
        drawings.append(("Sensitivity of channels", _box(layer.sensitivity, "sensitivity")))
    elif "sensitivity" in part.missing:
        missing.append(f"No sensitivity: {part.missing['sensitivity']}.")
    if layer.sqnr_db is None and layer.running_sqnr_db is not None:
        missing.append("Its SQNR is that in the running model, errors of earlier layers included.")
    if layer.by_level:
        drawings.append(("SQNR by noise level, dB", _line(layer.by_level, part.levels)))
    return LayerRow(
        index=index,
        layer=layer,
        shape=shape_text(layer.shape),
        bits=bits_text(layer.mean_bits),
        bytes=bytes_text(layer.bytes),
        sqnr=db_text(layer.known_sqnr_db),
        gain=_gain(layer),
        drawings=tuple(drawings),
        missing=tuple(missing),
    )


def _gain(layer: LayerNumbers) -> str:
    if layer.sqnr_db is None or layer.base_sqnr_db is None:
        return ""
    gain = layer.sqnr_db - layer.base_sqnr_db
    return f"{gain:+.1f}" if math.isfinite(gain) and abs(gain) >= 0.05 else ""


def _drawing(label: str, body: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"{''.join(body)}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "v") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}">{escape(text)}</text>'


def _bits(layer: LayerNumbers) -> str:
    """A bar for each width, as high as it has channels."""
    most, step = max(layer.bits.values()), _WIDTH / 8
    body = ['<use href="#bit-axis"/>']
    for width, count in layer.bits.items():
        x, height = (int(width) - 1) * step, max(1.0, 56 * count / most)
        body.append(
            f'<rect x="{x + 4:.0f}" y="{76 - height:.0f}" width="{step - 8:.0f}" '
            f'height="{height:.0f}"/>'
        )
        body.append(_text(x + step / 2, 71 - height, str(count)))
    counts = ", ".join(f"{count} at {width} bits" for width, count in layer.bits.items())
    return _drawing(f"Channels: {counts}", body)


def _box(spread: Spread, title: str) -> str:
    """Extremes and quartiles on a logarithmic axis, or a straight one if a value is not above 0."""
    points = [spread.smallest, spread.lower, spread.middle, spread.upper, spread.largest]
    scale = [math.log10(p) for p in points] if points[0] > 0 else points
    low, span = scale[0], (scale[-1] - scale[0]) or 1.0
    smallest, lower, middle, upper, largest = (
        14 + (_WIDTH - 28) * (value - low) / span for value in scale
    )
    wide = max(upper - lower, 2)
    body = [
        f'<path d="M{smallest:.0f} 42H{largest:.0f}"/>',
        f'<rect x="{lower:.0f}" y="30" width="{wide:.0f}" height="24" class="box"/>',
        f'<path d="M{middle:.0f} 27V57" class="median"/>',
        _text(min(max(middle, 40), _WIDTH - 40), 19, f"median {_number(points[2])}"),
        _text(2, 78, _number(points[0]), "s"),
        _text(_WIDTH - 2, 78, _number(points[4]), "e"),
    ]
    numbers = ", ".join(map(_number, points))
    return _drawing(f"{title}: smallest, quartiles and largest {numbers}", body)


def _line(values: Sequence[float], levels: Sequence[LevelNumbers]) -> str:
    """Decibels by level, in the order of the levels: from noise to picture where that is known."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        exact = all(value == math.inf for value in values)
        word = "exact" if exact else "no number"
        return _drawing(f"{word} at every noise level", [_text(_WIDTH / 2, 48, word)])
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    step = (_WIDTH - 40) / max(1, len(values) - 1)
    points = [
        (20 + index * step, 62 - 36 * (value - low) / span)
        for index, value in enumerate(values)
        if math.isfinite(value)
    ]
    path = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
    body = [f'<polyline points="{path}"/>']
    labels = {0, len(points) - 1, finite.index(low), finite.index(max(finite))}
    for index, ((x, y), value) in enumerate(zip(points, finite, strict=True)):
        # the label of a neighbour would stand on it
        if index in labels and not (index - 1 in labels and index not in (0, len(points) - 1)):
            body.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="2.5"/>')
            body.append(_text(x, y - 8, f"{value:.0f}"))
    first, last = (f"{levels[end].level:.4g}" for end in (0, -1))
    body.append(_text(2, 91, first, "s"))
    body.append(_text(_WIDTH - 2, 91, last, "e"))
    decibels = ", ".join(db_text(value) for value in values)
    return _drawing(f"dB by noise level, {first} to {last}: {decibels}", body)


def _number(value: float) -> str:
    return f"{value:.3g}"
