"""The command `mpqdm-fx doctor`: what XNNPACK would take of a model."""

import json
from typing import Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, say

__all__ = ["doctor"]


def doctor(
    model: opt.FolderOrModelArgument,
    max_delegates: Annotated[
        int | None, typer.Option(min=1, help="Exit with status 1 if there would be more.")
    ] = None,
    subfolder: opt.SubfolderOption = None,
    variant: opt.VariantOption = None,
    inputs: opt.InputsOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Say how many delegates XNNPACK would take MODEL in, and why what stays out does."""
    checks.check_packages("executorch", purpose="doctor")
    announce(f"asking XNNPACK what it takes of {model}")
    from mpqdm_fx.jobs.diagnose import diagnose_model

    found = diagnose_model(model, subfolder, variant, inputs)
    if as_json:
        opt.console().print_json(json.dumps(found.to_dict()))
    else:
        say(opt.console(), found)
    if max_delegates is not None and found.delegates > max_delegates:
        raise typer.Exit(code=1)
