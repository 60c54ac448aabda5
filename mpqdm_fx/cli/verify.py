"""The command `mpqdm-fx verify`: every form of a quantized folder against the one before."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, complain
from mpqdm_fx.io.files import write_text

__all__ = ["verify"]


def verify(
    directory: opt.FolderArgument,
    model: opt.FloatModelOption = None,
    store: Annotated[
        bool,
        typer.Option(
            "--store", help="Store what is measured now as thresholds.", rich_help_panel=opt.RUN
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File for all numbers, for example verify.json.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    overwrite: opt.OverwriteFileOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Compare float, quantized, converted, edge and .pte layer by layer; exit 1 if one is short."""
    checks.check_output_file(output, "--output", reads=[directory], overwrite=overwrite)
    if store:
        checks.check_output_folder(directory, option="DIR", resumable=False)
    if checks.has_program(directory):
        checks.check_packages("executorch", purpose="a folder with a program")
    announce(f"{'measuring thresholds of' if store else 'verifying'} {directory}")
    from mpqdm_fx.cli.screens.parity import rung_table, worst_table
    from mpqdm_fx.parity.verify import verify as verify_folder

    ladder = verify_folder(directory, model=model, store=store)
    text = json.dumps(ladder.to_dict(), indent=1)
    if output is not None:
        write_text(output, text)
    console = opt.console()
    if as_json:
        console.print_json(text)
    else:
        console.print(rung_table(ladder))
        console.print(worst_table(ladder))
        for note in ladder.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
    if store:
        announce(f"thresholds stored in {directory}")
        return
    if not ladder.passed:
        complain(f"error: {directory}: {ladder.failure}")
        raise typer.Exit(code=1)
