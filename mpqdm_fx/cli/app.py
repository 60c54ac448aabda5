"""The command line: quantize, distill, export, plan, sample, evaluate, verify, trace and more."""

from typing import Annotated

import typer

from mpqdm_fx.cli.boundary import run
from mpqdm_fx.cli.compare import compare
from mpqdm_fx.cli.distill import distill
from mpqdm_fx.cli.doctor import doctor
from mpqdm_fx.cli.evaluate import evaluate
from mpqdm_fx.cli.examples import epilog_of
from mpqdm_fx.cli.export import export
from mpqdm_fx.cli.inspect import inspect
from mpqdm_fx.cli.pareto import pareto
from mpqdm_fx.cli.passes import passes
from mpqdm_fx.cli.quantize import plan, quantize
from mpqdm_fx.cli.report import report
from mpqdm_fx.cli.running import QuietOption, VerboseOption, remember, takes_loudness
from mpqdm_fx.cli.sample import sample
from mpqdm_fx.cli.trace import trace
from mpqdm_fx.cli.usage import Command, Group
from mpqdm_fx.cli.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile diffusion UNets into extremely low-bit programs for phone CPUs.",
)
for command in (
    quantize, distill, export, pareto, plan, sample, evaluate, report, compare, verify, trace,
    passes, doctor, inspect,
):  # fmt: skip
    app.command(cls=Command, epilog=epilog_of(command.__name__))(takes_loudness(command))


def _tell_version(wanted: bool) -> None:
    if wanted:
        import mpqdm_fx

        typer.echo(f"mpqdm-fx {mpqdm_fx.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    remember(context, verbose=verbose, quiet=quiet)


def main() -> None:
    """Run the command line; every error is one line on stderr (see `cli.boundary`)."""
    run(app)
