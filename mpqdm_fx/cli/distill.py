"""The command `mpqdm-fx distill`: train a quantized folder against its float model."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.gates import GateOption, end_with_gates, print_gates, with_gates
from mpqdm_fx.cli.streams import announce, say
from mpqdm_fx.report.gates import parse_gates

__all__ = ["Relation", "distill"]

Relation = Literal["none", "trd", "queue", "feature"]
"""As of `DistillConfig`, which loads torch."""


def distill(
    directory: opt.FolderArgument,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time for all of it, lowering and measuring included, for example 90s, 5m or "
            "1.5h. Default: 5m.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    updates: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Updates to make; with --budget, whichever ends first.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    output: opt.OutputOption = Path("distilled"),
    model: opt.FloatModelOption = None,
    trajectories: opt.TrajectoriesOption = 64,
    steps: opt.StepsOption = 20,
    guidance: opt.GuidanceOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows in an update.", rich_help_panel=opt.CALIBRATION)
    ] = 32,
    rank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Rank of the trained change of a weight; 0 trains none.",
            rich_help_panel=opt.CALIBRATION,
        ),
    ] = 8,
    relation: Annotated[
        Relation,
        typer.Option(
            case_sensitive=False,
            help="Second loss (MPQ-DM's is trd); none helped where it was measured.",
            rich_help_panel=opt.CALIBRATION,
        ),
    ] = "none",
    recompute: Annotated[
        int,
        typer.Option(
            min=0,
            help="Parts of the graph to compute twice, for less memory.",
            rich_help_panel=opt.RUN,
        ),
    ] = 0,
    samples: opt.SamplesOption = 16,
    resume: opt.ResumeOption = False,
    overwrite: opt.OverwriteOption = False,
    gate: GateOption = None,
    device: Annotated[
        str,
        typer.Option(help="Where to train, for example cuda.", rich_help_panel=opt.RUN),
    ] = "cpu",
    seed: opt.SeedOption = 0,
    as_json: opt.JsonOption = False,
) -> None:
    """Train a quantized folder against its float model; sizes stay, errors fall."""
    if budget is None and updates is None:
        budget = "5m"
    seconds = opt.seconds_of(budget)
    gates = parse_gates(gate)
    checks.check_output_folder(output, directory, model)
    if checks.has_program(directory):
        checks.check_packages("executorch", purpose="a folder with a program")
    announce(f"training {directory} to {output}: {budget or f'{updates} updates'}")
    from mpqdm_fx.cli.screens.result import ResultScreen
    from mpqdm_fx.distill.config import DistillConfig
    from mpqdm_fx.io.folders import WEIGHTS, check_target
    from mpqdm_fx.io.processes import joined
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.io.space import check_space
    from mpqdm_fx.jobs.distill import distill_folder
    from mpqdm_fx.jobs.evaluate import check_gates, gate_stages, judge_result
    from mpqdm_fx.model.folder import open_folder
    from mpqdm_fx.model.summary import read_summary
    from mpqdm_fx.pipelines.components import as_recorded
    from mpqdm_fx.sources.denoisers import source_of

    checks.check_device(device)
    opened = open_folder(directory)
    check_target(output, overwrite=overwrite)
    then: dict[str, float] = {}
    if gates:
        source = as_recorded(source_of(directory, model), directory, model=model)
        check_gates(gates, source, read_summary(opened)["backend"])
        then = gate_stages(gates, source, steps=steps)
    # the plan stays, so the packed weights of the result are of the same size
    check_space(output, opened.files.entries[WEIGHTS].bytes)
    config = DistillConfig(
        seconds=seconds,
        updates=updates,
        trajectories=trajectories,
        steps=steps,
        batch_size=batch_size,
        rank=rank,
        relation=relation,
        recompute=recompute,
        guidance_scale=None if guidance is None else max(guidance, 1.0),  # up to 1 is none
        seed=seed,
    )
    with joined():
        result = distill_folder(
            directory, config, output=output, model=model, samples=samples, resume=resume,
            device=device, overwrite=overwrite,
            foretold=announce, then=then,
        )  # fmt: skip
    if result is None:
        return
    verdicts = judge_result(gates, result, steps=steps)
    console = opt.console()
    if as_json:
        console.print_json(json.dumps(plain(with_gates(result.summary, verdicts))))
        end_with_gates(verdicts, output)
        return
    console.print(ResultScreen(result.summary, result.quantized.report, output))
    print_gates(console, verdicts)
    say(console, f"written to {output}")
    end_with_gates(verdicts, output)
