"""The command `mpqdm-fx trace`: the graph that everything works on."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, say

__all__ = ["trace"]


def trace(
    model: opt.ModelArgument,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say what was found, or why it cannot be traced.",
            rich_help_panel=opt.RUN,
        ),
    ] = False,
    subfolder: opt.SubfolderOption = None,
    variant: opt.VariantOption = None,
    inputs: opt.InputsOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Trace MODEL to its module-level graph and print it."""
    checks.check_name(model)
    announce(f"tracing {model}")
    from mpqdm_fx.capture.explain import explain as explain_trace
    from mpqdm_fx.capture.trace import trace as trace_model
    from mpqdm_fx.graph.describe import describe
    from mpqdm_fx.sources.sources import load_with_calls

    source = load_with_calls(model, subfolder, variant, inputs)
    console = opt.console()
    if not explain:
        graph_module = trace_model(source.model, source.example_inputs)
        if as_json:
            console.print_json(json.dumps(describe(graph_module)))
        else:
            say(console, graph_module.graph)
        return
    report = explain_trace(source.model, source.example_inputs)
    if as_json:
        console.print_json(json.dumps(asdict(report)))
    else:
        say(console, report)
    if not report.ok:
        raise typer.Exit(code=1)
