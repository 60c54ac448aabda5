"""The command line: quantize, distill, export, plan, sample, evaluate, verify, trace and more."""

import typer

from mpqdm_fx.cli.boundary import Command, run
from mpqdm_fx.cli.distill import distill
from mpqdm_fx.cli.doctor import doctor
from mpqdm_fx.cli.evaluate import evaluate
from mpqdm_fx.cli.export import export
from mpqdm_fx.cli.inspect import inspect
from mpqdm_fx.cli.quantize import plan, quantize
from mpqdm_fx.cli.running import QuietOption, VerboseOption, remember, takes_loudness
from mpqdm_fx.cli.sample import sample
from mpqdm_fx.cli.trace import trace
from mpqdm_fx.cli.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile diffusion UNets into extremely low-bit programs for phone CPUs.",
)
for command in (
    quantize, distill, export, plan, sample, evaluate, verify, trace, doctor, inspect,
):  # fmt: skip
    app.command(cls=Command)(takes_loudness(command))


@app.callback()
def _options(
    context: typer.Context, verbose: VerboseOption = False, quiet: QuietOption = False
) -> None:
    remember(context, verbose=verbose, quiet=quiet)


def main() -> None:
    """Run the command line; every error is one line on stderr (see `cli.boundary`)."""
    run(app)
