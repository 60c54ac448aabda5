"""Sounds of the runner: their lengths, and the files.

This file is copied into exported folders, beside `run.py`.
"""

import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpqdm_fx.pipelines.medium import Medium, check_place, whole_file
from mpqdm_fx.pipelines.program_files import RunnerError

__all__ = ["Sounds"]

_LARGEST = (1 << 15) - 1  # of a sample of 16 bits


class Sounds(Medium):
    """A size is samples in each channel; values are about -1 to 1, codes int16.

    The settings say `sampling_rate`, samples a second.
    """

    noun: ClassVar[str] = "sound"
    measures: ClassVar[Mapping[str, type[int] | type[float]]] = {"seconds": float}
    file: ClassVar[str] = "sound.wav"

    def size(self, asked: Mapping[str, float]) -> tuple[int, ...]:
        """The shortest length that holds the seconds; the default where none are asked for."""
        if "seconds" not in asked:
            return self.sizes[0]
        seconds, rate = asked["seconds"], self.settings["sampling_rate"]
        # what is no number lies in no range
        holding = [size for size in self.sizes if 1 <= seconds * rate < size[0] + 1]
        if not holding:
            most = max(self.sizes)[0] / rate
            raise RunnerError(
                f"seconds is {seconds}; give at least {1 / rate:.2g} and at most {most:.6g}, the "
                f"longest sound that this folder has programs for"
            )
        return min(holding)

    def values(self, made: Tensor) -> NDArray[np.float32]:
        """Of [1, channels, samples]: [samples, channels], not clipped."""
        values: NDArray[np.float32] = made[0].transpose(0, 1).numpy()
        return values

    def codes(self, values: NDArray[np.float32]) -> NDArray[np.int16]:
        """int16 [samples, channels]; what is beyond full scale is clipped."""
        return (values.clip(-1, 1) * _LARGEST).round().astype(np.int16)

    def check_output(self, path: Path) -> None:
        """Refuse what is no WAV file."""
        if path.suffix.lower() != ".wav":
            raise RunnerError(f"{path}: sounds are written as WAV files; give a name with .wav")
        check_place(path)

    def write(self, codes: NDArray[Any], path: Path) -> None:
        """Write int16 [samples, channels] as PCM of 16 bits."""
        with whole_file(path) as part, wave.open(str(part), "wb") as file:
            file.setnchannels(codes.shape[1])
            file.setsampwidth(2)
            file.setframerate(round(self.settings["sampling_rate"]))
            file.writeframes(codes.astype("<i2").tobytes())
