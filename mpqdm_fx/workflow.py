"""What the command line does, as functions: quantize a source to a folder, sample, evaluate."""

import copy
import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpqdm_fx.api import BACKENDS, MODES, Backend, lower, quantize
from mpqdm_fx.backends.xnnpack.compressed import compress_program, drop_expansions
from mpqdm_fx.backends.xnnpack.doctor import Diagnosis, diagnose
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, check_four_bit
from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.denoisers import (
    PROGRAM,
    SOURCE,
    Denoiser,
    draw,
    first_rows,
    pictures,
    program_denoiser,
    program_files,
    source_of,
)
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.memory import peak_memory
from mpqdm_fx.models.bundled import load_digits_classifier
from mpqdm_fx.models.sources import Source, load_source
from mpqdm_fx.parity.verify import store_parity
from mpqdm_fx.processes import is_first
from mpqdm_fx.quantized import QuantizedModel
from mpqdm_fx.report.images import save_grid
from mpqdm_fx.report.metrics import (
    EVALUATION_SEED,
    epsilon_sqnr,
    evaluate_denoiser,
    x0_sqnr,
)
from mpqdm_fx.stages import normalized
from mpqdm_fx.storage import MANIFEST, load, read_manifest, staged_directory, write_model
from mpqdm_fx.sweep.estimate import Estimate, estimate

__all__ = [
    "QuantizeResult",
    "diagnose_model",
    "estimate_source",
    "evaluate_folder",
    "quantize_to_folder",
]

logger = logging.getLogger(__name__)

GRID = "samples.png"
SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What `quantize_to_folder` made.

    Attributes:
        directory: The folder.
        quantized: The quantized model.
        summary: Numbers for the printed table, plain JSON types.
    """

    directory: Path
    quantized: QuantizedModel
    summary: dict[str, Any]


def calibration_of(
    source: Source, *, trajectories: int, steps: int, seed: int, batch_size: int = 16
) -> Trajectories:
    """Inputs along the float model's own denoising runs, all timesteps mixed in every batch."""
    return Trajectories(
        source.model,
        source.scheduler,
        num_trajectories=trajectories,
        num_inference_steps=steps,
        batch_size=batch_size,
        seed=seed,
        sample_shape=source.sample_shape,
        conditions=source.conditions(trajectories, seed),
        held_out=trajectories // 4,
    )


