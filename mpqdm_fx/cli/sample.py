"""The command `mpqdm-fx sample`: pictures that a folder or a float model draws."""

from pathlib import Path
from typing import Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, say

__all__ = ["sample"]


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
    prompts: opt.PromptsOption = None,
    guidance: opt.GuidanceOption = None,
) -> None:
    """Draw images with a program, packed weights, or the float model; prompts take turns."""
    checks.check_output_file(output, "--output", reads=[model], suffix=".png")
    if form == "pte" or (form == "auto" and checks.has_program(model)):
        checks.check_packages("executorch", purpose="running a program")
    announce(f"drawing {num} images of {model} to {output}")
    from mpqdm_fx.denoisers import draw, open_denoiser, pictures, zoom_of
    from mpqdm_fx.jobs.calibration import warn_of
    from mpqdm_fx.pipelines.components import as_drawn
    from mpqdm_fx.pipelines.prompts import read_prompts
    from mpqdm_fx.report.images import save_grid

    source, denoiser = open_denoiser(model, subfolder, form, variant)
    given = None if prompts is None else read_prompts(prompts)
    source = as_drawn(source, model, prompts=given, guidance=guidance)
    warn_of(source)
    images = pictures(draw(source, denoiser, num=num, steps=steps, seed=seed), source)
    save_grid(images, output, columns=max(1, round(num**0.5)), zoom=zoom_of(images))
    say(opt.console(), f"{num} images written to {output}")
