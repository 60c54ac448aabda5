"""How far a quantized model is from the float one at each noise level."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.calibration.calls import check_calls
from mpqdm_fx.calibration.samplers import Denoiser, first_tensor
from mpqdm_fx.capture.entry import in_float32
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.noise_names import NOISE_NAMES, TIMESTEP_NAMES
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.numerics.metrics import float64_parts, ratio_db
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.validation import Count, checked

__all__ = ["noise_argument_of", "row_powers", "sqnr_by_noise_level", "told_levels"]


@plain_torch()
@checked
@torch.no_grad()
def sqnr_by_noise_level(
    reference: Denoiser,
    quantized: Denoiser,
    inputs: Iterable[Mapping[str, Any]],
    *,
    noise_argument: str | None = None,
    most: Count = 8,
) -> dict[float, float]:
    """Compare two denoisers' outputs on the same inputs, apart for each noise level.

    Args:
        reference: The float model, called with each batch as keywords.
        quantized: The other model, called the same way.
        inputs: Batches of keyword arguments, for instance held-out `Trajectories`.
        noise_argument: The argument that tells noise levels; None finds it by its name.
        most: With more distinct noise levels, they are put together in so many groups of about
            equally many samples; each is called by the mean of its levels.

    Returns:
        Decibels by noise level (what the model is told), largest level first.

    Raises:
        ConfigError: No argument tells noise levels, or outputs cannot be told apart by sample.
        CalibrationError: There is no batch, or one cannot be used.
    """
    batches = list(inputs)
    check_calls(batches, "batch")
    if not batches:
        raise CalibrationError("sqnr_by_noise_level got no batch of inputs; give at least one")
    name = _argument(batches[0], noise_argument)
    model = in_float32(reference)
    # sums of rows: calls may have other shapes than their neighbours
    powers = torch.cat(
        [
            row_powers(
                first_tensor(model(**batch)), first_tensor(quantized(**batch)), batch_size_of(batch)
            )
            for batch in batches
        ]
    )
    row_levels = told_levels(batches, name)
    if len(row_levels) != len(powers):
        raise ConfigError(
            f"{name} tells {len(row_levels)} noise levels, and outputs are of {len(powers)} "
            f"samples: they cannot be told apart by noise level"
        )
    levels = NoiseLevels.of(row_levels, min(most, len(set(row_levels.tolist()))))
    groups = levels.group_of(row_levels)
    ratios = {}
    for group in reversed(range(levels.count)):
        rows = groups == group
        ratios[float(row_levels[rows].mean())] = ratio_db(*powers[rows].sum(dim=0).tolist())
    return ratios


def row_powers(expected: Tensor, actual: Tensor, batch: int) -> Tensor:
    """Energy of an output and of another one's difference from it, by sample.

    Args:
        expected: The float model's, any shape; a multiple of the batch in front, if it can be told
            apart by sample.
        actual: The other one's, same shape.
        batch: Samples in the call.

    Returns:
        float64 [batch, 2], or [1, 2] where samples cannot be told apart.

    Raises:
        ConfigError: The shapes differ.
    """
    if expected.shape != actual.shape:
        raise ConfigError(
            f"the float model's output has shape {tuple(expected.shape)}, the other one's "
            f"{tuple(actual.shape)}: they are not of one model"
        )
    exact = float64_parts(expected.cpu())
    squares = torch.stack([exact, exact - float64_parts(actual.cpu())]).square()
    rows = batch if expected.ndim and len(expected) and len(expected) % batch == 0 else 1
    return squares.reshape(2, rows, -1).sum(dim=2).T


def noise_argument_of(batch: Mapping[str, Any]) -> str | None:
    """The argument of a call that tells its noise levels, by its name; None if none does."""
    for names in (TIMESTEP_NAMES, NOISE_NAMES):
        for name in batch:
            if name in names:
                return name
    return None


def told_levels(batches: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """The noise level of every sample, as the model is told it.

    Args:
        batches: Keyword arguments of each call.
        name: The argument that tells it.

    Returns:
        float64 [N], N samples of all calls.
    """
    return torch.cat([_noise_levels(batch[name], batch_size_of(batch)) for batch in batches])


def _argument(batch: Mapping[str, Any], name: str | None) -> str:
    if name is not None and name in batch:
        return name
    known = None if name is not None else noise_argument_of(batch)
    if known is None:
        raise ConfigError(
            f"{'no argument' if name is None else f'no argument {name!r}'} tells the noise level; "
            f"name one of ({', '.join(batch)}) with noise_argument="
        )
    return known


def _noise_levels(value: Any, batch: int) -> Tensor:
    # of float32 the decimal that was meant: 0.3, not 0.30000001
    levels = torch.as_tensor(value).detach().flatten().cpu()
    exact = torch.tensor([float(f"{level:.7g}") for level in levels.tolist()], dtype=torch.float64)
    return exact.expand(batch) if len(exact) == 1 else exact
