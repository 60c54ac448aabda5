"""The command line: quantize, distill, export, plan, sample, evaluate, verify, trace and more."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mpqdm_fx import cli_options as opt
from mpqdm_fx.cli_distill import distill
from mpqdm_fx.cli_export import export
from mpqdm_fx.cli_verify import verify
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ConfigError, MPQError
from mpqdm_fx.io.schema import plain

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile diffusion UNets into extremely low-bit programs for phone CPUs.",
)
console = opt.console()
errors = Console(stderr=True)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`digits`, a diffusers model folder, or a pipeline folder with --subfolder unet.",
    ),
]
SubfolderOption = Annotated[
    str | None, typer.Option(help="Part of a pipeline folder, for example `unet`.")
]


@app.command()
@opt.takes_settings()
def quantize(
    model: ModelArgument,
    config: MPQConfig = opt.DEFAULTS,
    backend: Annotated[str, typer.Option(help="xnnpack, torch_ao or packed.")] = "xnnpack",
    output: opt.OutputOption = Path("out"),
    trajectories: opt.TrajectoriesOption = 16,
    steps: opt.StepsOption = 20,
    samples: Annotated[int, typer.Option(min=0, help="Images in the grid.")] = 16,
    resume: opt.ResumeOption = False,
    max_memory: opt.MemoryOption = None,
    device: opt.DeviceOption = None,
    sensitivity: opt.SensitivityOption = None,
    four_bit: opt.FourBitOption = "whole",
    external_weights: opt.ExternalWeightsOption = False,
    compress: opt.CompressOption = False,
    subfolder: SubfolderOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Quantize MODEL into a folder: packed weights, program, sample grid, numbers."""
    from mpqdm_fx.api import BACKENDS
    from mpqdm_fx.models.sources import load_source
    from mpqdm_fx.processes import joined
    from mpqdm_fx.report.tables import layer_table, summary_table
    from mpqdm_fx.workflow import quantize_to_folder

    if backend not in BACKENDS:
        raise ConfigError(f"--backend {backend}: choose one of {', '.join(BACKENDS)}")
    with joined():
        result = quantize_to_folder(
            load_source(model, subfolder),
            config,
            backend=backend,
            output=output,
            trajectories=trajectories,
            steps=steps,
            samples=samples,
            subfolder=subfolder,
            resume=resume,
            max_memory=opt.memory_of(max_memory),
            device=device,
            sensitivity=sensitivity,
            four_bit=four_bit,  # type: ignore[arg-type]  # it is checked there
            external_weights=external_weights,
            compress=compress,
        )
    if result is None:
        return
    if as_json:
        console.print_json(json.dumps(result.summary))
        return
    console.print(layer_table(result.quantized.report))
    console.print(summary_table(result.summary))
    console.print(f"written to {output}")


app.command()(distill)
app.command()(export)


