"""What the command line does, as functions: quantize to a folder, train it, measure it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpqdm_fx.api import Backend, quantize
from mpqdm_fx.backends.xnnpack.doctor import Diagnosis, diagnose
from mpqdm_fx.backends.xnnpack.four_bit import FourBit
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.denoisers import draw, origin_of, source_of
from mpqdm_fx.distill.api import distill
from mpqdm_fx.distill.checkpoint import has_state
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.files import checkpoint_of, first_difference, is_empty_but_for_hidden
from mpqdm_fx.folders import MANIFEST, check_target, open_folder
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.io.exchange import remove_folder
from mpqdm_fx.io.schema import plain
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.models.bundled import load_digits_classifier
from mpqdm_fx.models.functions import calls_of
from mpqdm_fx.models.sources import Source, load_with_calls
from mpqdm_fx.processes import is_first
from mpqdm_fx.quantized import QuantizedModel
from mpqdm_fx.report.metrics import (
    epsilon_sqnr,
    evaluate_denoiser,
    x0_sqnr,
)
from mpqdm_fx.report.noise_levels import sqnr_by_noise_level
from mpqdm_fx.result_folder import Form, calibration_of, held_out_of, write_folder
from mpqdm_fx.stages import normalized
from mpqdm_fx.storage import load
from mpqdm_fx.summary import read_summary
from mpqdm_fx.sweep.checkpoint import HEADER
from mpqdm_fx.sweep.estimate import Estimate, estimate
from mpqdm_fx.validation import Bytes, Count, Seed, Some, checked
from mpqdm_fx.versions import versions

__all__ = [
    "FolderResult",
    "check_start",
    "diagnose_model",
    "distill_folder",
    "estimate_source",
    "evaluate_folder",
    "quantize_to_folder",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FolderResult:
    """What a job made.

    Attributes:
        directory: The folder.
        quantized: The quantized model.
        summary: Numbers for the printed table, plain JSON types.
    """

    directory: Path
    quantized: QuantizedModel
    summary: dict[str, Any]


@checked
def quantize_to_folder(
    source: Source,
    config: MPQConfig,
    *,
    backend: Backend,
    output: Path,
    trajectories: Count = 16,
    steps: Count = 20,
    samples: Some = 16,
    subfolder: str | None = None,
    resume: bool = False,
    max_memory: Bytes | None = None,
    device: str | None = None,
    sensitivity: Path | None = None,
    four_bit: FourBit = "whole",
    external_weights: bool = False,
    compress: bool = False,
    overwrite: bool = False,
) -> FolderResult | None:
    """Quantize a source and write everything that belongs to it into one folder.

    Args:
        source: Model and scheduler, or model and calls (`Source.with_calls`).
        config: Settings.
        backend: `"xnnpack"` also writes `unet.pte`; `"torch_ao"` also checks that conversion
            succeeds and times it; packed weights are always written.
        output: Folder; it appears whole or not at all.
        trajectories: Denoising runs to calibrate on, where the source has no calls.
        steps: Steps of each.
        samples: Images in the grid, drawn by what the backend runs.
        subfolder: Part of a pipeline folder that the source came from.
        resume: Go on with the solved layers of a run that was killed. They lie beside `output`,
            in a folder of that name and `.checkpoint`, until the run is through.
        max_memory: Bytes of activations held in memory; the rest goes to disk.
        device: Where to calibrate and to solve, for example `"cuda"`.
        sensitivity: File that keeps the sensitivities for runs with other budgets.
        four_bit: Which weights the program stores at four bits, as of `lower`.
        external_weights: Write the program's weights to a file of their own, `unet.ptd`.
        compress: Store the program's files as `.xz`, which are expanded when they are first run.
        overwrite: Whether `output` may be a result that is replaced.

    Returns:
        What was made; None in the other processes of a run with several, which write nothing.

    Raises:
        MPQError: One of the steps cannot be done; no half of a result is left behind.
    """
    form = Form(
        backend=backend, four_bit=four_bit, external_weights=external_weights, compress=compress
    )
    check_start(form, config, output, resume=resume, overwrite=overwrite)
    data = calibration_of(source, trajectories=trajectories, steps=steps, seed=config.seed)
    solved = checkpoint_of(output)
    quantized = quantize(
        source.model,
        config,
        data,
        directory=solved,
        resume=resume,
        max_activations=max_memory,
        device=device,
        sensitivity=sensitivity,
    )
    if not is_first():
        return None
    summary = write_folder(
        quantized, source, output, form=form, steps=steps, samples=samples, subfolder=subfolder,
        overwrite=overwrite,
    )  # fmt: skip
    remove_folder(solved)
    return FolderResult(directory=output, quantized=quantized, summary=summary)


def check_start(
    form: Form, config: MPQConfig, output: Path, *, resume: bool, overwrite: bool = False
) -> None:
    """Refuse what `quantize_to_folder` could not end with, before the model is loaded.

    Args:
        form: What is to be written.
        config: Settings.
        output: Folder to appear.
        resume: Go on with a run that was stopped.
        overwrite: Whether `output` may be a result that is replaced.

    Raises:
        ConfigError: Settings do not fit the backend, or an unfinished run lies beside `output` that
            has other settings, or is not to be resumed.
        ArtifactError: `output` holds something else.
        LoweringError: ExecuTorch is missing.
    """
    form.check(config)
    check_target(output, overwrite=overwrite)
    solved = checkpoint_of(output)
    header = solved / HEADER
    _check_ours(solved, header.is_file())
    if not header.is_file():
        return
    found = read_json(header, fix="delete the folder to start anew")
    for key, wanted in {"settings": config.to_dict(), "versions": versions()}.items():
        if (other := first_difference(found.get(key), plain(wanted))) is not None:
            raise ConfigError(
                f"{solved} holds an unfinished run: {other}; use what it was started with, or "
                f"delete it"
            )
    if not resume and any(solved.glob("layer-*")):
        raise ConfigError(f"{solved} holds a run that was not finished; resume it, or delete it")


def _check_ours(folder: Path, ours: bool) -> None:
    """Refuse a folder of somebody else's where a run would be kept: it goes when that is through.

    What a killed run left is known by its names: files that were not whole yet.
    """
    if not folder.exists() or ours:
        return
    if not (folder.is_dir() and is_empty_but_for_hidden(folder)):
        raise ConfigError(f"{folder} is in the way and holds no unfinished run; move or delete it")


@checked
def distill_folder(
    folder: Path,
    config: DistillConfig,
    *,
    output: Path,
    model: str | None = None,
    samples: Some = 16,
    resume: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
) -> FolderResult | None:
    """Train a quantized folder against its float model, and write what comes out like `quantize`.

    Args:
        folder: Folder written by `quantize`; it is not changed.
        config: Settings of the training. Models with text are trained on seeded random embeddings.
        output: Folder; it appears whole or not at all, with the forms that `folder` has.
        model: The float model, if it is no longer where it was.
        samples: Images in the grid.
        resume: Go on with a run that was killed. Its state lies beside `output`, in a folder of
            that name and `.checkpoint`, until the run is through.
        device: Where to train.
        overwrite: Whether `output` may be a result that is replaced.

    Returns:
        What was made; None in the other processes of a run with several, which write nothing.

    Raises:
        MPQError: One of the steps cannot be done; no half of a result is left behind.
    """
    if config.guided:
        raise ConfigError(
            "guidance_scale needs embeddings of the unconditional half, which a folder has not; "
            "give them to mpqdm_fx.distill.distill(..., unconditional=)"
        )
    opened = open_folder(folder)
    summary = read_summary(opened)
    form = Form.of(summary["backend"], opened.manifest["program"])
    check_target(output, overwrite=overwrite)
    state = checkpoint_of(output)
    _check_ours(state, has_state(state))
    if has_state(state) and not resume:
        raise ConfigError(f"{state} holds a run that was not finished; resume it, or delete it")
    source, quantized = source_of(folder, model), load(folder)
    if source.scheduler is None:
        raise ConfigError(
            f"{source.name} is made by a function, and training goes along denoising runs; train "
            f"it in Python with a loop of your own: mpqdm_fx.distill.distill(..., scheduler=)"
        )
    form.check(quantized.settings)
    trained = distill(
        quantized,
        source.model,
        config,
        scheduler=source.scheduler,
        sample_shape=source.sample_shape,
        conditions=source.conditions(config.trajectories, config.seed),
        directory=state,
        device=device,
    )
    if not is_first():
        return None
    told = {
        "settings": config.to_dict(),
        "updates": trained.history.updates,
        "seconds": trained.history.seconds,
        "error_before": trained.before,
        "error_after": trained.after,
        "improved": trained.improved,
        "epsilon_sqnr_db_before": summary["epsilon_sqnr_db"],
    }
    found = write_folder(
        trained.quantized, source, output, form=form, steps=config.steps, samples=samples,
        subfolder=origin_of(folder).subfolder, more={"distilled": told}, overwrite=overwrite,
    )  # fmt: skip
    remove_folder(state)
    return FolderResult(directory=output, quantized=trained.quantized, summary=found)


@checked
def estimate_source(
    source: Source,
    config: MPQConfig,
    *,
    calls: Count,
    batch_size: Count,
    max_memory: Bytes | None = None,
) -> Estimate:
    """What quantizing a source would take on this machine.

    Args:
        source: Model and scheduler.
        config: Settings.
        calls: Calibration calls.
        batch_size: Samples in each.
        max_memory: Bytes of activations held in memory.

    Raises:
        TraceError: The model cannot be traced.
    """
    graph_module = normalized(source.model, source.example_inputs, config)
    inputs = example_inputs(graph_module.meta["signature"], batch_size=batch_size)
    return estimate(graph_module, [inputs] * calls, config, max_memory=max_memory)


def diagnose_model(
    name: str,
    subfolder: str | None = None,
    variant: str | None = None,
    inputs: str | None = None,
) -> Diagnosis:
    """What XNNPACK would take of a model, at batch 1.

    Args:
        name: A float model (see `load_source`), or a folder written by `quantize`.
        subfolder: Part of a pipeline folder.
        variant: Variant of a float model's weight files.
        inputs: Calls of a float model, as of `load_with_calls`.

    Raises:
        LoweringError: ExecuTorch is missing, or an activation mode does not run.
    """
    if (Path(name) / MANIFEST).exists():
        quantized = load(Path(name))
        example = example_inputs(quantized.signature, batch_size=1)
        four_bit = (open_folder(name).manifest["program"] or {}).get("four_bit", "whole")
        return diagnose(quantized.rounded, example, quantized.ranges or None, four_bit=four_bit)
    source = load_with_calls(name, subfolder, variant, inputs)
    graph_module = normalized(source.model, source.example_inputs, MPQConfig())
    example = example_inputs(graph_module.meta["signature"], batch_size=1)
    return diagnose(graph_module, example)


@checked
def evaluate_folder(
    folder: Path,
    *,
    model: str | None = None,
    num: Count = 256,
    steps: Count = 20,
    seed: Seed,
    inputs: str | None = None,
) -> dict[str, Any]:
    """Measure a saved model against the float model that it came from.

    Args:
        folder: Folder written by `quantize`.
        model: The float model, if it is no longer where it was.
        num: Samples of the free-running metrics.
        steps: Steps of the scheduler.
        seed: Seed of noise and held-out trajectories.
        inputs: Function that gives calls of the user's own, as of `calls_of`: outputs are compared
            on them, also by noise level, and nothing is drawn.

    Returns:
        Metrics by name; Frechet distance and accuracy only for the bundled model, whose
        classifier is bundled too.
    """
    source = source_of(folder, model)
    quantized = load(folder)
    if inputs is not None:
        return _compared(source, quantized, inputs)
    if source.name == "digits":
        return evaluate_denoiser(
            source.model,
            quantized,
            source.scheduler,
            load_digits_classifier(),
            num_samples=num,
            num_inference_steps=steps,
            seed=seed,
        ).to_dict()
    held_out = held_out_of(source, steps=steps, seed=seed)
    expected = draw(source, source.model, num=num, steps=steps, seed=seed + 1)
    found = draw(source, quantized, num=num, steps=steps, seed=seed + 1)
    return {
        "epsilon_sqnr": epsilon_sqnr(source.model, quantized, held_out),
        "x0_sqnr": x0_sqnr(expected, found),
        "num_samples": num,
        "num_inference_steps": steps,
        "seed": seed,
    }


def _compared(source: Source, quantized: QuantizedModel, inputs: str) -> dict[str, Any]:
    """Outputs on the user's own calls, together and by noise level."""
    calls = calls_of(inputs, source.model, held_out=0).calls
    node = find_noise_argument(quantized.graph_module, quantized.settings.noise_argument)
    levels: dict[str, float] = {}
    if node is not None:
        name = str(node.target)
        ratios = sqnr_by_noise_level(source.model, quantized, calls, noise_argument=name)
        levels = {f"epsilon_sqnr_at_{name}_{level:g}": ratio for level, ratio in ratios.items()}
    return {"epsilon_sqnr": epsilon_sqnr(source.model, quantized, calls), **levels}
