"""The command `mpqdm-fx inspect`: what stands in a quantized folder."""

import json

from mpqdm_fx.cli import options as opt

__all__ = ["inspect"]


def inspect(directory: opt.FolderArgument, as_json: opt.JsonOption = False) -> None:
    """Show a quantized folder: layer, shape, mean bits, bytes, SQNR."""
    from mpqdm_fx.folders import open_folder
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.quantized import QuantizationReport
    from mpqdm_fx.report.tables import (
        activation_table,
        judgement_table,
        layer_table,
        summary_table,
    )
    from mpqdm_fx.summary import SUMMARY, read_summary

    folder = open_folder(directory)
    folder.files.check()
    manifest = folder.manifest
    if as_json:
        opt.console().print_json(json.dumps(plain(manifest["report"])))
        return
    report = QuantizationReport.from_dict(manifest["report"])
    opt.console().print(layer_table(report))
    if report.activations:
        opt.console().print(activation_table(report))
    if report.judged:
        opt.console().print(judgement_table(report))
    if SUMMARY in folder.files:
        opt.console().print(summary_table(read_summary(folder)))
