"""The commands `mpqdm-fx quantize` and `plan`: a model becomes a folder; what that will take."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.gates import GateOption, end_with_gates, print_gates, with_gates
from mpqdm_fx.cli.screens.start import bits_of
from mpqdm_fx.cli.streams import announce, say
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.gates import parse_gates

if TYPE_CHECKING:
    from mpqdm_fx.jobs.result_folder import ProgramForm
    from mpqdm_fx.sources.source import Source

__all__ = ["plan", "quantize"]


@opt.takes_settings()
def quantize(
    model: opt.ModelArgument,
    config: MPQConfig = opt.DEFAULTS,
    backend: opt.BackendOption = "xnnpack",
    output: opt.OutputOption = Path("out"),
    trajectories: opt.TrajectoriesOption = 16,
    steps: opt.StepsOption = 20,
    prompts: opt.PromptsOption = None,
    guidance: opt.GuidanceOption = None,
    samples: opt.SamplesOption = 16,
    inputs: opt.InputsOption = None,
    held_out: opt.HeldOutOption = None,
    resume: opt.ResumeOption = False,
    max_memory: opt.MemoryOption = None,
    device: opt.DeviceOption = None,
    sensitivity: opt.SensitivityOption = None,
    four_bit: opt.FourBitOption = "whole",
    external_weights: opt.ExternalWeightsOption = False,
    compress: opt.CompressOption = False,
    kernels: opt.KernelsOption = "auto",
    cpu: opt.CpuOption = "avx2",
    overwrite: opt.OverwriteOption = False,
    gate: GateOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Write nothing; say what it will take, as `plan` does.",
            rich_help_panel=opt.RUN,
        ),
    ] = False,
    subfolder: opt.SubfolderOption = None,
    variant: opt.VariantOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Quantize MODEL into a folder: packed weights, program, sample grid, numbers."""
    checks.check_name(model)
    memory = opt.memory_of(max_memory)
    gates = parse_gates(gate)
    checks.check_output_folder(output, model)
    checks.check_output_file(sensitivity, "--sensitivity", reads=[model], replaced=output)
    checks.check_backend(backend, kernels)
    if checks.has_text_encoder(model):
        checks.check_packages("transformers", purpose="a pipeline with a text encoder")
    announce(f"quantizing {model} to {output}: {bits_of(config)}, {backend}")
    from mpqdm_fx.cli.screens.result import ResultScreen
    from mpqdm_fx.io.processes import joined
    from mpqdm_fx.io.schema import plain
    from mpqdm_fx.io.space import check_space
    from mpqdm_fx.jobs.calibration import open_source, rows_of
    from mpqdm_fx.jobs.disk_space import least_bytes
    from mpqdm_fx.jobs.evaluate import check_gates, gate_stages, judge_result
    from mpqdm_fx.jobs.quantize import check_start, quantize_to_folder
    from mpqdm_fx.jobs.result_folder import ProgramForm
    from mpqdm_fx.model.feasibility import check_feasible
    from mpqdm_fx.records.run_options import RunOptions

    checks.check_device(device)
    form = ProgramForm(
        backend=backend,
        four_bit=four_bit,
        external_weights=external_weights,
        compress=compress,
        kernels=kernels,
        cpu=cpu,
    )
    check_start(form, config, output, resume=resume, overwrite=overwrite)
    source = open_source(
        model, subfolder=subfolder, variant=variant, inputs=inputs, held_out=held_out,
        prompts=prompts, guidance=guidance,
    )  # fmt: skip
    check_gates(gates, source, form.backend)
    if not resume and not dry_run:  # who resumes has some of it on the disk already
        check_space(output, least_bytes(source.model, config, form))
    check_feasible(
        source.model, source.example_inputs, config, sensitivity=sensitivity, max_memory=memory,
        batch_size=rows_of(source, trajectories, steps),
    )  # fmt: skip
    if dry_run:
        _foretell(
            source, config, form, trajectories=trajectories, steps=steps, samples=samples,
            memory=memory, as_json=as_json, output=output,
        )  # fmt: skip
        return
    with joined():
        result = quantize_to_folder(
            source,
            config,
            backend=form.backend,
            output=output,
            trajectories=trajectories,
            steps=steps,
            samples=samples,
            subfolder=subfolder,
            run=RunOptions(
                resume=resume, activation_memory=memory, device=device, sensitivity=sensitivity
            ),
            four_bit=form.four_bit,
            external_weights=external_weights,
            compress=compress,
            kernels=kernels,
            cpu=cpu,
            overwrite=overwrite,
            then=gate_stages(gates, source, steps=steps),
        )
    if result is None:
        return
    verdicts = judge_result(gates, result, steps=steps)
    console = opt.console()
    if as_json:
        console.print_json(json.dumps(plain(with_gates(result.summary, verdicts))))
        end_with_gates(verdicts, output)
        return
    console.print(ResultScreen(result.summary, result.quantized.report, output))
    print_gates(console, verdicts)
    say(console, f"written to {output}")
    end_with_gates(verdicts, output)