def quantize_to_folder(
    source: Source,
    config: MPQConfig,
    *,
    backend: Backend,
    output: Path,
    trajectories: int = 16,
    steps: int = 20,
    samples: int = 16,
    subfolder: str | None = None,
    resume: bool = False,
    max_memory: int | None = None,
    device: str | None = None,
    sensitivity: Path | None = None,
    four_bit: FourBit = "whole",
    external_weights: bool = False,
    compress: bool = False,
) -> QuantizeResult | None:
    """Quantize a source and write everything that belongs to it into one folder.

    Args:
        source: Model and scheduler.
        config: Settings.
        backend: `"xnnpack"` also writes `unet.pte`; `"torch_ao"` also checks that conversion
            succeeds and times it; packed weights are always written.
        output: Folder; it appears whole or not at all.
        trajectories: Denoising runs to calibrate on.
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

    Returns:
        What was made; None in the other processes of a run with several, which write nothing.

    Raises:
        MPQError: One of the steps cannot be done; no half of a result is left behind.
    """
    # said now, not after minutes of calibration
    _check_backend(config, backend)
    if backend == "xnnpack":
        check_four_bit(four_bit, config.activation_mode)
    elif external_weights or compress or four_bit != "whole":
        raise ConfigError(
            f"{backend} writes no program whose weights could be apart, compressed or at four "
            f'bits; choose backend="xnnpack" or leave external_weights, compress and four_bit out'
        )
    data = calibration_of(source, trajectories=trajectories, steps=steps, seed=config.seed)
    solved = output.with_name(f"{output.name}.checkpoint")
    quantized = quantize(
        source.model,
        config,
        _InSchedulerDtype(source, data, steps),
        directory=solved,
        resume=resume,
        max_activations=max_memory,
        device=device,
        sensitivity=sensitivity,
    )
    if not is_first():
        return None
    with staged_directory(output) as stage:
        source.scheduler.save_pretrained(stage / "scheduler")
        origin = {"model": source.name, "subfolder": subfolder}
        (stage / SOURCE).write_text(json.dumps(origin), encoding="utf-8")
        runner: Denoiser = quantized
        program: dict[str, Any] | None = None
        graphs: list[Any] = []
        if backend == "xnnpack":
            lowered = lower(
                quantized,
                "xnnpack",
                output=stage / PROGRAM,
                observe=graphs.append,
                external_weights=external_weights,
                four_bit=four_bit,
            )
            program = lowered.to_dict()
            for file in program_files(stage) if compress else ():
                compress_program(file, keep=False)
            runner = program_denoiser(program_files(stage)[0], quantized.signature)
        elif backend == "torch_ao":
            runner = _positional(lower(quantized, "torch_ao"), quantized)
        write_model(quantized, stage, program={"four_bit": four_bit} if program else None)
        store_parity(quantized, source, stage, graphs[0] if graphs else None)
        graphs.clear()
        summary = _summarise(source, quantized, runner, backend, data)
        summary["program"] = program
        if samples:
            images = draw(source, runner, num=samples, steps=steps, seed=0)
            save_grid(pictures(images), stage / GRID, columns=max(1, round(samples**0.5)))
        form = "pte" if backend == "xnnpack" else "packed"
        summary["peak_memory_bytes"] = {
            form: peak_memory(form, str(stage)),
            "float": peak_memory("float", source.name, subfolder),
        }
        for file in program_files(stage):
            drop_expansions(file)
        summary["files"] = {
            path.name: path.stat().st_size for path in sorted(stage.iterdir()) if path.is_file()
        }
        (stage / SUMMARY).write_text(json.dumps(summary, indent=2), encoding="utf-8")
    shutil.rmtree(solved)
    return QuantizeResult(directory=output, quantized=quantized, summary=summary)


def _check_backend(config: MPQConfig, backend: Backend) -> None:
    """Refuse settings that the backend does not run, and one that is not installed."""
    if config.activation_mode not in MODES[backend]:
        modes = " or ".join(f'"{mode}"' for mode in MODES[backend])
        doors = " or ".join(f'"{b}"' for b in BACKENDS if config.activation_mode in MODES[b])
        raise ConfigError(
            f"{backend} does not run activation_mode={config.activation_mode!r}; choose "
            f"activation_mode={modes} or backend={doors}"
        )
    if backend == "xnnpack":
        if config.activation_bits != 8:
            raise ConfigError(
                f"XNNPACK runs activations of 8 bits, not {config.activation_bits}; choose "
                f'activation_bits=8 or backend="packed"'
            )
        require_executorch()


class _InSchedulerDtype:
    """Calls with float timesteps if the scheduler makes such.

    Euler and its kin give whole or fractional timesteps, depending on the number of steps; a graph
    that is traced with float timesteps takes both.
    """

    def __init__(self, source: Source, data: Trajectories, steps: int) -> None:
        scheduler = copy.deepcopy(source.scheduler)
        scheduler.set_timesteps(steps)
        self._fractional = scheduler.timesteps.is_floating_point()
        self._data = data

    @property
    def held_out_calls(self) -> range:
        return self._data.held_out_calls

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for call in self._data:
            fractional = {"timestep": call["timestep"].float()} if self._fractional else {}
            yield {**call, **fractional}


