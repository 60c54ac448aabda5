"""One budget of several: what it is measured by, and its folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.folders import WEIGHTS, seal_folder, staged_directory
from mpqdm_fx.io.schema import Count, Name, Ratio, Strict, plain, read_as
from mpqdm_fx.jobs.calibration import held_out_of
from mpqdm_fx.jobs.evaluation import Evaluation, evaluated_metrics
from mpqdm_fx.jobs.presets import write_recipe
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.storage import write_model
from mpqdm_fx.report.gates import METRICS, Gate, judge
from mpqdm_fx.report.images import save_grid
from mpqdm_fx.report.metrics import epsilon_sqnr
from mpqdm_fx.sources.denoisers import SOURCE, Origin, pictures
from mpqdm_fx.sources.source import Source

__all__ = ["STRIP", "BudgetJudge", "Point", "read_point", "retell_point", "smallest", "write_point"]

STRIP = "strip.png"
_POINT = "point.json"
_FIX = "delete its folder and resume"
_SHOWN = 8  # pictures of a strip


class Point(Strict):
    """What one budget gives; sizes in bytes, times in seconds.

    Attributes:
        bits: As it was asked for.
        folder: Its folder, in the result's.
        metrics: Values by name as in `METRICS`.
        float32_bytes: What the parameters take in float.
        command: The command line that makes a result of it alone.
    """

    bits: float
    folder: Name
    metrics: dict[str, Ratio]
    float32_bytes: Count
    command: str | None


class BudgetJudge:
    """Measures each budget; the float model is run when the first one is there.

    Args:
        source: The float model.
        options: Samples, steps and seed, as of `Evaluation.of`.
    """

    def __init__(self, source: Source, options: Mapping[str, int]) -> None:
        self.source = source
        self._options = options
        self._draws = "x0_sqnr" in evaluated_metrics(source)
        self._made: Evaluation | None = None

    @property
    def evaluation(self) -> Evaluation | None:
        """What the float model does; None where nothing can be drawn."""
        if self._made is None and self._draws:
            num, steps, seed = (self._options[name] for name in ("num", "steps", "seed"))
            self._made = Evaluation.of(self.source, num=num, steps=steps, seed=seed)
        return self._made

    def measure(self, quantized: QuantizedModel) -> tuple[dict[str, float], Tensor | None]:
        """Metrics of a quantized model, and what it draws."""
        evaluation = self.evaluation
        if evaluation is None:
            seed, steps = self._options["seed"], self._options["steps"]
            calls = held_out_of(self.source, steps=steps, seed=seed)
            return {"epsilon_sqnr": epsilon_sqnr(self.source.model, quantized, calls)}, None
        images = evaluation.draw(quantized)
        result = evaluation.measure(quantized, images)
        names = result.to_dict().keys() & METRICS.keys()
        return {name: float(getattr(result, name)) for name in METRICS if name in names}, images

    def write_strip(self, path: Path, images: Tensor | None = None) -> None:
        """Write the first samples as one row: what a model drew, by default the float one."""
        if images is None and self.evaluation is not None:
            images = self.evaluation.run.images
        if images is not None:
            save_grid(pictures(images[:_SHOWN], self.source), path, columns=_SHOWN)


def write_point(
    place: Path,
    quantized: QuantizedModel,
    judge_of: BudgetJudge,
    bits: float,
    seconds: float,
    command: str | None,
    subfolder: str | None,
) -> None:
    """Measure a budget and write its folder, which appears whole: then the budget is through.

    Args:
        place: The folder.
        quantized: The model.
        judge_of: Measures it.
        bits: As they were asked for.
        seconds: That quantizing took.
        command: The command line that makes a result of it alone.
        subfolder: Part of a pipeline folder that the source came from.
    """
    plan = quantized.plan
    measured, images = judge_of.measure(quantized)
    with staged_directory(place) as stage:
        source = judge_of.source
        if source.scheduler is not None:
            source.scheduler.save_pretrained(stage / "scheduler")
        write_text(stage / SOURCE, Origin.of(source, subfolder).model_dump_json())
        write_recipe(stage, quantized.settings)
        if images is not None:
            judge_of.write_strip(stage / STRIP, images)
        write_model(quantized, stage)
        sizes = {
            "bytes": (stage / WEIGHTS).stat().st_size,
            "parameter_bytes": plan.weight_bytes + plan.float_bytes,
            "effective_bits": plan.effective_bits,
            "seconds": seconds,
        }
        point = {
            "bits": float(bits),
            "folder": place.name,
            "metrics": {**measured, **{name: float(value) for name, value in sizes.items()}},
            "float32_bytes": 4 * plan.num_parameters,
            "command": command,
        }
        write_text(stage / _POINT, json.dumps(plain(point), indent=1))
        seal_folder(stage)


def smallest(points: Sequence[Point], pick: Sequence[Gate] | None) -> Point | None:
    """The point of the fewest bytes that keeps all gates; None if none does, or for no pick.

    Args:
        points: Every budget.
        pick: The gates.
    """
    if pick is None:
        return None
    passing = [
        point for point in points if all(verdict.passed for verdict in judge(pick, point.metrics))
    ]
    return min(passing, key=lambda point: point.metrics["parameter_bytes"], default=None)


def retell_point(place: Path, point: Point) -> None:
    """Write what a budget's folder says anew, where it says something else.

    Args:
        place: The folder, a copy that is not read yet.
        point: What it is to say.
    """
    if read_point(place) != point:
        write_text(place / _POINT, json.dumps(plain(point.model_dump()), indent=1))
        seal_folder(place)


def read_point(place: Path) -> Point:
    """What a budget's folder says.

    Args:
        place: The folder.

    Raises:
        ArtifactError: It is damaged.
    """
    return read_as(Point, place / _POINT, fix=_FIX)
