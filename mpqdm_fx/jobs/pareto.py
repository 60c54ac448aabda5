"""Many budgets of one model: calibrated and measured once, each solved, swept and judged."""

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpqdm_fx.api import convert, prepare_on
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io import progress
from mpqdm_fx.io.exchange import remove_folder
from mpqdm_fx.io.files import checkpoint_of, write_text
from mpqdm_fx.io.folders import PARETO_MANIFEST, check_target, listed_files, staged_directory
from mpqdm_fx.io.schema import plain
from mpqdm_fx.io.sealed import seal
from mpqdm_fx.io.unfinished import UnfinishedRun
from mpqdm_fx.io.versions import versions
from mpqdm_fx.jobs.budgets import (
    STRIP,
    BudgetJudge,
    Point,
    read_point,
    retell_point,
    smallest,
    write_point,
)
from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.jobs.evaluation import check_evaluated, evaluated_metrics
from mpqdm_fx.jobs.foretold import pareto_stages
from mpqdm_fx.jobs.quantize import command_of
from mpqdm_fx.jobs.result_folder import FolderResult, ProgramForm, write_folder
from mpqdm_fx.model.feasibility import check_feasible
from mpqdm_fx.model.quantized import PreparedModel
from mpqdm_fx.model.storage import load
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.records.validation import Count, Some, checked
from mpqdm_fx.report.gates import Gate
from mpqdm_fx.report.page.packages import can_render
from mpqdm_fx.report.pareto_page import render_pareto
from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.sources.source import Source
from mpqdm_fx.sweep.checkpoint import HEADER, Checkpoint
from mpqdm_fx.sweep.identity import run_identity

__all__ = [
    "PARETO",
    "Curve",
    "budget_settings",
    "check_pareto",
    "evaluation_of",
    "pareto_to_folder",
    "pick_metrics",
]

logger = logging.getLogger(__name__)

