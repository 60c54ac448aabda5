"""What numbers mean, in a word or two: all thresholds stand here.

The thresholds are a reading aid and no theorem: they were set by looking at pictures and at the
tables of `benchmarks/quality.py`. Decibels are of the whole output; 10 dB are a tenth of the
squared error, 20 dB a hundredth.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["WORD_SCALES", "WordScale", "word_of", "word_of_sqnr", "word_of_x0"]


@dataclass(frozen=True, kw_only=True)
class WordScale:
    """Words of a metric, the best one first.

    Attributes:
        steps: The worst value that still has each word.
        otherwise: The word of what is worse than all of them.
        higher_is_better: Whether larger values are better.
        samples: Samples that the words were set by; what is biased by their number has no word of
            fewer.
    """

    steps: tuple[tuple[float, str], ...]
    otherwise: str
    higher_is_better: bool
    samples: int = 1

    def word(self, value: float) -> str:
        """The word of a value; that of NaN is `not a number`."""
        if math.isnan(value):
            return "not a number"
        for bound, word in self.steps:
            if value >= bound if self.higher_is_better else value <= bound:
                return word
        return self.otherwise


WORD_SCALES: Mapping[str, WordScale] = {
    # One call on the same inputs. Eight-bit rounding of all inputs alone leaves about 40 dB.
    "epsilon_sqnr": WordScale(
        steps=((40, "as float"), (30, "very close"), (20, "close"), (10, "rough")),
        otherwise="broken",
        higher_is_better=True,
    ),
    # A whole run from the same noise, along which errors add up: 15 to 20 dB below one call.
    "x0_sqnr": WordScale(
        steps=(
            (30, "the same pictures"),
            (20, "hardly a visible change"),
            (12, "small changes"),
            (6, "changed pictures"),
        ),
        otherwise="other pictures",
        higher_is_better=True,
    ),
    # Of samples from the same noise, as the three below; see `report.image_metrics`.
    "psnr": WordScale(
        steps=(
            (40, "the same pictures"),
            (30, "hardly a visible change"),
            (20, "small changes"),
            (14, "changed pictures"),
        ),
        otherwise="other pictures",
        higher_is_better=True,
    ),
    "ssim": WordScale(
        steps=(
            (0.98, "the same pictures"),
            (0.95, "hardly a visible change"),
            (0.8, "small changes"),
            (0.5, "changed pictures"),
        ),
        otherwise="other pictures",
        higher_is_better=True,
    ),
    # The bundled classifier's features: between two sets of 256 float samples of other noise the
    # distance is 7. Of fewer it is larger, of the same model: 7 of 8 samples, 1 of 256.
    "frechet_distance": WordScale(
        steps=((0.5, "as float"), (2, "very close"), (7, "close"), (30, "another distribution")),
        otherwise="broken",
        higher_is_better=False,
        samples=256,
    ),
}
"""By metric, as `report.gates.METRICS` names them. Metrics without an entry have no word."""


def word_of(metric: str, value: float) -> str:
    """The word of a metric's value; empty for a metric that has none.

    Args:
        metric: Name as of `report.gates.METRICS`.
        value: In the metric's unit.
    """
    ladder = WORD_SCALES.get(metric)
    return "" if ladder is None else ladder.word(value)


def word_of_sqnr(db: float) -> str:
    """What the signal-to-noise ratio of a model's output means.

    Args:
        db: Decibels of one call on the same inputs (noise SQNR, `epsilon_sqnr`).
    """
    return word_of("epsilon_sqnr", db)


def word_of_x0(db: float) -> str:
    """What the signal-to-noise ratio of final samples from the same noise means.

    Args:
        db: Decibels (`x0_sqnr`).
    """
    return word_of("x0_sqnr", db)
