"""The command `mpqdm-fx export`: a pipeline folder becomes programs and a runner."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mpqdm_fx.cli import checks as checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.screens.start import bits_of
from mpqdm_fx.cli.streams import announce, say
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ConfigError

__all__ = ["export"]


@opt.takes_settings(weights=8)
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A diffusers pipeline folder (model_index.json).")
    ],
    output: opt.OutputOption = Path("exported"),
    size: Annotated[
        list[str] | None,
        typer.Option(help="HEIGHTxWIDTH in pixels that can be drawn; repeat it for more."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts to calibrate on, one a line.")
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Guidance scale to calibrate at, and the runner's default.")
    ] = 7.5,
    steps: opt.StepsOption = 20,
    trajectories: opt.TrajectoriesOption = 16,
    tabulate: Annotated[
        bool,
        typer.Option(
            "--tabulate",
            help="Tables for --steps steps of the pipeline's scheduler in the time branch's place.",
        ),
    ] = False,
    in_float: Annotated[bool, typer.Option("--float", help="Export without quantizing.")] = False,
    config: MPQConfig = opt.DEFAULTS,
    minimum_sqnr: Annotated[
        float, typer.Option(help="Text encoder or VAE below this many dB stay in float.")
    ] = 30.0,
    resume: opt.ResumeOption = False,
    max_memory: opt.MemoryOption = None,
    device: opt.DeviceOption = None,
    sensitivity: opt.SensitivityOption = None,
    four_bit: opt.FourBitOption = "whole",
    external_weights: opt.ExternalWeightsOption = False,
    compress: opt.CompressOption = False,
    overwrite: opt.OverwriteOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Export a pipeline MODEL: text encoder, denoiser, VAE as .pte, and run.py that draws."""
    memory = opt.memory_of(max_memory)
    sizes = [_size_of(text) for text in size] if size else None
    checks.check_output_folder(output, model, prompts)
    checks.check_output_file(sensitivity, "--sensitivity", reads=[model], replaced=output)
    checks.check_packages("executorch", purpose="export")
    if checks.has_text_encoder(model):
        checks.check_packages("transformers", purpose="a pipeline with a text encoder")
    form = "float" if in_float else bits_of(config)
    announce(f"exporting {model} to {output}: {form}")
    from mpqdm_fx.pipelines.export import export_pipeline
    from mpqdm_fx.pipelines.prompts import DEFAULT_PROMPTS, read_prompts

    checks.check_device(device)
    result = export_pipeline(
        model,
        None if in_float else config,
        output,
        sizes=sizes,
        prompts=DEFAULT_PROMPTS if prompts is None else read_prompts(prompts),
        steps=steps,
        guidance=guidance,
        trajectories=trajectories,
        minimum_sqnr_db=minimum_sqnr,
        resume=resume,
        max_memory=memory,
        device=device,
        sensitivity=sensitivity,
        tabulate=tabulate,
        four_bit=four_bit,
        external_weights=external_weights,
        compress=compress,
        overwrite=overwrite,
    )
    console = opt.console()
    if as_json:
        console.print_json(json.dumps(result.manifest))
        return
    table = Table("program", "method", "precision", "bytes of its files", "SQNR dB", "subgraphs")
    for method in result.manifest["methods"]:
        part = result.manifest["parts"][method["part"]]
        found = part["quantized_sqnr_db"] if part["precision"] != "float" else None
        table.add_row(
            method["file"],
            method["method"],
            part["precision"],
            f"{_bytes(result.manifest, method['file'], method['weights']):,}",
            "" if found is None else f"{float(found):.1f}",
            str(method["subgraphs"]),
        )
    console.print(table)
    run = shlex.quote(str(output / "run.py"))
    say(console, f"written to {output}; draw with: python {run}")


def _bytes(manifest: Mapping[str, Any], *names: str | None) -> int:
    return sum(int(manifest["files"][name]["bytes"]) for name in names if name is not None)


def _size_of(text: str) -> tuple[int, int]:
    """Height and width of a text like `512x768`."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise ConfigError(f"--size {text!r}: write HEIGHTxWIDTH, for example 512x512")
    return int(height), int(width)
