"""Which end of what a model is told is noise: most are told noise, some how clean a sample is."""

from typing import Literal

from mpqdm_fx.calibration.conventions import CONVENTIONS
from mpqdm_fx.report.record import PartRecord

__all__ = ["Told", "from_noise", "group_label", "levels_label", "told_of"]

Told = Literal["noise", "cleanness"]

_BY_NAME: dict[str, Told] = {
    **dict.fromkeys(
        (
            "timestep", "timesteps", "timestep_ratio", "sigma", "sigmas", "noise_level",
            "noise_levels", "noise_label", "noise_labels", "c_noise", "log_sigma",
        ),
        "noise",
    ),
    "log_snr": "cleanness",
    "logsnr": "cleanness",
}  # fmt: skip


def told_of(part: PartRecord) -> Told | None:
    """What grows with the number that a model is told; None where nobody knows.

    The class says it where a scheduler's loop calls it, else the argument's name. A time `t` of a
    class of the user's may run either way.

    Args:
        part: Its numbers.
    """
    argument = part.noise_argument
    convention = CONVENTIONS.get(part.model_class)
    if convention is not None and argument == convention.timestep:
        return "noise" if convention.time_end is None else "cleanness"
    return _BY_NAME.get(argument or "")


def from_noise(part: PartRecord) -> PartRecord:
    """The part with its levels in the order in which a picture is drawn, where that is known.

    Args:
        part: Its numbers, the largest level first.
    """
    if told_of(part) != "cleanness":
        return part
    layers = tuple(
        layer
        if layer.by_level is None
        else layer.model_copy(update={"by_level": layer.by_level[::-1]})
        for layer in part.layers
    )
    return part.model_copy(update={"levels": part.levels[::-1], "layers": layers})


def levels_label(part: PartRecord) -> str:
    """What an axis of the levels is called, in the order of `from_noise`."""
    if told_of(part) is None:
        return f"{part.noise_argument}: from large (left) to small (right)"
    return f"{part.noise_argument}: from noise (left) to picture (right)"


def group_label(part: PartRecord) -> str:
    """What an axis of groups of levels is called; they ascend in what the model is told."""
    ends = {"noise": "least noise", "cleanness": "most noise"}
    told = told_of(part)
    end = f"smallest {part.noise_argument or 'level'}" if told is None else ends[told]
    return f"group of noise levels, 1 has the {end}"
