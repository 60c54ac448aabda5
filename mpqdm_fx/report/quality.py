"""What a ratio of signal to noise means for the pictures, in words."""

import math

__all__ = ["QUALITY", "sqnr_in_words"]

#: From so many dB of noise SQNR on. On the bundled model (Frechet distance of 256 samples to those
#: of the float model from the same noise; its classifier's accuracy, 0.98 for the float model):
#: about 1 and 0.97 at 31 dB, 3 and 0.95 at 24, 5 and 0.95 at 21, 32 and 0.84 at 16.
QUALITY: tuple[tuple[float, str], ...] = (
    (30.0, "very close: hard to tell from the float model"),
    (22.0, "close: the same pictures, details differ"),
    (17.0, "fair: pictures differ visibly, look at them"),
    (-math.inf, "poor: many pictures are other ones"),
)


def sqnr_in_words(decibels: float) -> str:
    """What the SQNR of the predicted noise on held-out inputs means for pictures.

    Args:
        decibels: The ratio; inf where nothing differs.
    """
    if decibels == math.inf:
        return "equal"
    return next(words for least, words in QUALITY if decibels >= least)
