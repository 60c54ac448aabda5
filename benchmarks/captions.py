"""A text-conditioned UNet goes the same road with guidance: train, quantize, distil, lower.

    python benchmarks/captions.py --directory captions --output captions.json --resume

A `UNet2DConditionModel` and word embeddings (`caption_model.py`) are trained once, on pictures
drawn as they are needed, with every tenth caption dropped, and kept in `--directory`. Every cell is
then quantized on guided runs, trained for the same number of updates on the float model's guided
runs of its seed, and measured on held-out captions and paired noise. `--program` adds a row that
has an XNNPACK program before and after training, on the first seed. `--defaults` quantizes with the
package's default settings and dynamic activations of eight bits, without training; `--weights` the
weights alone, at fixed widths and entropy-coded.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from caption_model import (
    CAPTIONS,
    HELD_OUT,
    SIZE,
    TextEncoder,
    followed,
    load,
    scheduler,
    seen,
    spoken,
    states,
    train,
)
from diffusers import UNet2DConditionModel
from distill import RECIPES, training
from quality import Change, read, write_row
from safetensors.torch import load_file, save_file
from shifted_shortcuts import with_shifts
from torch import Tensor
from tqdm import tqdm

from mpqdm_fx import MPQConfig, RunOptions, convert, lower, prepare, save
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.calibration.sampling import Denoiser, denoise, first_tensor, guided
from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.distill.distillation import Distilled, distill
from mpqdm_fx.model.quantized import PreparedModel, QuantizedModel
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.report.images import save_grid
from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.report.sample_metrics import x0_median_sqnr
from mpqdm_fx.sources.denoisers import runner_denoiser

STEPS, GUIDANCE = 10, 3.0
SETTINGS = ("W2A6", "W2A4")
DEFAULTS = ("W4A8", "W3A8", "W2A8")
FEW_BITS = ("", "+levels", "+widths", "+inputs", "+shift", "+coded")
INPUTS = tuple(start + inputs for start in ("untrained", "ours") for inputs in FEW_BITS)
WEIGHTS = ("W2", "W3", "W4")
STORAGES = ("fixed", "entropy")
OURS = ("efficientdm", *INPUTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cells of one seed share.

    Attributes:
        unet: The float model.
        encoder: Its text encoder.
        seed: Seed of calibration and, moved far away, of evaluation.
        prepared: The model with its recorded calls.
        inputs: Held-out calls, unconditional rows first.
        images: The float model's samples of `words`, guided.
        words: Held-out captions.
    """

    unet: UNet2DConditionModel
    encoder: TextEncoder
    seed: int
    prepared: PreparedModel
    inputs: tuple[Mapping[str, Tensor], ...]
    images: Tensor
    words: Tensor

    @classmethod
    def of(cls, directory: Path, seed: int, samples: int, change: Change | None = None) -> "Bench":
        """Record the guided runs of a seed, and run the float model on held-out captions.

        Args:
            directory: Of the trained model.
            seed: Of calibration and, moved far away, of evaluation.
            samples: That are drawn, as often of each held-out caption.
            change: Makes of the model, and its calibration calls, one that computes the same.
        """
        unet, encoder = load(directory)
        calibration = Trajectories(
            unet, scheduler(), num_trajectories=16, num_inference_steps=STEPS, batch_size=32,
            seed=seed, held_out=4, guidance_scale=GUIDANCE, **states(encoder, seen(seed, 16)),
        )  # fmt: skip
        if change is not None:
            unet = change(unet, calibration)
        prepared = prepare(unet, MPQConfig(), next(iter(calibration)))
        for index, inputs in enumerate(calibration):
            held_out = index in calibration.held_out_calls
            with prepared.held_out() if held_out else contextlib.nullcontext():
                prepared.record(**inputs)
        words = CAPTIONS[HELD_OUT]
        # one batch a step in the order of the runs: both halves of guidance, as `guided` takes them
        runs = Trajectories(
            unet, scheduler(), num_trajectories=len(words), num_inference_steps=STEPS,
            batch_size=2 * len(words), seed=EVALUATION_SEED + 100 * seed, shuffle=False,
            guidance_scale=GUIDANCE, **states(encoder, words),
        )  # fmt: skip
        bench = cls(
            unet=unet, encoder=encoder, seed=seed, prepared=prepared, inputs=tuple(runs),
            images=runs.final_samples, words=words.repeat(samples // len(words), 1),
        )  # fmt: skip
        return dataclasses.replace(bench, images=bench.draw(unet))

    def draw(self, model: Denoiser) -> Tensor:
        """Guided samples of a model from the seed's noise."""
        seed = EVALUATION_SEED + 100 * self.seed + 1
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(self.words), 3, SIZE, SIZE, generator=generator)
        return denoise(
            model, scheduler(), noise, num_inference_steps=STEPS, seed=seed,
            guidance_scale=GUIDANCE, **states(self.encoder, self.words),
        )  # fmt: skip

    @torch.no_grad()
    def noise(self, model: Denoiser) -> Tensor:
        """Guided answers of a model to the held-out calls."""
        answers = (first_tensor(model(**inputs)) for inputs in self.inputs)
        return torch.cat([guided(answer, GUIDANCE) for answer in answers])

    def measured(self, quantized: QuantizedModel) -> tuple[dict[str, float], Tensor]:
        """The entries of a row that every cell has, and the samples."""
        images = self.draw(quantized)
        row = {
            "epsilon_sqnr": sqnr_db(self.noise(self.unet), self.noise(quantized)),
            "x0_sqnr": sqnr_db(self.images, images),
            "x0_median_sqnr": x0_median_sqnr(self.images, images),
            "followed": followed(images, self.words),
            "reference_followed": followed(self.images, self.words),
            "effective_bits": quantized.plan.effective_bits,
            "weight_bytes": quantized.plan.weight_bytes,
        }
        return row, images

    def trained(
        self, quantized: QuantizedModel, options: Mapping[str, Any], updates: int
    ) -> Distilled:
        """Distil on guided runs with captions of the seed."""
        config = training(
            {
                "trajectories": 32, "steps": STEPS, "batch_size": 16, "guidance_scale": GUIDANCE,
                **options,
            },
            self.seed,
            updates,
        )  # fmt: skip
        words = seen(10 + self.seed, config.trajectories)
        return distill(
            quantized, self.unet, config, scheduler=scheduler(), **states(self.encoder, words)
        )


