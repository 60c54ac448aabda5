"""The command `mpqdm-fx trace`: the graph that everything works on."""

from typing import Annotated

import typer

from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, say

__all__ = ["trace"]


def trace(
    model: opt.ModelArgument,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what was found, or why it cannot be traced.")
    ] = False,
    subfolder: opt.SubfolderOption = None,
    variant: opt.VariantOption = None,
    inputs: opt.InputsOption = None,
) -> None:
    """Trace MODEL to its module-level graph and print it."""
    announce(f"tracing {model}")
    from mpqdm_fx.graph.explain import explain as explain_trace
    from mpqdm_fx.graph.trace import trace as trace_model
    from mpqdm_fx.models.sources import load_with_calls

    source = load_with_calls(model, subfolder, variant, inputs)
    if explain:
        report = explain_trace(source.model, source.example_inputs)
        say(opt.console(), report)
        if not report.ok:
            raise typer.Exit(code=1)
        return
    say(opt.console(), trace_model(source.model, source.example_inputs).graph)
