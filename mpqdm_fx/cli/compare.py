"""The command `mpqdm-fx compare`: several folders side by side."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, say

__all__ = ["compare"]


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR DIR...", help="Folders written by `mpqdm-fx quantize`."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Page to write (.html).", rich_help_panel=opt.RUN),
    ] = Path("compare.html"),
    overwrite: opt.OverwriteFileOption = False,
    model: opt.FloatModelOption = None,
    samples: opt.SamplesOption = 8,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the scheduler. Default: as the first folder's."),
    ] = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Put several folders of one float model side by side: all numbers, pictures of one noise."""
    checks.check_packages("matplotlib", "jinja2", purpose="a page")
    checks.check_output_file(
        output, "--output", reads=directories, suffixes=(".html",), overwrite=overwrite
    )
    announce(f"comparing {', '.join(map(str, directories))} on {output}")
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.jobs.compare import compare_folders

    records = compare_folders(directories, output, model=model, samples=samples, steps=steps)
    console = opt.console()
    if as_json:
        numbers = {name: plain(record.model_dump()) for name, record in records.items()}
        console.print_json(json.dumps(numbers))
        return
    say(console, f"{output} written")