def sensitivity_file(bench: Bench, arguments: argparse.Namespace) -> Path:
    """Sensitivities depend on the seed alone: they are measured once."""
    return Path(arguments.directory) / f"sensitivity {bench.seed}.safetensors"


def measure(bench: Bench, arguments: argparse.Namespace) -> None:
    """Quantize, train and measure every cell of one seed that is missing; write after each."""

    @functools.cache
    def bench_of(change: Change | None) -> Bench:
        if change is None:
            return bench
        return Bench.of(arguments.directory, bench.seed, arguments.samples, change)

    @functools.cache
    def start(change: Change | None, setting: str, options: str) -> QuantizedModel:
        bench = bench_of(change)
        weights, _, activations = setting[1:].partition("A")
        bench.prepared.settings = MPQConfig(
            weight_bits=int(weights), activation_bits=int(activations), seed=bench.seed,
            activation_mode="timestep", timestep_groups=5, row_weights="plain", judge=False,
            **json.loads(options),
        )  # fmt: skip
        table = sensitivity_file(bench, arguments) if change is None else None
        return convert(bench.prepared, run=RunOptions(sensitivity=table))

    cells = [(s, r) for s in arguments.settings for r in arguments.recipes]
    for setting, recipe in tqdm(cells, desc=f"seed {bench.seed}"):
        key = f"{setting} {recipe} {bench.seed}"
        if key in read(arguments.output):
            continue
        options, changes = RECIPES[recipe]
        change = with_shifts if recipe.endswith("+shift") else None
        quantized, row = start(change, setting, json.dumps(options)), {}
        clock = time.perf_counter()
        if changes is not None:
            result = bench_of(change).trained(quantized, changes, arguments.updates)
            quantized = result.quantized
            row = {"updates": arguments.updates, "before": result.before, "after": result.after}
        row["seconds"] = time.perf_counter() - clock
        measured, images = bench_of(change).measured(quantized)
        write_row(arguments.output, key, row | measured)
        pictures = {"float": bench.images[:16].contiguous(), "images": images[:16].contiguous()}
        save_file(pictures, arguments.directory / f"{key}.safetensors")


