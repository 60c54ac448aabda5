"""The road of passes: what runs on a graph, in running order."""

import inspect
from dataclasses import dataclass

from mpqdm_fx.backends.xnnpack.pipelines import DECOMPOSE, REMEDIES
from mpqdm_fx.passes.base import GraphPass
from mpqdm_fx.passes.pipelines import NORMALIZE, QUANTIZE
from mpqdm_fx.passes.registry import known_passes, name_of

__all__ = ["PassStage", "pass_road"]


@dataclass(frozen=True, kw_only=True)
class PassStage:
    """Passes that run together.

    Attributes:
        name: Name of the stage.
        meaning: When they run, in one line.
        passes: First line of what each says of itself, by name.
    """

    name: str
    meaning: str
    passes: dict[str, str]


def pass_road() -> list[PassStage]:
    """Every pass of this package, stage by stage; what no list runs comes last."""
    lists = {
        "normalize": ("on the traced graph, in this order", [type(p) for p in NORMALIZE]),
        "quantize": ("with what calibration gave", list(QUANTIZE)),
        "xnnpack, decompose": (
            "on the rounded graph, in this order", [type(p) for p in DECOMPOSE.passes],
        ),
        "xnnpack, remedies": (
            "on the converted graph, in this order", [type(p) for p in REMEDIES.passes],
        ),
    }  # fmt: skip
    listed = {pass_class for _, passes in lists.values() for pass_class in passes}
    classes = [c for c in known_passes().values() if c.__module__.startswith("mpqdm_fx.")]
    lists["where layers need it"] = ("on some layers", [c for c in classes if c not in listed])
    return [
        PassStage(name=name, meaning=meaning, passes={name_of(c): _first_line(c) for c in passes})
        for name, (meaning, passes) in lists.items()
    ]


def _first_line(pass_class: type[GraphPass]) -> str:
    return (inspect.getdoc(pass_class) or "").partition("\n")[0]