PARETO = PARETO_MANIFEST
PAGE = "pareto.html"
PICKED = "picked"
_TABLE = "sensitivity.safetensors"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What `pareto_to_folder` made.

    Attributes:
        directory: The folder.
        points: One a budget, smallest first.
        picked: The smallest point that keeps the gates, and its result; None if none was asked for
            or none does.
    """

    directory: Path
    points: tuple[Point, ...]
    picked: tuple[Point, FolderResult] | None


def budget_settings(config: MPQConfig, bits: float) -> MPQConfig:
    """Settings of one budget: whole bits as of `--weights`, others as of `--effective-bits`.

    Args:
        config: Settings of all; a budget of theirs does not count.
        bits: Average bits of a weight.

    Raises:
        ConfigError: Out of range, or the settings share no budget of broken bits.
    """
    if not math.isfinite(bits):
        raise ConfigError(f"--bits {bits}: give a number of bits from 1 to 8")
    if bits == int(bits):
        return replace(config, weight_bits=int(bits), effective_bits=None, weight_bytes=None)
    return replace(config, effective_bits=bits, weight_bytes=None)


def evaluation_of(*, num: int, steps: int) -> dict[str, int]:
    """What every budget is measured with.

    Args:
        num: Samples of the free-running metrics.
        steps: Steps of the scheduler.
    """
    return {"num": num, "steps": steps, "seed": EVALUATION_SEED}


def check_pareto(
    form: ProgramForm,
    config: MPQConfig,
    bits: Sequence[float],
    output: Path,
    *,
    evaluation: Mapping[str, Any],
    picks: bool,
    resume: bool,
    overwrite: bool = False,
) -> None:
    """Refuse what `pareto_to_folder` could not end with, before the model is loaded.

    Args:
        form: Form of the folder that is picked.
        config: Settings of all budgets.
        bits: The budgets.
        output: Folder to appear.
        evaluation: What every budget is measured with, `evaluation_of`.
        picks: Whether a budget is picked, and has to be of the form.
        resume: Go on with a run that was stopped.
        overwrite: Whether `output` may be a result that is replaced.

    Raises:
        ConfigError: A budget or a setting is out of range or twice there, or an unfinished run
            beside `output` has others, or is not to be resumed.
        ArtifactError: `output` holds something else.
        LoweringError: ExecuTorch is missing.
    """
    if not bits:
        raise ConfigError("--bits is empty; give at least one number of bits, for example 2,3,4")
    if len(set(bits)) < len(bits):
        raise ConfigError(f"--bits {','.join(f'{b:g}' for b in bits)}: a budget is there twice")
    for budget in bits:
        settings = budget_settings(config, budget)
        if picks:
            form.check(settings)
    check_target(output, PARETO, overwrite=overwrite)
    identity = {"settings": config.to_dict(), "versions": versions(), "evaluation": evaluation}
    UnfinishedRun.check(checkpoint_of(output), HEADER, identity, resume=resume, solved="bits-*")


def pick_metrics(source: Source, form: ProgramForm, num: int) -> tuple[str, ...]:
    """Names of the metrics that every budget is measured by, and that a pick may name.

    Args:
        source: The float model.
        form: Form of the folder that is picked.
        num: Samples of the free-running metrics.
    """
    sizes = ("parameter_bytes", "effective_bits", "seconds")
    return (*evaluated_metrics(source, num=num), *sizes, *(() if form.has_program else ("bytes",)))


@checked
def pareto_to_folder(
    source: Source,
    config: MPQConfig,
    bits: Sequence[float],
    *,
    form: ProgramForm,
    output: Path,
    pick: Sequence[Gate] | None = None,
    trajectories: Count = 16,
    steps: Count = 20,
    num: Count = 64,
    samples: Some = 16,
    subfolder: str | None = None,
    run: RunOptions = RunOptions(),
    overwrite: bool = False,
) -> Curve:
    """Quantize a source to several budgets and compare them.

    Calibration runs, the traced model, sensitivities and what the float model draws are made once.
    Each budget is then the same as a run of `quantize` with it: the same codes.

    Args:
        source: Model and scheduler, or model and calls.
        config: Settings of all budgets.
        bits: Budgets, as of `budget_settings`.
        form: Form of the folder that is picked; budgets are stored as packed weights.
        output: Folder; it appears whole or not at all.
        pick: Gates; the smallest budget that keeps them becomes a result folder, `picked`. None
            picks none.
        trajectories: Denoising runs to calibrate on, where the source has no calls.
        steps: Steps of each, and of the samples.
        num: Samples of the free-running metrics.
        samples: Images in the grid of the folder that is picked.
        subfolder: Part of a pipeline folder that the source came from.
        run: How it runs; see `RunOptions`. It goes on budget by budget and layer by layer, in a
            folder beside `output` of that name and `.checkpoint`.
        overwrite: Whether `output` may be a result that is replaced.

    Raises:
        MPQError: One of the steps cannot be done; no half of a result is left behind.
    """
    root = checkpoint_of(output)
    run = run.inside(root)
    evaluation = evaluation_of(num=num, steps=steps)
    check_pareto(
        form, config, bits, output, evaluation=evaluation, picks=pick is not None,
        resume=run.resume, overwrite=overwrite,
    )  # fmt: skip
    check_evaluated(
        pick or (), source, {*pick_metrics(source, form, num)}, f"budgets of {source.name}",
        "--pick",
    )  # fmt: skip
    configs = {budget: budget_settings(config, budget) for budget in sorted(bits)}
    for settings in configs.values():
        check_feasible(
            source.model, source.example_inputs, settings, sensitivity=run.sensitivity,
            max_memory=run.activation_memory,
        )  # fmt: skip
    budgets = _Budgets(
        source=source,
        form=form,
        root=root,
        # a budget's folder is this run's own, so it goes on: the folder above says whether it may
        run=replace(run, resume=True, sensitivity=run.sensitivity or root / _TABLE),
        judge_of=BudgetJudge(source, evaluation),
        trajectories=trajectories,
        steps=steps,
        samples=samples,
        subfolder=subfolder,
    )
    progress.expect(
        lambda: pareto_stages(source, configs, form, samples=samples if pick is not None else None)
    )
    data = calibration_of(source, trajectories=trajectories, steps=steps, seed=config.seed)
    prepared = prepare_on(source.model, config, data, run=run)
    calls = list(prepared.records)
    identity = run_identity(
        prepared.graph_module, calls, prepared.records.held_out, config, half=run.half
    )
    Checkpoint(root, {**identity, "evaluation": evaluation}, resume=run.resume)
    for index, (budget, settings) in enumerate(configs.items()):
        if not budgets.place(budget).is_dir():
            logger.info("budget %d of %d: %g bits", index + 1, len(configs), budget)
            prepared.settings = settings
            with progress.stage(f"{budget:g} bits"):
                budgets.solve(prepared, budget)
    # options that no budget depends on may be others than when it was solved
    points = [
        read_point(budgets.place(budget)).model_copy(update={"command": budgets.command(settings)})
        for budget, settings in configs.items()
    ]
    chosen = smallest(points, pick)
    picked = None
    with staged_directory(output, PARETO, overwrite=overwrite) as stage:
        for point in points:
            shutil.copytree(root / point.folder, stage / point.folder)
            retell_point(stage / point.folder, point)
        if chosen is not None:
            result = budgets.write_picked(chosen, stage)
            picked = chosen, replace(result, directory=output / PICKED)
        record = _record(source, config, points, pick, chosen, evaluation)
        with progress.stage("page"):
            budgets.judge_of.write_strip(stage / STRIP)
            if can_render():
                write_text(stage / PAGE, render_pareto(record, _strips(stage, points)))
        content = seal({**plain(record), "files": listed_files(stage, PARETO)})
        write_text(stage / PARETO, json.dumps(content, indent=1, allow_nan=False))
    remove_folder(root)
    return Curve(directory=output, points=tuple(points), picked=picked)


@dataclass(frozen=True, kw_only=True)
class _Budgets:
    """What all budgets share; `root` holds them until the result appears."""

    source: Source
    form: ProgramForm
    root: Path
    run: RunOptions
    judge_of: BudgetJudge
    trajectories: int
    steps: int
    samples: int
    subfolder: str | None

    def place(self, bits: float) -> Path:
        """Folder of a budget."""
        return self.root / f"bits-{bits:g}"

    def command(self, settings: MPQConfig) -> str | None:
        """The command line that makes a result of one budget alone."""
        return command_of(
            self.source, settings, self.form, Path("out"),
            trajectories=self.trajectories, steps=self.steps, samples=self.samples,
            subfolder=self.subfolder,
        )  # fmt: skip

    def solve(self, prepared: PreparedModel, bits: float) -> None:
        """Quantize to one budget and write its folder; layers that a killed run solved are kept."""
        place = self.place(bits)
        solving = place.with_name(f"solving-{place.name}")
        start = time.perf_counter()
        quantized = convert(prepared, run=replace(self.run, directory=solving))
        seconds = time.perf_counter() - start
        command = self.command(prepared.settings)
        write_point(place, quantized, self.judge_of, bits, seconds, command, self.subfolder)
        remove_folder(solving)

    def write_picked(self, point: Point, stage: Path) -> FolderResult:
        """Write the result folder of a budget."""
        quantized = load(self.root / point.folder)
        summary = write_folder(
            quantized, self.source, stage / PICKED, form=self.form, steps=self.steps,
            samples=self.samples, subfolder=self.subfolder, command=point.command,
            sensitivity=self.run.sensitivity,
        )  # fmt: skip
        return FolderResult(
            directory=stage / PICKED, quantized=quantized, summary=summary, source=self.source
        )


def _record(
    source: Source,
    config: MPQConfig,
    points: Sequence[Point],
    pick: Sequence[Gate] | None,
    chosen: Point | None,
    evaluation: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "format": "mpqdm-fx pareto",
        "version": 1,
        "model": source.name,
        "versions": versions(),
        "settings": config.to_dict(),
        "evaluation": dict(evaluation),
        "pick": [str(gate) for gate in pick or ()],
        "picked": None if chosen is None else chosen.bits,
        "points": [point.model_dump() for point in points],
    }


def _strips(stage: Path, points: Sequence[Point]) -> dict[str, Path]:
    """Pictures by what drew them."""
    named = {"float": stage, **{f"{point.bits:g} bits": stage / point.folder for point in points}}
    return {name: folder / STRIP for name, folder in named.items() if (folder / STRIP).is_file()}
