"""The command `mpqdm-fx pareto`: several budgets of one model, to choose from."""

from pathlib import Path
from typing import Annotated

import typer

from mpqdm_fx.cli import checks
from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import announce, complain, say
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.gates import parse_gates

__all__ = ["pareto"]


@opt.takes_settings(without=("weights", "effective_bits", "weight_bytes"))
def pareto(
    model: opt.ModelArgument,
    bits: Annotated[
        str,
        typer.Option(
            metavar="BITS,...",
            help="Budgets, for example 2,2.5,3,4: whole ones as of --weights, others as of "
            "--effective-bits.",
            rich_help_panel=opt.BITS,
        ),
    ] = "2,3,4,6",
    config: MPQConfig = opt.DEFAULTS,
    backend: opt.BackendOption = "xnnpack",
    output: opt.OutputOption = Path("pareto"),
    pick: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC>=NUMBER",
            help="Make a result folder, OUTPUT/picked, of the smallest budget that reaches this; "
            "repeat it for more. Exit status 1 if none does. Metrics: as of `evaluate --gate`.",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    trajectories: opt.TrajectoriesOption = 16,
    steps: opt.StepsOption = 20,
    prompts: opt.PromptsOption = None,
    guidance: opt.GuidanceOption = None,
    num: Annotated[
        int,
        typer.Option(min=2, help="Samples that each budget is judged by.", rich_help_panel=opt.RUN),
    ] = 64,
    samples: opt.SamplesOption = 16,
    inputs: opt.InputsOption = None,
    held_out: opt.HeldOutOption = None,
    resume: opt.ResumeOption = False,
    max_memory: opt.MemoryOption = None,
    device: opt.DeviceOption = None,
    sensitivity: opt.SensitivityOption = None,
    overwrite: opt.OverwriteOption = False,
    subfolder: opt.SubfolderOption = None,
    variant: opt.VariantOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Quantize MODEL to several budgets in one run; table and page of size against quality."""
    checks.check_name(model)
    budgets = _bits_of(bits)
    gates = parse_gates(pick, "--pick") if pick else None
    memory = opt.memory_of(max_memory)
    checks.check_output_folder(output, model)
    checks.check_output_file(sensitivity, "--sensitivity", reads=[model], replaced=output)
    if gates is not None:
        checks.check_backend(backend)
    if checks.has_text_encoder(model):
        checks.check_packages("transformers", purpose="a pipeline with a text encoder")
    if model == "digits":
        checks.check_packages("torchmetrics", "sklearn", purpose="evaluating the bundled model")
    widths = ", ".join(f"{budget:g}" for budget in budgets)
    announce(f"quantizing {model} to {output}: {widths} bits a weight")
    from mpqdm_fx.io.space import check_space
    from mpqdm_fx.jobs.calibration import open_source
    from mpqdm_fx.jobs.pareto import check_pareto, evaluation_of, pareto_to_folder
    from mpqdm_fx.jobs.result_folder import ProgramForm
    from mpqdm_fx.model.feasibility import weights_of
    from mpqdm_fx.records.run_options import RunOptions
    from mpqdm_fx.report.pareto_table import pareto_table

    checks.check_device(device)
    form = ProgramForm(backend=backend)
    check_pareto(
        form, config, budgets, output, evaluation=evaluation_of(num=num, steps=steps),
        picks=gates is not None, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    source = open_source(
        model, subfolder=subfolder, variant=variant, inputs=inputs, held_out=held_out,
        prompts=prompts, guidance=guidance,
    )  # fmt: skip
    if not resume:
        check_space(output, len(budgets) * weights_of(source.model))
    curve = pareto_to_folder(
        source,
        config,
        budgets,
        form=form,
        output=output,
        pick=gates,
        trajectories=trajectories,
        steps=steps,
        num=num,
        samples=samples,
        subfolder=subfolder,
        run=RunOptions(
            resume=resume, activation_memory=memory, device=device, sensitivity=sensitivity
        ),
        overwrite=overwrite,
    )
    console = opt.console()
    if as_json:
        console.print_json((output / "pareto.json").read_text(encoding="utf-8"))
    else:
        picked = None if curve.picked is None else curve.picked[0].bits
        console.print(pareto_table([point.model_dump() for point in curve.points], picked))
        page = output / "pareto.html"
        say(console, f"written to {output}" + (f"; look at {page}" if page.is_file() else ""))
        if curve.picked is not None:
            say(console, f"picked: {curve.picked[1].directory}")
    if gates is not None and curve.picked is None:
        goals = " and ".join(map(str, gates))
        complain(f"error: {output}: no budget reaches {goals}")
        raise typer.Exit(code=1)


def _bits_of(text: str) -> list[float]:
    """Budgets of a text like `2,2.5,3`."""
    try:
        budgets = [float(part) for part in text.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(1 <= bits <= 8 for bits in budgets):
        raise ConfigError(f"--bits {text!r}: write numbers from 1 to 8, for example 2,2.5,3,4")
    return budgets
