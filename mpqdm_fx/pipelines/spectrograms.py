"""A sound as a picture: how loud each frequency is at each time."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["FLOOR_DB", "spectrogram"]

#: Decibels below a sine of full scale that are black.
FLOOR_DB = 100.0
_ROWS, _COLUMNS = 128, 256  # of the picture, at most
_WINDOW = 2048  # samples, at most


def spectrogram(sound: Tensor) -> Tensor:
    """The power of a sound over time, in decibels.

    Args:
        sound: Float [channels, samples], full scale from -1 to 1; channels are averaged.

    Returns:
        Float [1, at most 128, at most 256] in -1..1: low frequencies at the bottom, white as loud
        as a sine of full scale.
    """
    mono = sound.float().mean(dim=0)
    window = min(_WINDOW, max(8, 1 << (len(mono) // 4).bit_length()))
    if len(mono) < window:
        mono = functional.pad(mono, (0, window - len(mono)))
    shape = torch.hann_window(window)
    bands = torch.stft(
        mono, window, hop_length=window // 4, window=shape, center=False, return_complex=True
    )
    power = (2 * bands.abs() / shape.sum()).square()[1:]  # without what is constant
    size = (min(_ROWS, power.shape[0]), min(_COLUMNS, power.shape[1]))
    coarse = functional.adaptive_avg_pool2d(power[None], size)
    decibels = 10 * coarse.clamp(min=1e-20).log10()
    return (1 + 2 * decibels / FLOOR_DB).clamp(-1, 1).flip(1)
