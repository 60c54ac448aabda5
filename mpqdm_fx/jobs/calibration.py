"""What a job calibrates on, and what it measures with: denoising runs, or the user's own calls."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.pipelines.components import in_pipeline
from mpqdm_fx.pipelines.prompts import read_prompts
from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.sources.functions import GivenCalls
from mpqdm_fx.sources.source import Source
from mpqdm_fx.sources.sources import load_with_calls

__all__ = [
    "BATCH",
    "HELD_OUT_RUNS",
    "calibration_of",
    "check_unseen",
    "held_out_of",
    "open_source",
    "rows_of",
    "warn_of",
]

logger = logging.getLogger(__name__)

BATCH = 16
"""Samples of a call; with guidance each has two rows."""
HELD_OUT_RUNS = 4
"""Runs that judge."""


def open_source(
    model: str,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    inputs: str | None = None,
    held_out: int | None = None,
    prompts: Path | None = None,
    guidance: float | None = None,
) -> Source:
    """Load what a job starts from, conditioned as the pipeline around it is.

    Args:
        model: As of `load_source`, like the next two.
        subfolder: Part of a pipeline folder.
        variant: Variant of the weight files.
        inputs: Calls, as of `load_with_calls`.
        held_out: Those of them that judge.
        prompts: File of prompts; None for the built-in ones.
        guidance: Guidance scale; None for the pipeline's own.

    Raises:
        ConfigError: There is no such model, or it takes no prompts and some were given.
    """
    return in_pipeline(
        load_with_calls(model, subfolder, variant, inputs, held_out),
        prompts=None if prompts is None else read_prompts(prompts),
        guidance=guidance,
    )


def calibration_of(
    source: Source, *, trajectories: int, steps: int, seed: int
) -> Trajectories | GivenCalls:
    """Inputs along the float model's own denoising runs, all timesteps mixed in every batch.

    A denoiser of a pipeline is conditioned on the pipeline's prompts, with both halves of guidance.
    Or the user's own calls, where there are some.

    Raises:
        ConfigError: There are none, and no scheduler for runs; or the seed is that of the runs that
            judge.
    """
    if source.calls is not None:
        return source.calls
    check_unseen(EVALUATION_SEED, [seed])
    warn_of(source)
    return _runs(source, trajectories=trajectories, steps=steps, seed=seed)


def held_out_of(
    source: Source, *, steps: int, seed: int
) -> Trajectories | Sequence[Mapping[str, Any]]:
    """Inputs that calibration does not see: further runs, or the user's held-out calls."""
    if source.calls is not None:
        return source.calls.held_out
    return _runs(source, trajectories=HELD_OUT_RUNS, steps=steps, seed=seed, unseen=True)


def check_unseen(judges: int, made: Iterable[int]) -> None:
    """Refuse seeds that would judge a model by the very runs that it was made on.

    Args:
        judges: Seed of an evaluation: of its held-out runs, and the next one of its samples.
        made: Seeds of the runs that the model was calibrated or trained on.

    Raises:
        ConfigError: They start from the same noise.
    """
    for seed in made:
        if seed in (judges, judges + 1):
            raise ConfigError(
                f"seed {seed} is that of the runs that the model is made on, and evaluations with "
                f"seed {judges} start from {judges} and {judges + 1}: they would judge by what "
                f"calibration saw; give another --seed"
            )


def rows_of(source: Source, trajectories: int, steps: int) -> int:
    """Rows of the largest call of `calibration_of`."""
    if source.calls is not None:
        return max(map(batch_size_of, source.calls))
    rows = (trajectories - trajectories // 4) * steps * (2 if source.is_guided else 1)
    return min(BATCH, rows)


def warn_of(source: Source) -> None:
    """Log what is to be known of a source's runs."""
    for remark in source.remarks:
        logger.warning("%s", remark)


def _runs(
    source: Source,
    *,
    trajectories: int,
    steps: int,
    seed: int,
    unseen: bool = False,
) -> Trajectories:
    if source.scheduler is None:
        raise ConfigError(
            f"{source.name} is made by a function, and it is not known how its runs go; give calls "
            f"with --inputs module:function"
        )
    return Trajectories(
        source.model,
        source.scheduler,
        num_trajectories=trajectories,
        num_inference_steps=steps,
        batch_size=BATCH,
        seed=seed,
        sample_shape=source.sample_shape,
        convention=source.convention,
        held_out=trajectories // 4,
        **source.runs(trajectories, seed, unseen=unseen),
    )
