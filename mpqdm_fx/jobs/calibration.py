"""What a job calibrates on, and what it measures with: denoising runs, or the user's own calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.models.functions import GivenCalls
from mpqdm_fx.models.sources import Source

__all__ = ["calibration_of", "held_out_of"]


def calibration_of(
    source: Source, *, trajectories: int, steps: int, seed: int, batch_size: int = 16
) -> Trajectories | GivenCalls:
    """Inputs along the float model's own denoising runs, all timesteps mixed in every batch.

    Or the user's own calls, where there are some.

    Raises:
        ConfigError: There are none, and no scheduler for runs.
    """
    if source.calls is not None:
        return source.calls
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
        batch_size=batch_size,
        seed=seed,
        sample_shape=source.sample_shape,
        conditions=source.conditions(trajectories, seed),
        held_out=trajectories // 4,
    )


def held_out_of(
    source: Source, *, steps: int, seed: int
) -> Trajectories | Sequence[Mapping[str, Any]]:
    """Inputs that calibration does not see: further runs, or the user's held-out calls."""
    if source.calls is not None:
        return source.calls.held_out
    return calibration_of(source, trajectories=4, steps=steps, seed=seed)  # type: ignore[return-value]
