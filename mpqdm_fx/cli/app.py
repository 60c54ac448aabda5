"""The command line: quantize, distill, export, plan, sample, evaluate, verify, trace and more."""

import logging
import os
import warnings
from typing import Annotated

import typer

from mpqdm_fx.cli.boundary import Command, run
from mpqdm_fx.cli.compare import compare
from mpqdm_fx.cli.distill import distill
from mpqdm_fx.cli.doctor import doctor
from mpqdm_fx.cli.evaluate import evaluate
from mpqdm_fx.cli.export import export
from mpqdm_fx.cli.inspect import inspect
from mpqdm_fx.cli.quantize import plan, quantize
from mpqdm_fx.cli.report import report
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
    quantize, distill, export, plan, sample, evaluate, report, compare,
    verify, trace, doctor, inspect,
):  # fmt: skip
    app.command(cls=Command)(command)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every stage.")] = False,
) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("mpqdm_fx").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        # Deprecations and missing GPU extensions of the libraries underneath: nothing to act on.
        warnings.simplefilter("ignore")
        # they set their loggers when they are imported
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("TORCH_LOGS", "-all")
        for library in ("torch", "torchao", "diffusers", "executorch"):
            logging.getLogger(library).setLevel(logging.ERROR)


def main() -> None:
    """Run the command line; every error is one line on stderr (see `cli.boundary`)."""
    run(app)
