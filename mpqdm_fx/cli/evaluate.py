"""The command `mpqdm-fx evaluate`: a quantized folder against its float model."""

import json
from typing import Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce

__all__ = ["evaluate"]


def evaluate(
    directory: opt.FolderArgument,
    model: opt.FloatModelOption = None,
    num: Annotated[int, typer.Option(min=1, help="Samples of the free-running metrics.")] = 256,
    steps: opt.SamplerStepsOption = 20,
    seed: opt.SeedOption = 90_000,
    inputs: opt.InputsOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Measure a quantized folder against its float model on held-out, paired noise."""
    if inputs is None and (model or checks.origin_of(directory)) == "digits":
        checks.check_packages("torchmetrics", "sklearn", purpose="evaluating the bundled model")
    announce(f"evaluating {directory} against its float model: {inputs or f'{num} samples'}")
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.jobs.evaluate import evaluate_folder
    from mpqdm_fx.report.tables import metrics_table

    metrics = evaluate_folder(
        directory, model=model, num=num, steps=steps, seed=seed, inputs=inputs
    )
    if as_json:
        opt.console().print_json(json.dumps(plain(metrics)))
    else:
        opt.console().print(metrics_table(metrics))
