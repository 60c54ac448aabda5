"""The command `mpqdm-fx export`: a pipeline folder becomes programs and a runner."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from mpqdm_fx.backends.names import ProgramBackend, SideBits
from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.gates import GateOption, MetricsOption, end_with_gates, print_gates, with_gates
from mpqdm_fx.cli.screens.start import bits_of
from mpqdm_fx.cli.streams import announce, say
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.gates import parse_gates

__all__ = ["export"]

_LONGEST = 2**20  # as `Count` has it


@opt.takes_settings(weights=8)
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A diffusers pipeline folder (model_index.json).")
    ],
    output: opt.OutputOption = Path("exported"),
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="HEIGHTxWIDTH in pixels that can be drawn (a sound: its samples); repeat it for "
            "more."
        ),
    ] = None,
    prompts: opt.PromptsOption = None,
    guidance: opt.GuidanceOption = None,
    steps: opt.StepsOption = 20,
    trajectories: opt.TrajectoriesOption = 16,
    tabulate: Annotated[
        bool,
        typer.Option(
            "--tabulate",
            help="Tables for --steps steps of the pipeline's scheduler in the time branch's place.",
        ),
    ] = False,
    fuse_lora: Annotated[
        Path | None,
        typer.Option(help="LoRA (.safetensors) that is fused into the weights first."),
    ] = None,
    lora_scale: Annotated[
        float | None, typer.Option(help="Weight of the LoRA. Default: 1.")
    ] = None,
    in_float: Annotated[bool, typer.Option("--float", help="Export without quantizing.")] = False,
    config: MPQConfig = opt.DEFAULTS,
    minimum_sqnr: Annotated[
        float, typer.Option(help="Text encoder or VAE below this many dB stay in float.")
    ] = 30.0,
    encoder_bits: Annotated[
        SideBits,
        typer.Option(
            help="Bits of text encoders' weights; 4 needs a lower --minimum-sqnr, and dynamic "
            "activations to be stored so.",
            rich_help_panel=opt.BITS,
        ),
    ] = 8,
    resume: opt.ResumeOption = False,
    max_memory: opt.MemoryOption = None,
    device: opt.DeviceOption = None,
    sensitivity: opt.SensitivityOption = None,
    keep_run: Annotated[
        Path | None,
        typer.Option(
            help="Folder for solved layers and finished programs, which stays: --start-from takes "
            "it.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Folder of --keep-run: layers whose weights are as they were have its codes, the "
            "others are solved with its bits.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    backend: Annotated[
        ProgramBackend,
        typer.Option(
            case_sensitive=False,
            help="What programs are for: XNNPACK alone, or own kernels for weights below 8 bits "
            "beside it.",
            rich_help_panel=opt.PROGRAM,
        ),
    ] = "xnnpack",
    kernels: opt.KernelsOption = "auto",
    cpu: opt.CpuOption = "avx2",
    four_bit: opt.FourBitOption = "whole",
    external_weights: opt.ExternalWeightsOption = False,
    compress: opt.CompressOption = False,
    samples: Annotated[
        int, typer.Option(min=0, help="Prompts in samples.png: float above programs.")
    ] = 4,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it will take: time, memory, disk, size by part."),
    ] = False,
    overwrite: opt.OverwriteOption = False,
    gate: GateOption = None,
    metrics: MetricsOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Export a pipeline MODEL: text encoder, denoiser, VAE as .pte, and run.py that draws."""
    memory = opt.memory_of(max_memory)
    gates = parse_gates(gate)
    sizes = [_size_of(text) for text in size] if size else None
    if not model:  # of a variable that is not set; other names are looked up behind all settings
        checks.check_name(model)
    checks.check_output_folder(output, model, prompts, start_from)
    if keep_run is not None:
        checks.check_output_folder(
            keep_run, model, prompts, output, start_from, option="--keep-run", resumable=False
        )
    checks.check_output_file(sensitivity, "--sensitivity", reads=[model], replaced=output)
    if fuse_lora is None and lora_scale is not None:
        raise ConfigError("--lora-scale needs --fuse-lora: it is the weight of that file's LoRA")
    if fuse_lora is not None:
        checks.check_packages("peft", purpose="--fuse-lora")
    checks.check_packages("executorch", purpose="export")
    checks.check_backend(backend, kernels)
    if checks.has_text_encoder(model):
        checks.check_packages("transformers", purpose="a pipeline with a text encoder")
    elif Path(model).is_dir():
        _refuse_prompting(model, {"--prompts": prompts, "--guidance": guidance})
    form = "float" if in_float else bits_of(config)
    announce(f"exporting {model} to {output}: {form}")
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.io.space import free_bytes, lack_of_space
    from mpqdm_fx.jobs.export import (
        ExportRuns,
        check_export_gates,
        export_to_folder,
        judge_export,
    )
    from mpqdm_fx.pipelines.adapters import Lora
    from mpqdm_fx.pipelines.estimate import estimate_export
    from mpqdm_fx.records.run_options import RunOptions
    from mpqdm_fx.report.export_tables import (
        export_estimate_table,
        export_table,
        layers_line,
        pictures_line,
    )
    from mpqdm_fx.report.record import PAGE

    checks.check_device(device)
    console = opt.console()
    scale = 1.0 if lora_scale is None else lora_scale
    runs = ExportRuns(
        sizes=sizes,
        prompts=prompts,
        steps=steps,
        guidance=guidance,
        trajectories=trajectories,
        samples=samples,
        lora=None if fuse_lora is None else Lora(file=fuse_lora, scale=scale),
    )
    settings = None if in_float else config
    expected = check_export_gates(gates, settings, runs)
    if dry_run:
        forecast = estimate_export(
            model, settings, sizes=sizes, prompts=runs.texts, steps=steps, guidance=guidance,
            trajectories=trajectories, max_memory=memory, backend=backend, kernels=kernels,
            cpu=cpu, four_bit=four_bit, samples=samples, encoder_bits=encoder_bits,
            tabulate=tabulate, lora=runs.lora,
        ).to_dict()  # fmt: skip
        place = keep_run or output
        forecast["free_bytes"] = free_bytes(place)
        if as_json:
            console.print_json(json.dumps(forecast))
            return
        console.print(export_estimate_table(forecast))
        if lack := lack_of_space(place, forecast["disk_bytes"]):
            say(console, f"{'--keep-run' if keep_run else '--output'} {place}: {lack}")
        return
    result = export_to_folder(
        model,
        settings,
        output,
        runs,
        minimum_sqnr_db=minimum_sqnr,
        run=RunOptions(
            directory=keep_run,
            resume=resume,
            activation_memory=memory,
            device=device,
            sensitivity=sensitivity,
            start_from=start_from,
        ),
        tabulate=tabulate,
        backend=backend,
        kernels=kernels,
        cpu=cpu,
        four_bit=four_bit,
        external_weights=external_weights,
        compress=compress,
        encoder_bits=encoder_bits,
        overwrite=overwrite,
    )
    verdicts = judge_export(gates, result, expected)
    if as_json:
        console.print_json(json.dumps(plain(with_gates(result.manifest, verdicts))))
        end_with_gates(verdicts, output)
        return
    console.print(export_table(result.summary))
    for line in (layers_line(result.summary), pictures_line(result.summary)):
        if line:
            say(console, line)
    if (output / PAGE).is_file():
        say(console, f"report: {output / PAGE}")
    print_gates(console, verdicts)
    run = shlex.quote(str(output / "run.py"))
    say(console, f"written to {output}; draw with: python {run}")
    end_with_gates(verdicts, output)


def _refuse_prompting(model: str, options: Mapping[str, object]) -> None:
    """Refuse what only prompts have a use for."""
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{option}: {model} has no text encoder; leave the option out")


def _size_of(text: str) -> tuple[int, ...]:
    """Height and width of a text like `512x768`, or the length of a sound like `524288`."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(
            f"--size {text!r}: write HEIGHTxWIDTH, for example 512x512, or the samples of a sound"
        )
    size = tuple(map(int, sides))
    if not all(1 <= side <= _LONGEST for side in size):
        raise ConfigError(f"--size {text}: give numbers from 1 to {_LONGEST}")
    return size