@app.command()
@opt.takes_settings(without=("effective_bits", "weight_bytes", "seed"))
def plan(
    model: ModelArgument,
    config: MPQConfig = opt.DEFAULTS,
    calls: Annotated[int, typer.Option(min=1, help="Calibration calls.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a call.")] = 16,
    max_memory: opt.MemoryOption = None,
    subfolder: SubfolderOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Say what quantizing MODEL will take: time, memory, disk."""
    from mpqdm_fx.models.sources import load_source
    from mpqdm_fx.report.tables import estimate_table
    from mpqdm_fx.workflow import estimate_source

    found = estimate_source(
        load_source(model, subfolder),
        config,
        calls=calls,
        batch_size=batch_size,
        max_memory=opt.memory_of(max_memory),
    )
    if as_json:
        console.print_json(json.dumps(found.to_dict()))
    else:
        console.print(estimate_table(found.to_dict()))


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(metavar="DIR|MODEL", help="Folder of `quantize`, or a float model.")
    ],
    num: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the scheduler.")] = 20,
    output: Annotated[Path, typer.Option(help="Picture to write (.png).")] = Path("grid.png"),
    form: Annotated[
        str, typer.Option("--from", help="What runs: auto, pte, packed or float.")
    ] = "auto",
    subfolder: SubfolderOption = None,
    seed: opt.SeedOption = 0,
) -> None:
    """Draw images with a program, packed weights, or the float model."""
    from mpqdm_fx.denoisers import draw, open_denoiser, pictures
    from mpqdm_fx.report.images import save_grid

    source, denoiser = open_denoiser(model, subfolder, form)
    images = draw(source, denoiser, num=num, steps=steps, seed=seed)
    save_grid(pictures(images), output, columns=max(1, round(num**0.5)))
    console.print(f"{num} images written to {output}")


@app.command()
def evaluate(
    directory: opt.FolderArgument,
    model: opt.FloatModelOption = None,
    num: Annotated[int, typer.Option(min=1, help="Samples of the free-running metrics.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the scheduler.")] = 20,
    seed: opt.SeedOption = 90_000,
    as_json: opt.JsonOption = False,
) -> None:
    """Measure a quantized folder against its float model on held-out, paired noise."""
    from mpqdm_fx.report.tables import metrics_table
    from mpqdm_fx.workflow import evaluate_folder

    metrics = evaluate_folder(directory, model=model, num=num, steps=steps, seed=seed)
    if as_json:
        console.print_json(json.dumps(metrics))
    else:
        console.print(metrics_table(metrics))


app.command()(verify)


@app.command()
def trace(
    model: ModelArgument,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what was found, or why it cannot be traced.")
    ] = False,
    subfolder: SubfolderOption = None,
) -> None:
    """Trace MODEL to its module-level graph and print it."""
    from mpqdm_fx.graph.explain import explain as explain_trace
    from mpqdm_fx.graph.trace import trace as trace_model
    from mpqdm_fx.models.sources import load_source

    source = load_source(model, subfolder)
    if explain:
        report = explain_trace(source.model, source.example_inputs)
        console.print(str(report), markup=False, highlight=False)
        if not report.ok:
            raise typer.Exit(code=1)
        return
    console.print(
        trace_model(source.model, source.example_inputs).graph, markup=False, highlight=False
    )


@app.command()
def doctor(
    model: Annotated[
        str, typer.Argument(metavar="DIR|MODEL", help="Folder of `quantize`, or a float model.")
    ],
    max_delegates: Annotated[
        int | None, typer.Option(min=1, help="Exit with status 1 if there would be more.")
    ] = None,
    subfolder: SubfolderOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Say how many delegates XNNPACK would take MODEL in, and why what stays out does."""
    from mpqdm_fx.workflow import diagnose_model

    found = diagnose_model(model, subfolder)
    if as_json:
        console.print_json(json.dumps(found.to_dict()))
    else:
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    if max_delegates is not None and found.delegates > max_delegates:
        raise typer.Exit(code=1)


@app.command()
def inspect(directory: opt.FolderArgument, as_json: opt.JsonOption = False) -> None:
    """Show a quantized folder: layer, shape, mean bits, bytes, SQNR."""
    from mpqdm_fx.folders import open_folder
    from mpqdm_fx.quantized import QuantizationReport
    from mpqdm_fx.report.tables import layer_table, summary_table

    folder = open_folder(directory)
    folder.files.check()
    manifest = folder.manifest
    if as_json:
        console.print_json(json.dumps(plain(manifest["report"])))
        return
    console.print(layer_table(QuantizationReport.from_dict(manifest["report"])))
    if "summary.json" in folder.files:
        console.print(summary_table(folder.files.read_json("summary.json")))


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every stage.")] = False,
) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("mpqdm_fx").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        # Deprecations and missing GPU extensions of the libraries underneath: nothing to act on.
        warnings.simplefilter("ignore")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it sets its logger when imported
        for library in ("torch", "torchao", "diffusers", "executorch"):
            logging.getLogger(library).setLevel(logging.ERROR)


def main() -> None:
    """Run the command line; an error of this package is one line on stderr and exit status 2."""
    try:
        app()
    except MPQError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print(
            "stopped; no result was written; quantize, distill and export go on with --resume"
        )
        sys.exit(130)
