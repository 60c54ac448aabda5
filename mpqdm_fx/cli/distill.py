"""The command `mpqdm-fx distill`: train a quantized folder against its float model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mpqdm_fx.cli import checks as checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import say

__all__ = ["distill"]


def distill(
    directory: opt.FolderArgument,
    budget: Annotated[
        str | None, typer.Option(help="Time to train, for example 90s, 5m or 1.5h. Default: 5m.")
    ] = None,
    updates: Annotated[
        int | None,
        typer.Option(min=1, help="Updates to make; with --budget, whichever ends first."),
    ] = None,
    output: opt.OutputOption = Path("distilled"),
    model: opt.FloatModelOption = None,
    trajectories: opt.TrajectoriesOption = 64,
    steps: opt.StepsOption = 20,
    guidance: opt.GuidanceOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in an update.")] = 32,
    rank: Annotated[
        int, typer.Option(min=0, help="Rank of the trained change of a weight; 0 trains none.")
    ] = 8,
    relation: Annotated[
        str, typer.Option(help="Second loss: none, trd, queue or feature.")
    ] = "none",
    recompute: Annotated[
        int, typer.Option(min=0, help="Parts of the graph to compute twice, for less memory.")
    ] = 0,
    samples: opt.SamplesOption = 16,
    resume: opt.ResumeOption = False,
    overwrite: opt.OverwriteOption = False,
    device: Annotated[str, typer.Option(help="Where to train, for example cuda.")] = "cpu",
    seed: opt.SeedOption = 0,
    as_json: opt.JsonOption = False,
) -> None:
    """Train a quantized folder against its float model; sizes stay, errors fall."""
    if budget is None and updates is None:
        budget = "5m"
    seconds = opt.seconds_of(budget)
    checks.check_output_folder(output, directory, model)
    if checks.has_program(directory):
        checks.check_packages("executorch", purpose="a folder with a program")
    from mpqdm_fx.distill.config import DistillConfig
    from mpqdm_fx.folders import WEIGHTS, open_folder
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.jobs.distill import distill_folder
    from mpqdm_fx.processes import joined
    from mpqdm_fx.report.tables import summary_table

    checks.check_device(device)
    # the plan stays, so the packed weights of the result are of the same size
    checks.check_space(output, open_folder(directory).files.entries[WEIGHTS].bytes)
    config = DistillConfig(
        seconds=seconds,
        updates=updates,
        trajectories=trajectories,
        steps=steps,
        batch_size=batch_size,
        rank=rank,
        relation=relation,  # type: ignore[arg-type]  # it is checked there
        recompute=recompute,
        guidance_scale=None if guidance is None else max(guidance, 1.0),  # up to 1 is none
        seed=seed,
    )
    with joined():
        result = distill_folder(
            directory, config, output=output, model=model, samples=samples, resume=resume,
            device=device, overwrite=overwrite,
        )  # fmt: skip
    if result is None:
        return
    console = opt.console()
    if as_json:
        console.print_json(json.dumps(plain(result.summary)))
        return
    console.print(summary_table(result.summary))
    say(console, f"written to {output}")
