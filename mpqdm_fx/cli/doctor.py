"""The command `mpqdm-fx doctor`: what XNNPACK, and own kernels, would take of a model."""

import json
from typing import Annotated

import typer

from mpqdm_fx.backends.names import Cpu, Kernels, ProgramBackend
from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, say
from mpqdm_fx.records.config import MPQConfig

__all__ = ["doctor"]


@opt.takes_settings(
    of_models=("in_float", "four_bit", "subfolder", "variant", "inputs"),
    without=(
        "slowdown", "effective_bits", "weight_bytes", "rounding", "refinements", "propagation",
        "noise_argument", "seed",
    )
)  # fmt: skip
def doctor(
    model: opt.FolderOrModelArgument,
    config: MPQConfig = opt.DEFAULTS,
    backend: Annotated[
        ProgramBackend | None,
        typer.Option(
            case_sensitive=False,
            help="What the program is for. Default: xnnpack, or what the folder was written for.",
            rich_help_panel=opt.PROGRAM,
        ),
    ] = None,
    four_bit: opt.FourBitOption = "whole",
    kernels: Annotated[
        Kernels | None,
        typer.Option(
            case_sensitive=False,
            help="As of quantize. Default: auto, or as the folder's program was made.",
            rich_help_panel=opt.PROGRAM,
        ),
    ] = None,
    cpu: Annotated[
        Cpu | None,
        typer.Option(
            case_sensitive=False,
            help="As of quantize. Default: avx2, or as the folder's program was made.",
            rich_help_panel=opt.PROGRAM,
        ),
    ] = None,
    in_float: Annotated[
        bool,
        typer.Option(
            "--float",
            help="Judge the float program of a float model, in place of the one of these settings.",
            rich_help_panel=opt.PROGRAM,
        ),
    ] = False,
    max_delegates: Annotated[
        int | None,
        typer.Option(
            min=1, help="Exit with status 1 if there would be more.", rich_help_panel=opt.PROGRAM
        ),
    ] = None,
    subfolder: opt.SubfolderOption = None,
    variant: opt.VariantOption = None,
    inputs: opt.InputsOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Say in how many delegates XNNPACK would take MODEL, and why what stays out does."""
    checks.check_name(model)
    checks.check_packages("executorch", purpose="doctor")
    announce(f"asking XNNPACK what it takes of {model}")
    from mpqdm_fx.jobs.doctor import diagnose_model

    diagnosis = diagnose_model(
        model, None if in_float else config, backend=backend, four_bit=four_bit, kernels=kernels,
        cpu=cpu, subfolder=subfolder, variant=variant, inputs=inputs,
    )  # fmt: skip
    if as_json:
        opt.console().print_json(json.dumps(diagnosis.to_dict()))
    else:
        say(opt.console(), diagnosis)
    if max_delegates is not None and diagnosis.delegates > max_delegates:
        raise typer.Exit(code=1)
