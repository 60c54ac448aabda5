"""The command `mpqdm-fx inspect`: what stands in a quantized folder."""

import json
from enum import StrEnum
from typing import Annotated

import typer

from mpqdm_fx.cli import options as opt

__all__ = ["Order", "inspect"]


class Order(StrEnum):
    """What layers are sorted by."""

    bits = "bits"
    bytes = "bytes"
    sqnr = "sqnr"
    name = "name"


def inspect(
    directory: opt.FolderArgument,
    sort: Annotated[
        Order | None,
        typer.Option(
            case_sensitive=False,
            help="Layers by: fewest bits, most bytes, lowest SQNR, or name. Default: the model's "
            "order.",
        ),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Show that many layers.")] = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Show a quantized folder: layer, shape, mean bits, bytes, SQNR."""
    from mpqdm_fx.cli.screens.layers import activation_table, judgement_table, layer_table
    from mpqdm_fx.cli.screens.result import summary_table
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.model.folder import open_folder
    from mpqdm_fx.model.summary import SUMMARY, read_summary

    folder = open_folder(directory)
    folder.files.check()
    report = folder.manifest.report
    if as_json:
        opt.console().print_json(json.dumps(plain(report.to_dict())))
        return
    console = opt.console()
    console.print(layer_table(report, order=sort, top=top))
    if report.activations:
        console.print(activation_table(report))
    if report.judged:
        console.print(judgement_table(report))
    if SUMMARY in folder.files:
        console.print(summary_table(read_summary(folder)))
