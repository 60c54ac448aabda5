"""Which stages a job will have and about how long each takes, before anything is measured.

Seconds are of the bundled model with default settings and one thread; a larger model or another
machine takes longer by a factor, which progress finds as it goes (`progress.expect`).
"""

from collections.abc import Mapping

from mpqdm_fx.calibration.activation_choice import options_of
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.jobs.estimate import Finish, TrainingEstimate
from mpqdm_fx.jobs.result_folder import Form
from mpqdm_fx.models.source import Source
from mpqdm_fx.report.page.packages import renders

__all__ = ["distill_stages", "finish_stages", "folder_stages", "pareto_stages", "quantize_stages"]

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
    "lowering": 150,
    "comparing forms": 55,
    "measuring": 15,
    "drawing": 2,
    "peak memory": 25,
    "report": 10,
}


_CALIBRATION = ("float model's runs", "tracing", "recording calls")
_MEASURED = ("channels", "ranges", "sensitivities", "rounding errors")  # kept for all budgets
_SOLVING = ("rounding", "judging")
_JUDGING = 20.0  # pictures and metrics of a budget


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


def pareto_stages(
    source: Source, budgets: Mapping[float, MPQConfig], form: Form, *, samples: int | None
) -> dict[str, float]:
    """Seconds by stage of `pareto_to_folder`, in running order.

    Args:
        source: What is quantized.
        budgets: Settings of each budget.
        form: Form of the folder that is picked.
        samples: Images in its grid; None if none is picked.
    """
    stages: dict[str, float] = {}
    for place, (budget, config) in enumerate(budgets.items()):
        own = quantize_stages(source, config, form.backend, 0)
        begun = {name: own.pop(name) for name in _CALIBRATION if name in own}
        solving = sum(own[name] for name in _SOLVING if name in own)
        once = sum(own[name] for name in _MEASURED if name in own)
        stages |= begun if not place else {}
        stages[f"{budget:g} bits"] = solving + (0 if place else once) + _JUDGING
    return stages | ({} if samples is None else folder_stages(source, form.backend, samples))


def distill_stages(
    source: Source, config: DistillConfig, times: TrainingEstimate, samples: int, backend: str
) -> dict[str, float]:
    """Seconds by stage of `distill_folder`, in running order.

    Args:
        source: The float model.
        config: Settings of the training.
        times: What they will take.
        samples: Images in the grid.
        backend: What is written.
    """
    names = ["float model's runs", *(["effects of steps"] if config.final_share else ())]
    typical = {name: _TYPICAL[name] for name in names}
    factor = times.data_seconds / sum(typical.values())
    before = {name: factor * seconds for name, seconds in typical.items()}
    training = {"training": times.training_seconds + times.judge_seconds}
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
        "report": renders(),
    }
    return {name: _TYPICAL[name] for name, does in comes.items() if does}


def finish_stages(found: Finish) -> dict[str, float]:
    """The same for one graph.

    Args:
        found: What lowering, comparing and measuring it will take.
    """
    measuring = {name: _TYPICAL[name] for name in ("measuring", "drawing", "peak memory")}
    factor = found.measure_seconds / sum(measuring.values())
    return {
        "lowering": found.lower_seconds,
        "comparing forms": found.compare_seconds,
        **{name: factor * seconds for name, seconds in measuring.items()},
    }
