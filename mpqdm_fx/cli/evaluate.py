"""The command `mpqdm-fx evaluate`: a quantized folder against its float model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.gates import GateOption, MetricsOption, end_with_gates, print_gates, with_gates
from mpqdm_fx.cli.streams import announce
from mpqdm_fx.report.gates import parse_gates

__all__ = ["evaluate"]


def evaluate(
    directory: opt.FolderArgument,
    model: opt.FloatModelOption = None,
    num: Annotated[
        int,
        typer.Option(min=1, help="Samples of the free-running metrics.", rich_help_panel=opt.RUN),
    ] = 256,
    steps: opt.SamplerStepsOption = 20,
    seed: opt.SeedOption = 90_000,
    inputs: opt.InputsOption = None,
    gate: GateOption = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="TorchScript file of Inception's features, for FID and KID; never downloaded.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    lpips: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="TorchScript file of LPIPS.", rich_help_panel=opt.RUN),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder of a CLIPModel and its processor (save_pretrained), for the CLIP score.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    metrics: MetricsOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Measure a quantized folder against its float model on held-out, paired noise."""
    gates = parse_gates(gate)
    for option, path in (("--inception", inception), ("--lpips", lpips), ("--clip", clip)):
        if path is not None:
            checks.check_packages("torchmetrics", purpose=option)
    if clip is not None:
        checks.check_packages("transformers", purpose="--clip")
    if inputs is None and (model or checks.origin_of(directory)) == "digits":
        checks.check_packages("torchmetrics", "sklearn", purpose="evaluating the bundled model")
    announce(f"evaluating {directory} against its float model: {inputs or f'{num} samples'}")
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.jobs.evaluate import evaluate_folder
    from mpqdm_fx.report.evaluation_tables import evaluation_table
    from mpqdm_fx.report.networks import open_networks

    judge = None
    if clip is not None:
        from mpqdm_fx.pipelines.open_clip import open_clip

        judge = open_clip(clip)
    evaluation = evaluate_folder(
        directory,
        model=model,
        num=num,
        steps=steps,
        seed=seed,
        inputs=inputs,
        gates=gates,
        networks=open_networks(inception, lpips, judge),
    )
    console = opt.console()
    if as_json:
        console.print_json(json.dumps(plain(with_gates(evaluation.metrics, evaluation.verdicts))))
    else:
        console.print(evaluation_table(evaluation.metrics))
        print_gates(console, evaluation.verdicts)
    end_with_gates(evaluation.verdicts, directory)
