"""The command `mpqdm-fx report`: a folder's page and its numbers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, say

__all__ = ["report"]


def report(
    directory: opt.FolderArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Page to write (.html).", rich_help_panel=opt.RUN),
    ] = Path("report.html"),
    overwrite: opt.OverwriteFileOption = False,
    model: opt.FloatModelOption = None,
    inputs: opt.InputsOption = None,
    sensitivity: opt.SensitivityOption = None,
    samples: Annotated[
        int | None,
        typer.Option(min=0, help="Pictures to draw. Default: as many as the folder's own, or 16."),
    ] = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Write a page about a quantized or exported folder: pictures, errors, bits and bytes."""
    checks.check_packages("matplotlib", "jinja2", purpose="a report")
    checks.check_output_file(
        output, "--output", reads=[directory], suffixes=(".html",), overwrite=overwrite
    )
    numbers = output.with_suffix(".json")
    checks.check_output_file(numbers, "--output", reads=[directory], overwrite=overwrite)
    announce(f"reporting on {directory} to {output}")
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.jobs.report_folder import report_folder

    record = report_folder(
        directory, output, model=model, inputs=inputs, sensitivity=sensitivity, samples=samples
    )
    console = opt.console()
    if as_json:
        console.print_json(json.dumps(plain(record.model_dump())))
        return
    say(console, f"{output} and {numbers} written")