@opt.takes_settings()
def plan(
    model: opt.ModelArgument,
    config: MPQConfig = opt.DEFAULTS,
    backend: opt.BackendOption = "xnnpack",
    trajectories: opt.TrajectoriesOption = 16,
    steps: opt.StepsOption = 20,
    samples: opt.SamplesOption = 16,
    prompts: opt.PromptsOption = None,
    guidance: opt.GuidanceOption = None,
    inputs: opt.InputsOption = None,
    held_out: opt.HeldOutOption = None,
    max_memory: opt.MemoryOption = None,
    four_bit: opt.FourBitOption = "whole",
    kernels: opt.KernelsOption = "auto",
    subfolder: opt.SubfolderOption = None,
    variant: opt.VariantOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Say what quantizing MODEL will take: time, memory, disk, size; as quantize --dry-run."""
    checks.check_name(model)
    memory = opt.memory_of(max_memory)
    announce(f"planning {model}: {bits_of(config)}; nothing is written")
    from mpqdm_fx.backends.check_settings import check_kernel_options
    from mpqdm_fx.jobs.calibration import open_source
    from mpqdm_fx.jobs.result_folder import ProgramForm
    from mpqdm_fx.model.feasibility import check_feasible

    form = ProgramForm(backend=backend, four_bit=four_bit, kernels=kernels)
    check_kernel_options(backend, kernels, form.cpu)
    source = open_source(
        model, subfolder=subfolder, variant=variant, inputs=inputs, held_out=held_out,
        prompts=prompts, guidance=guidance,
    )  # fmt: skip
    check_feasible(source.model, source.example_inputs, config)
    _foretell(
        source, config, form, trajectories=trajectories, steps=steps, samples=samples,
        memory=memory, as_json=as_json,
    )  # fmt: skip


def _foretell(
    source: "Source",
    config: MPQConfig,
    form: "ProgramForm",
    *,
    trajectories: int,
    steps: int,
    samples: int,
    memory: int | None,
    as_json: bool,
    output: Path | None = None,
) -> None:
    """Print what a run will take, and what the disk of its output has where one is known."""
    from mpqdm_fx.io.space import free_bytes, lack_of_space
    from mpqdm_fx.jobs.estimate import estimate_run
    from mpqdm_fx.report.tables import estimate_table

    forecast = estimate_run(
        source, config, form=form, trajectories=trajectories, steps=steps, samples=samples,
        max_memory=memory,
    ).to_dict()  # fmt: skip
    console = opt.console()
    if output is not None:
        forecast["free_bytes"] = free_bytes(output)
    if as_json:
        console.print_json(json.dumps(forecast))
        return
    console.print(estimate_table(forecast))
    needed = sum(forecast[name] for name in ("disk_bytes", "weight_bytes", "program_bytes"))
    if output is not None and (lack := lack_of_space(output, needed)):
        say(console, f"--output {output}: {lack}")
