"""The command `mpqdm-fx trace`: the graph that everything works on."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, say
from mpqdm_fx.errors import ConfigError

if TYPE_CHECKING:
    from mpqdm_fx.passes.base import GraphPass

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
    passes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Run these passes on the graph, in this order; `mpqdm-fx passes` lists them.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    print_after: Annotated[
        str | None,
        typer.Option(
            metavar="all|NAME",
            help="With --passes: print the graph after each pass, or after this one.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
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
    from mpqdm_fx.passes.registry import name_of
    from mpqdm_fx.sources.sources import load_with_calls

    if print_after is not None and passes is None:
        raise ConfigError("--print-after needs --passes: it prints the graph after those")
    pipeline = _pipeline(passes, print_after)
    source = load_with_calls(model, subfolder, variant, inputs)
    console = opt.console()
    if explain:
        report = explain_trace(source.model, source.example_inputs)
        if as_json:
            console.print_json(json.dumps(asdict(report)))
        else:
            say(console, report)
        if not report.ok:
            raise typer.Exit(code=1)
        return
    graph_module = trace_model(source.model, source.example_inputs)
    for entry in pipeline:
        result = entry(graph_module)
        graph_module, name = result.graph_module, name_of(type(entry))
        if as_json:
            continue
        changed = "changed" if result.modified else "left as it was"
        say(console, f"after {name}: {len(graph_module.graph.nodes)} nodes, {changed}")
        if print_after in ("all", name):
            say(console, graph_module.graph)
    if as_json:
        console.print_json(json.dumps(describe(graph_module)))
    elif print_after is None:
        say(console, graph_module.graph)


def _pipeline(passes: str | None, print_after: str | None) -> "tuple[GraphPass, ...]":
    """The passes that were asked for; a name to print after has to be one of them."""
    import mpqdm_fx.backends.xnnpack.passes  # noqa: F401 - its passes have names then
    from mpqdm_fx.passes.registry import name_of, parse

    pipeline = parse(passes or "").passes
    names = [name_of(type(entry)) for entry in pipeline]
    if print_after not in (None, "all", *names):
        raise ConfigError(
            f"--print-after {print_after}: not among --passes; give all, or one of: "
            f"{', '.join(names)}"
        )
    return pipeline
