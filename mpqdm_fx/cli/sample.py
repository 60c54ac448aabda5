"""The command `mpqdm-fx sample`: pictures that a folder or a float model draws."""

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, say
from mpqdm_fx.io.progress import expect, stage

__all__ = ["Form", "sample"]

logger = logging.getLogger(__name__)

Form = Literal["auto", "pte", "packed", "float"]
"""As of `denoisers.FORMS`, which loads torch."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def sample(
    model: opt.FolderOrModelArgument,
    num: Annotated[int, typer.Option(min=1, help="Images to draw.", rich_help_panel=opt.RUN)] = 16,
    steps: opt.SamplerStepsOption = 20,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help=f"Picture to write: {', '.join(_PICTURES)}.",
            rich_help_panel=opt.RUN,
        ),
    ] = Path("grid.png"),
    overwrite: opt.OverwriteFileOption = False,
    form: Annotated[
        Form,
        typer.Option(
            "--from",
            case_sensitive=False,
            help="What runs: auto is the program if there is one.",
            rich_help_panel=opt.PROGRAM,
        ),
    ] = "auto",
    subfolder: opt.SubfolderOption = None,
    variant: opt.VariantOption = None,
    seed: opt.SeedOption = 0,
    prompts: opt.PromptsOption = None,
    guidance: opt.GuidanceOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Draw images with a program, packed weights, or the float model; prompts take turns."""
    checks.check_output_file(
        output, "--output", reads=[model], suffixes=_PICTURES, overwrite=overwrite
    )
    checks.check_name(model)
    form = _form_that_runs(model, form)
    announce(f"drawing {num} images of {model} to {output}")
    from mpqdm_fx.jobs.calibration import warn_of
    from mpqdm_fx.jobs.foretold import drawing_stages, sample_stages
    from mpqdm_fx.pipelines.components import as_drawn, is_drawn_by_pipeline
    from mpqdm_fx.pipelines.prompts import read_prompts
    from mpqdm_fx.report.images import save_grid
    from mpqdm_fx.sources.denoisers import draw, open_denoiser, pictures, zoom_of

    texts = None if prompts is None else read_prompts(prompts)
    expect(lambda: sample_stages(in_pipeline=is_drawn_by_pipeline(model)))
    with stage("loading"):
        source, denoiser = open_denoiser(model, subfolder, form, variant)
        source = as_drawn(source, model, prompts=texts, guidance=guidance)
    warn_of(source)
    expect(lambda: drawing_stages(source, num=num, steps=steps))
    images = pictures(draw(source, denoiser, num=num, steps=steps, seed=seed), source)
    save_grid(images, output, columns=max(1, round(num**0.5)), zoom=zoom_of(images))
    if as_json:
        record = {"output": str(output), "images": num, "steps": steps, "seed": seed, "from": form}
        opt.console().print_json(json.dumps(record))
        return
    say(opt.console(), f"{num} images written to {output}")


def _form_that_runs(model: str, form: Form) -> Form:
    """What `auto` stands for here.

    Raises:
        ConfigError: A program was asked for, and what runs it is not installed.
    """
    if form == "pte":
        checks.check_packages("executorch", purpose="running a program")
    if form != "auto" or not checks.is_result(model):
        return "float" if form == "auto" else form
    if not checks.has_program(model):
        return "packed"
    if checks.is_installed("executorch"):
        return "pte"
    logger.warning(
        "the program of %s needs executorch, which is not installed: drawing from its packed "
        "weights, whose pictures differ a little",
        model,
    )
    return "packed"
