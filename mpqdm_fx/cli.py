"""The command line: quantize, distill, export, plan, sample, evaluate, verify, trace and more."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from mpqdm_fx import cli_checks as checks
from mpqdm_fx import cli_options as opt
from mpqdm_fx.cli_boundary import Command, run
from mpqdm_fx.cli_distill import distill
from mpqdm_fx.cli_export import export
from mpqdm_fx.cli_quantize import plan, quantize
from mpqdm_fx.cli_streams import say
from mpqdm_fx.cli_verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile diffusion UNets into extremely low-bit programs for phone CPUs.",
)
console = opt.console()

app.command(cls=Command)(quantize)
app.command(cls=Command)(distill)
app.command(cls=Command)(export)
app.command(cls=Command)(plan)


@app.command(cls=Command)
def sample(
    model: opt.FolderOrModelArgument,
    num: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 16,
    steps: opt.SamplerStepsOption = 20,
    output: Annotated[Path, typer.Option(help="Picture to write (.png).")] = Path("grid.png"),
    form: Annotated[
        str, typer.Option("--from", help="What runs: auto, pte, packed or float.")
    ] = "auto",
    subfolder: opt.SubfolderOption = None,
    variant: opt.VariantOption = None,
    seed: opt.SeedOption = 0,
) -> None:
    """Draw images with a program, packed weights, or the float model."""
    checks.check_output_file(output, "--output", reads=[model], suffix=".png")
    if form == "pte" or (form == "auto" and checks.has_program(model)):
        checks.check_packages("executorch", purpose="running a program")
    from mpqdm_fx.denoisers import draw, open_denoiser, pictures
    from mpqdm_fx.report.images import save_grid

    source, denoiser = open_denoiser(model, subfolder, form, variant)
    images = draw(source, denoiser, num=num, steps=steps, seed=seed)
    save_grid(pictures(images), output, columns=max(1, round(num**0.5)))
    say(console, f"{num} images written to {output}")


@app.command(cls=Command)
def evaluate(
    directory: opt.FolderArgument,
    model: opt.FloatModelOption = None,
    num: Annotated[int, typer.Option(min=1, help="Samples of the free-running metrics.")] = 256,
    steps: opt.SamplerStepsOption = 20,
    seed: opt.SeedOption = 90_000,
    inputs: opt.InputsOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Measure a quantized folder against its float model on held-out, paired noise."""
    if inputs is None and (model or checks.origin_of(directory)) == "digits":
        checks.check_packages("torchmetrics", "sklearn", purpose="evaluating the bundled model")
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.report.tables import metrics_table
    from mpqdm_fx.workflow import evaluate_folder

    metrics = evaluate_folder(
        directory, model=model, num=num, steps=steps, seed=seed, inputs=inputs
    )
    if as_json:
        console.print_json(json.dumps(plain(metrics)))
    else:
        console.print(metrics_table(metrics))


app.command(cls=Command)(verify)


@app.command(cls=Command)
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
    from mpqdm_fx.graph.explain import explain as explain_trace
    from mpqdm_fx.graph.trace import trace as trace_model
    from mpqdm_fx.models.sources import load_with_calls

    source = load_with_calls(model, subfolder, variant, inputs)
    if explain:
        report = explain_trace(source.model, source.example_inputs)
        say(console, report)
        if not report.ok:
            raise typer.Exit(code=1)
        return
    say(console, trace_model(source.model, source.example_inputs).graph)


@app.command(cls=Command)
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
    from mpqdm_fx.workflow import diagnose_model

    found = diagnose_model(model, subfolder, variant, inputs)
    if as_json:
        console.print_json(json.dumps(found.to_dict()))
    else:
        say(console, found)
    if max_delegates is not None and found.delegates > max_delegates:
        raise typer.Exit(code=1)


@app.command(cls=Command)
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
        console.print_json(json.dumps(plain(manifest["report"])))
        return
    report = QuantizationReport.from_dict(manifest["report"])
    console.print(layer_table(report))
    if report.activations:
        console.print(activation_table(report))
    if report.judged:
        console.print(judgement_table(report))
    if SUMMARY in folder.files:
        console.print(summary_table(read_summary(folder)))


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
    """Run the command line; every error is one line on stderr (see `cli_boundary`)."""
    run(app)