def measure_plain(bench: Bench, cells: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Cells of the default settings with some others, without training."""
    for name, options in cells.items():
        key = f"{name} {bench.seed}"
        if key in read(output):
            continue
        bench.prepared.settings = MPQConfig(
            weight_bits=int(name[1]), seed=bench.seed, **dict(options)
        )
        clock = time.process_time()
        quantized = convert(bench.prepared)
        row = {"seconds": time.process_time() - clock}
        write_row(output, key, row | bench.measured(quantized)[0])


def plain_cells(*, defaults: bool, weights: bool) -> dict[str, dict[str, Any]]:
    """Settings by name of the cells that are asked for."""
    cells: dict[str, dict[str, Any]] = {}
    if defaults:
        cells |= {f"{setting} default": {"activation_mode": "dynamic"} for setting in DEFAULTS}
    if weights:
        cells |= {
            f"{setting} {storage}": {"activation_mode": "float", "weight_storage": storage}
            for setting, storage in itertools.product(WEIGHTS, STORAGES)
        }
    return cells


def program(bench: Bench, arguments: argparse.Namespace) -> None:
    """Lower a model before and after training: the same size, and the graph's numbers."""
    key = f"W4A8 program {bench.seed}"
    if key in read(arguments.output):
        return
    bench.prepared.settings = MPQConfig(
        weight_bits=4, activation_bits=8, activation_mode="dynamic", seed=bench.seed
    )
    quantized = convert(
        bench.prepared, run=RunOptions(sensitivity=sensitivity_file(bench, arguments))
    )
    trained = bench.trained(quantized, {}, arguments.updates).quantized
    row: dict[str, Any] = {"updates": arguments.updates}
    for name, model in {"before": quantized, "after": trained}.items():
        lowered = lower(model, "xnnpack", output=arguments.directory / f"{name}.pte")
        answers = bench.noise(runner_denoiser(XnnpackRunner(lowered.path), model.signature))
        folder = save(model, arguments.directory / name)
        row[name] = bench.measured(model)[0] | {
            "program against graph": sqnr_db(bench.noise(model), answers),
            "program against float": sqnr_db(bench.noise(bench.unet), answers),
            "program bytes": lowered.bytes,
            "packed bytes": (folder / "model.safetensors").stat().st_size,
            "subgraphs": lowered.subgraphs,
            "undelegated": lowered.undelegated,
        }
    write_row(arguments.output, key, row)


def table(
    rows: Mapping[str, Any],
    seeds: list[int],
    settings: Sequence[str] = SETTINGS,
    recipes: Sequence[str] = OURS,
) -> str:
    """Markdown table: mean and spread (largest minus smallest) over the seeds."""
    heads = "setting | recipe | eps-SQNR dB | x0-SQNR dB | followed | bits | seconds | seeds"
    has_median = all("x0_median_sqnr" in row for row in rows.values())
    heads = f"{heads} | median x0 dB" if has_median else heads
    lines = [f"| {heads} |", "|---" * len(heads.split("|")) + "|"]
    for setting, recipe in itertools.product(settings, recipes):
        runs = [rows[k] for s in seeds if (k := f"{setting} {recipe} {s}") in rows]
        if not runs:
            continue
        cells = []
        for metric in ("epsilon_sqnr", "x0_sqnr", "followed"):
            values = [row[metric] for row in runs]
            cells.append(f"{statistics.mean(values):.2f} ± {max(values) - min(values):.2f}")
        bits = statistics.mean(row["effective_bits"] for row in runs)
        seconds = statistics.mean(row["seconds"] for row in runs)
        cells += [f"{bits:.3f}", f"{seconds:.0f}", str(len(runs))]
        if has_median:
            cells.append(f"{statistics.mean(row['x0_median_sqnr'] for row in runs):.2f}")
        lines.append(f"| {setting} | {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(directory: Path, setting: str, recipes: list[str], seed: int) -> None:
    """Write samples of the float model and of recipes below one another; print what they show."""
    files = [directory / f"{setting} {recipe} {seed}.safetensors" for recipe in recipes]
    there = [load_file(file) for file in files if file.exists()]
    if not there:
        return
    rows = [there[0]["float"], *[tensors["images"] for tensors in there]]
    path = save_grid(torch.cat(rows), directory / f"{setting} {seed}.png", len(rows[0]))
    shown = [recipe for recipe, file in zip(recipes, files, strict=True) if file.exists()]
    print(f"{path}: rows float, {', '.join(shown)}; columns", end=" ")
    print(", ".join(spoken(CAPTIONS[index]) for index in HELD_OUT[: len(rows[0])]))


def main() -> None:
    """Train, measure what is asked for, and print the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("captions"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--recipes", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--train-steps", type=int, default=1500)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--samples", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--program", action="store_true", help="also lower, on the first seed")
    parser.add_argument("--defaults", action="store_true", help="default settings, and no others")
    parser.add_argument("--weights", action="store_true", help="weights alone, and no others")
    parser.add_argument("--output", type=Path, default=Path("captions.json"))
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    if arguments.output.exists() and not arguments.resume:
        parser.error(f"{arguments.output} exists: give --resume, or another file")
    if not (arguments.directory / "unet").exists():
        train(arguments.directory, arguments.train_steps)
    plain = plain_cells(defaults=arguments.defaults, weights=arguments.weights)
    for seed in arguments.seeds:
        bench = Bench.of(arguments.directory, seed, arguments.samples)
        if plain:
            measure_plain(bench, plain, arguments.output)
            continue
        measure(bench, arguments)
        if arguments.program and seed == arguments.seeds[0]:
            program(bench, arguments)
        for setting in arguments.settings:
            picture(arguments.directory, setting, arguments.recipes, seed)
    rows = read(arguments.output)
    print(table(rows, arguments.seeds))
    print(table(rows, arguments.seeds, DEFAULTS, ("default",)))
    print(table(rows, arguments.seeds, WEIGHTS, STORAGES))
    for key in (key for key in rows if " program " in key):
        print(f"\n{key}: {json.dumps(rows[key], indent=1)}")


if __name__ == "__main__":
    main()
