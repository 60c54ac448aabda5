"""A quantized folder against its float model, and what it must measure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpqdm_fx.backends.names import PROGRAMS
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.io.progress import expect, stage
from mpqdm_fx.jobs.calibration import check_unseen, held_out_of
from mpqdm_fx.jobs.evaluation import (
    PICTURE_METRICS,
    Evaluation,
    check_evaluated,
    check_networks,
    evaluated_metrics,
)
from mpqdm_fx.jobs.foretold import evaluate_stages
from mpqdm_fx.jobs.result_folder import FolderResult
from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.storage import load
from mpqdm_fx.model.summary import SUMMARY, read_summary
from mpqdm_fx.pipelines.components import as_recorded
from mpqdm_fx.records.validation import Count, Seed, checked
from mpqdm_fx.report.comparison import compare
from mpqdm_fx.report.gates import (
    METRICS,
    Gate,
    Verdict,
    expected_summary,
    judge,
    summary_metrics,
)
from mpqdm_fx.report.metrics import EvaluationResult, epsilon_sqnr
from mpqdm_fx.report.networks import Networks
from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.sources.denoisers import source_of
from mpqdm_fx.sources.functions import calls_of
from mpqdm_fx.sources.model_names import BUNDLED
from mpqdm_fx.sources.source import Source

__all__ = ["FolderEvaluation", "check_gates", "evaluate_folder", "gate_stages", "judge_result"]


@dataclass(frozen=True, kw_only=True)
class FolderEvaluation:
    """What `evaluate_folder` found.

    Attributes:
        metrics: Values by name, and what they were measured with; plain types, ratios may be
            infinite.
        verdicts: The gates, in order.
    """

    metrics: dict[str, Any]
    verdicts: tuple[Verdict, ...]


@checked
def evaluate_folder(
    folder: Path,
    *,
    model: str | None = None,
    num: Count = 256,
    steps: Count = 20,
    seed: Seed,
    inputs: str | None = None,
    gates: Sequence[Gate] = (),
    networks: Networks | None = None,
) -> FolderEvaluation:
    """Measure a saved model against the float model that it came from.

    Args:
        folder: Folder written by `quantize`.
        model: The float model, if it is no longer where it was.
        num: Samples of the free-running metrics.
        steps: Steps of the scheduler.
        seed: Seed of noise and held-out trajectories.
        inputs: Function that gives calls of the user's own, as of `calls_of`: outputs are compared
            on them, also by noise level, and nothing is drawn.
        gates: What must be measured; gates on what is not measured are refused first.
        networks: Further judges of pictures.

    Returns:
        Metrics by name; distances of features and accuracy only for the bundled model, whose
        classifier is bundled too.

    Raises:
        ConfigError: A gate cannot be judged, a network has nothing to judge, the float model cannot
            be run, or the folder was made on runs of this very seed.
    """
    opened = open_folder(folder)
    summary = read_summary(opened) if SUMMARY in opened.files else None
    numbers = {} if summary is None else summary_metrics(summary)
    if inputs is None:
        trained = (summary or {}).get("distilled")
        seeds = [] if trained is None else [trained["settings"]["seed"]]
        check_unseen(seed, [opened.manifest.settings.seed, *seeds])
    source = source_of(folder, model)
    if inputs is None and source.name != BUNDLED:
        source = as_recorded(source, folder, model=model)
    check_networks(networks, source, inputs=inputs)
    names = (
        ("epsilon_sqnr",) if inputs is not None else evaluated_metrics(source, networks, num=num)
    )
    check_evaluated(gates, source, {*names, *numbers}, str(folder))
    expect(
        lambda: evaluate_stages(
            source, num=num, steps=steps, own_calls=inputs is not None,
            networks=bool(networks and networks.metrics),
        )
    )  # fmt: skip
    with stage("loading"):
        quantized = load(folder)
    if inputs is not None:
        with stage("comparing outputs"):
            metrics = _compared(source, quantized, inputs)
    else:
        evaluation = Evaluation.of(source, num=num, steps=steps, seed=seed, networks=networks)
        metrics = _measured(evaluation.measure(quantized))
    return FolderEvaluation(
        metrics=metrics, verdicts=judge(gates, {**numbers, **_documented(metrics)})
    )


def check_gates(gates: Sequence[Gate], source: Source, backend: str) -> None:
    """Refuse gates on what a job that quantizes a source will not measure.

    Args:
        gates: The gates.
        source: The float model, with the pipeline that it belongs to.
        backend: What the job writes for.

    Raises:
        ConfigError: A metric will not be there.
    """
    drawn = source.scheduler is not None
    numbers = expected_summary(program=backend in PROGRAMS, drawn=drawn)
    measured = {*evaluated_metrics(source), *numbers}
    check_evaluated(gates, source, measured, f"{source.name} here")


def judge_result(
    gates: Sequence[Gate], result: FolderResult, *, steps: int = 20, num: int = 256
) -> tuple[Verdict, ...]:
    """Judge what a job made; it is evaluated only where a gate asks for that.

    Args:
        gates: The gates, which `check_gates` took.
        result: What the job made.
        steps: Steps of the scheduler.
        num: Samples of the free-running metrics.
    """
    measured = summary_metrics(result.summary)
    names = {gate.metric for gate in gates} - measured.keys()
    if names:
        with stage("gates"):
            measured |= _wanted_of(result, names, steps=steps, num=num)
    return judge(gates, measured)


def gate_stages(
    gates: Sequence[Gate], source: Source, *, steps: int = 20, num: int = 256
) -> dict[str, float]:
    """Seconds by stage of `judge_result`: one stage, or none where the summary has all numbers.

    Args:
        gates: The gates.
        source: The float model, with the pipeline that it belongs to.
        steps: Steps of the scheduler.
        num: Samples of the free-running metrics.
    """
    names = {gate.metric for gate in gates if METRICS[gate.metric].source == "evaluation"}
    if not names:
        return {}
    drawn = 0 if names == {"epsilon_sqnr"} else num
    stages = evaluate_stages(source, num=drawn, steps=steps, own_calls=False, networks=False)
    return {"gates": sum(stages.values())}


def _wanted_of(result: FolderResult, names: set[str], *, steps: int, num: int) -> dict[str, float]:
    """Metrics of an evaluation that has no more in it than what is asked for."""
    source = result.source
    if names == {"epsilon_sqnr"}:
        held_out = held_out_of(source, steps=steps, seed=EVALUATION_SEED)
        return {"epsilon_sqnr": epsilon_sqnr(source.model, result.quantized, held_out)}
    evaluation = Evaluation.of(
        source, num=num, steps=steps, seed=EVALUATION_SEED,
        pictures=not names.isdisjoint(PICTURE_METRICS),
    )  # fmt: skip
    return _documented(_measured(evaluation.measure(result.quantized)))


def _measured(result: EvaluationResult) -> dict[str, Any]:
    """What was measured, ratios as numbers."""
    return {name: getattr(result, name) for name in result.to_dict()}


def _documented(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name in METRICS}


def _compared(source: Source, quantized: QuantizedModel, inputs: str) -> dict[str, Any]:
    """Outputs on the user's own calls, together and by noise level."""
    calls = calls_of(inputs, source.model, held_out=0).calls
    node = find_noise_argument(quantized.graph_module, quantized.settings.noise_argument)
    name = None if node is None else str(node.target)
    comparison = compare(source.model, quantized, calls, noise_argument=name)
    levels = {
        f"epsilon_sqnr_at_{name}_{point.level:g}": point.sqnr_db
        for point in (() if name is None else comparison.levels)
    }
    return {"epsilon_sqnr": comparison.sqnr_db, **levels}
