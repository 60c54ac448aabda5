"""Which stages a job will have and about how long each takes, before anything is measured.

Seconds are of the bundled model with default settings and one thread; a larger model or another
machine takes longer by a factor, which progress finds as it goes (`progress.expect`).
"""

from collections.abc import Mapping

from mpqdm_fx.backends.names import PROGRAMS
from mpqdm_fx.bits.activation_choice import options_of
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.jobs.calibration import HELD_OUT_RUNS
from mpqdm_fx.jobs.estimate import Finish, TrainingEstimate
from mpqdm_fx.jobs.result_folder import ProgramForm
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.page.packages import renders
from mpqdm_fx.sources.source import Source

__all__ = [
    "compare_stages",
    "distill_stages",
    "doctor_stages",
    "drawing_stages",
    "evaluate_stages",
    "finish_stages",
    "folder_stages",
    "pareto_stages",
    "quantize_stages",
    "report_stages",
    "sample_stages",
]

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
    "decoding": 1,
    "peak memory": 25,
    "report": 10,
    "loading": 4,
    "comparing outputs": 4,
    "metrics": 2,
    "plain rounding": 1,
    "exporting": 14,
    "asking XNNPACK": 50,
    "page": 3,
}


_CALIBRATION = ("float model's runs", "tracing", "recording calls")
_MEASURED = ("channels", "ranges", "sensitivities", "rounding errors")  # kept for all budgets
_SOLVING = ("rounding", "judging")
_JUDGING = 20.0  # pictures and metrics of a budget
_ROW = 0.001  # one sample in one call of the float model; a quantized one takes the factor
_QUANTIZED = 2.0
_DECODED = 0.05  # one picture by a VAE


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
    fixed = any(option.is_fixed for option in options)
    measured = config.allocation == "measured"
    comes = {
        "float model's runs": source.calls is None,
        "tracing": True,
        "recording calls": True,
        "channels": bool(options) and not fixed,  # else with the ranges
        "ranges": fixed,
        "sensitivities": bool(options) or measured or config.row_weights == "output",
        "rounding errors": measured,
        "rounding": True,
        "judging": config.judge,
    }
    quantizing = {name: _TYPICAL[name] for name, does in comes.items() if does}
    return quantizing | folder_stages(source, backend, samples)


def pareto_stages(
    source: Source, budgets: Mapping[float, MPQConfig], form: ProgramForm, *, samples: int | None
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
        seconds = quantize_stages(source, config, form.backend, 0)
        begun = {name: seconds.pop(name) for name in _CALIBRATION if name in seconds}
        solving = sum(seconds[name] for name in _SOLVING if name in seconds)
        once = sum(seconds[name] for name in _MEASURED if name in seconds)
        stages |= begun if not place else {}
        stages[f"{budget:g} bits"] = solving + (0 if place else once) + _JUDGING
    picked = {} if samples is None else folder_stages(source, form.backend, samples)
    return stages | picked | {"page": _TYPICAL["page"]}


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
        "lowering": backend in PROGRAMS,
        "comparing forms": True,
        "measuring": True,
        "drawing": drawn and samples > 0,
        "decoding": drawn and samples > 0 and source.is_decoded,
        "peak memory": drawn,
        "report": renders(),
    }
    return {name: _TYPICAL[name] for name, does in comes.items() if does}


def finish_stages(times: Finish) -> dict[str, float]:
    """The same for one graph.

    Args:
        times: What lowering, comparing and measuring it will take.
    """
    measuring = {name: _TYPICAL[name] for name in ("measuring", "drawing", "peak memory")}
    factor = times.measure_seconds / sum(measuring.values())
    return {
        "lowering": times.lower_seconds,
        "comparing forms": times.compare_seconds,
        **{name: factor * seconds for name, seconds in measuring.items()},
    }


def evaluate_stages(
    source: Source, *, num: int, steps: int, own_calls: bool, networks: bool
) -> dict[str, float]:
    """Seconds by stage of `evaluate_folder`, in running order, once the float model is loaded.

    Args:
        source: The float model, with the pipeline that it belongs to.
        num: Samples of the free-running metrics.
        steps: Steps of the scheduler.
        own_calls: Whether outputs on calls of the user's own are compared, and nothing is drawn.
        networks: Whether networks judge pictures.
    """
    if own_calls:
        return {name: _TYPICAL[name] for name in ("loading", "comparing outputs")}
    call = steps * _ROW * (2 if source.is_guided else 1)
    held_out, drawn = HELD_OUT_RUNS * call, num * call
    stages = {
        "loading": _TYPICAL["loading"],
        "float model's runs": held_out,
        "float outputs": held_out,
        "float samples": drawn,
        "quantized samples": _QUANTIZED * drawn,
        "quantized outputs": _QUANTIZED * held_out,
        "decoding": 2 * num * _DECODED if source.is_decoded else 0.0,
        "metrics": _TYPICAL["metrics"] * (10 if networks else 1),
    }
    return {name: seconds for name, seconds in stages.items() if seconds}


def sample_stages(*, in_pipeline: bool) -> dict[str, float]:
    """Seconds by stage of `mpqdm-fx sample`, in running order.

    Args:
        in_pipeline: As of `report_stages`.
    """
    stages = report_stages(measures=False, samples=True, in_pipeline=in_pipeline)
    return {name: seconds for name, seconds in stages.items() if name != "page"}


def drawing_stages(source: Source, *, num: int, steps: int) -> dict[str, float]:
    """The same once what draws is loaded: drawing, and decoding.

    Args:
        source: What draws, with the pipeline that it belongs to.
        num: Samples.
        steps: Steps of the scheduler.
    """
    call = steps * _QUANTIZED * _ROW * (2 if source.is_guided else 1)
    decoding = {"decoding": num * _DECODED} if source.is_decoded else {}
    return {"drawing": num * call} | decoding


def report_stages(*, measures: bool, samples: bool, in_pipeline: bool) -> dict[str, float]:
    """Seconds by stage of `report_folder`, in running order.

    Args:
        measures: Whether the folder keeps no numbers, or others are asked for.
        samples: Whether pictures are drawn.
        in_pipeline: Whether its float model is part of a pipeline, which may decode them.
    """
    comes = {
        "loading": True,
        "comparing outputs": measures,
        "drawing": samples,
        "decoding": samples and in_pipeline,
        "page": True,
    }
    return {name: _TYPICAL[name] for name, does in comes.items() if does}


def compare_stages(folders: int, *, samples: int, in_pipeline: bool) -> dict[str, float]:
    """Seconds by stage of `compare_folders`, in running order.

    Args:
        folders: Number of folders.
        samples: Pictures of each.
        in_pipeline: As of `report_stages`.
    """
    stages = report_stages(measures=False, samples=samples > 0, in_pipeline=in_pipeline)
    return {name: (1 if name == "page" else folders) * each for name, each in stages.items()}


def doctor_stages(*, stored: bool, rounded: bool) -> dict[str, float]:
    """Seconds by stage of `diagnose_model`, in running order.

    Args:
        stored: Whether a folder's own model is judged.
        rounded: Whether a float model is judged as it would be lowered.
    """
    comes = {
        "loading": True,
        "tracing": not stored,
        "plain rounding": rounded and not stored,
        "exporting": True,
        "asking XNNPACK": True,
    }
    return {name: _TYPICAL[name] for name, does in comes.items() if does}
