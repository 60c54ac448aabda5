"""A quantized folder against its float model."""

from pathlib import Path
from typing import Any

from mpqdm_fx.denoisers import draw, source_of
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.jobs.calibration import held_out_of
from mpqdm_fx.models.bundled import load_digits_classifier
from mpqdm_fx.models.functions import calls_of
from mpqdm_fx.models.sources import Source
from mpqdm_fx.pipelines.components import as_recorded
from mpqdm_fx.quantized import QuantizedModel
from mpqdm_fx.report.metrics import (
    epsilon_sqnr,
    evaluate_denoiser,
    x0_sqnr,
)
from mpqdm_fx.report.noise_levels import sqnr_by_noise_level
from mpqdm_fx.storage import load
from mpqdm_fx.validation import Count, Seed, checked

__all__ = ["evaluate_folder"]


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
    source = as_recorded(source, folder, model=model)
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