def estimate_source(
    source: Source,
    config: MPQConfig,
    *,
    calls: int,
    batch_size: int,
    max_memory: int | None = None,
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


def diagnose_model(name: str, subfolder: str | None = None) -> Diagnosis:
    """What XNNPACK would take of a model, at batch 1.

    Args:
        name: A float model (see `load_source`), or a folder written by `quantize`.
        subfolder: Part of a pipeline folder.

    Raises:
        LoweringError: ExecuTorch is missing, or an activation mode does not run.
    """
    if (Path(name) / MANIFEST).exists():
        quantized = load(Path(name))
        inputs = example_inputs(quantized.signature, batch_size=1)
        four_bit = (read_manifest(name).get("program") or {}).get("four_bit", "whole")
        return diagnose(quantized.rounded, inputs, quantized.ranges or None, four_bit=four_bit)
    source = load_source(name, subfolder)
    graph_module = normalized(source.model, source.example_inputs, MPQConfig())
    inputs = example_inputs(graph_module.meta["signature"], batch_size=1)
    return diagnose(graph_module, inputs)


def _summarise(
    source: Source, quantized: QuantizedModel, runner: Denoiser, backend: str, data: Trajectories
) -> dict[str, Any]:
    held_out = calibration_of(source, trajectories=4, steps=20, seed=EVALUATION_SEED)
    plan = quantized.plan
    one = next(iter(data))
    single = first_rows(one)
    timing = time_per_step({"float": source.model, backend: runner}, single)
    return {
        "backend": backend,
        "settings": quantized.settings.to_dict(),
        "mean_bits": plan.mean_bits,
        "effective_bits": plan.effective_bits,
        "num_weights": plan.num_weights,
        "weight_bytes": plan.weight_bytes,
        "float_remainder_bytes": plan.float_bytes,
        "float32_bytes": 4
        * (plan.num_weights + sum(t.numel for t in plan.floats if not t.is_weight)),
        "epsilon_sqnr_db": epsilon_sqnr(source.model, quantized, held_out),
        "backend_epsilon_sqnr_db": epsilon_sqnr(source.model, runner, held_out),
        "milliseconds_per_step": timing,
        "threads": torch.get_num_threads(),
        "seconds_to_quantize": quantized.report.seconds,
    }


def time_per_step(
    models: dict[str, Denoiser], inputs: dict[str, Any], *, rounds: int = 21
) -> dict[str, float]:
    """Median milliseconds of one call of each model, interleaved, after a warm-up call each.

    Args:
        models: Callables by name.
        inputs: Keyword arguments of the call.
        rounds: Timed calls of each.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for index in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(**inputs)
                if index:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _positional(graph_module: Callable[..., Any], quantized: QuantizedModel) -> Denoiser:
    """A lowered graph behind the model's keyword arguments."""

    def call(**kwargs: Any) -> Any:
        return graph_module(**quantized.signature.normalize((), kwargs))

    return call


def evaluate_folder(
    folder: Path, *, model: str | None = None, num: int = 256, steps: int = 20, seed: int
) -> dict[str, Any]:
    """Measure a saved model against the float model that it came from.

    Args:
        folder: Folder written by `quantize`.
        model: The float model, if it is no longer where it was.
        num: Samples of the free-running metrics.
        steps: Steps of the scheduler.
        seed: Seed of noise and held-out trajectories.

    Returns:
        Metrics by name; Frechet distance and accuracy only for the bundled model, whose
        classifier is bundled too.
    """
    source = source_of(folder, model)
    quantized = load(folder)
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
    held_out = calibration_of(source, trajectories=4, steps=steps, seed=seed)
    expected = draw(source, source.model, num=num, steps=steps, seed=seed + 1)
    found = draw(source, quantized, num=num, steps=steps, seed=seed + 1)
    return {
        "epsilon_sqnr": epsilon_sqnr(source.model, quantized, held_out),
        "x0_sqnr": x0_sqnr(expected, found),
        "num_samples": num,
        "num_inference_steps": steps,
        "seed": seed,
    }
