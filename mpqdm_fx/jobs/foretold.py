"""Which stages a job will have and about how long each takes, before anything is measured.

Seconds are of the bundled model with default settings and one thread; a larger model or another
machine takes longer by a factor, which progress finds as it goes (`progress.expect`).
"""

from collections.abc import Mapping

from mpqdm_fx.calibration.activation_choice import options_of
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.models.sources import Source

__all__ = ["distill_stages", "folder_stages", "quantize_stages"]

_TYPICAL: Mapping[str, float] = {
    "float model's runs": 3,
    "tracing": 6,
    "recording calls": 1,
    "channels": 2,
    "ranges": 6,
    "sensitivities": 11,
    "rounding errors": 19,
    "rounding": 20,
    "judging": 1,
    "effects of steps": 20,
    "training": 300,
    "lowering": 150,
    "comparing forms": 55,
    "measuring": 15,
    "drawing": 2,
    "peak memory": 25,
}


def quantize_stages(
    source: Source, config: MPQConfig, backend: str, samples: int
) -> dict[str, float]:
    """Seconds by stage of `quantize_to_folder`, in running order.

    Args:
        source: What is quantized.
        config: Settings.
        backend: What is written.
        samples: Images in the grid.
    """
    options = options_of(config)
    measured = config.allocation == "measured"
    comes = {
        "float model's runs": source.calls is None,
        "tracing": True,
        "recording calls": True,
        "channels": bool(options),
        "ranges": any(option.kind == "static" for option in options),
        "sensitivities": bool(options) or measured or config.row_weights == "output",
        "rounding errors": measured,
        "rounding": True,
        "judging": config.judge,
    }
    quantizing = {name: _TYPICAL[name] for name, does in comes.items() if does}
    return quantizing | folder_stages(source, backend, samples)


def distill_stages(
    source: Source, config: DistillConfig, backend: str, samples: int
) -> dict[str, float]:
    """Seconds by stage of `distill_folder`, in running order.

    Args:
        source: The float model.
        config: Settings of the training.
        backend: What is written.
        samples: Images in the grid.
    """
    names = ["float model's runs", *(["effects of steps"] if config.final_share else ())]
    before = {name: _TYPICAL[name] for name in names}
    training = {"training": config.seconds or _TYPICAL["training"]}
    return before | training | folder_stages(source, backend, samples)


def folder_stages(source: Source, backend: str, samples: int) -> dict[str, float]:
    """Seconds by stage of `write_folder`, in running order.

    Args:
        source: The float model.
        backend: What is written.
        samples: Images in the grid.
    """
    drawn = source.scheduler is not None
    comes = {
        "lowering": backend == "xnnpack",
        "comparing forms": True,
        "measuring": True,
        "drawing": drawn and samples > 0,
        "peak memory": drawn,
    }
    found = {name: _TYPICAL[name] for name, does in comes.items() if does}
    if backend != "xnnpack":  # no graphs of the program are compared
        found["comparing forms"] /= 4
    return found
