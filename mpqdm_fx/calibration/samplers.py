"""Sampling loops of one's own: what stands in a diffusers scheduler's place.

A diffusers scheduler fixes the loop: one call of the model at each timestep, and a step. Karras et
al. (2022) step over sigmas with a second call to correct (Heun), consistency models (Song et al.
2023) add noise again between calls or call once, solvers call as often as they like. A `Sampler` is
that loop as an object with one method, and goes wherever a scheduler goes: into `denoise`,
`Trajectories`, the evaluation and `distill`.

    class Euler:
        def sample(self, model, noise, conditions, generator):
            sigmas = [80.0, 20.0, 5.0, 1.0, 0.3, 0.0]
            x = noise * sigmas[0]
            for now, then in itertools.pairwise(sigmas):
                clean = model(noisy=x, sigma=torch.full((len(x),), now), **conditions)
                x = x + (then - now) * (x - clean) / now
            return x
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpqdm_fx.calibration.conventions import CallingConvention, convention_of
from mpqdm_fx.capture.entry import unwrap
from mpqdm_fx.errors import CalibrationError, ConfigError, MPQError, first_line
from mpqdm_fx.graph.nested import named_leaves

__all__ = [
    "Denoiser",
    "Sampler",
    "called",
    "check_scheduled",
    "first_tensor",
    "is_sampler",
    "model_convention",
    "rows_of",
    "run_sampler",
]

Denoiser = Callable[..., Any]
"""Called as `model(sample=..., timestep=..., **conditions)`, by its own names for these, or as its
sampler calls it."""


class Sampler(Protocol):
    """A sampling loop: turns noise into samples with as many calls of the model as it likes.

    It is run with the float model to record what the model is given, with the quantized model to
    compare what comes out, and with models in training. So it keeps nothing between runs, and
    draws from `generator` alone: then the same noise and seed give the same run.
    """

    def sample(
        self,
        model: Callable[..., Tensor],
        noise: Tensor,
        conditions: Mapping[str, Any],
        generator: torch.Generator,
    ) -> Tensor:
        """Run the loop for a batch.

        Args:
            model: Called with keyword arguments, as the float model's `forward` names them. Every
                tensor has the batch in front, a noise level too: `sigma.expand(len(noise))`. A loop
                that joins halves for guidance calls with twice (k times) the batch. Returns the
                (first) tensor of the model's output.
            noise: Standard normal, float32 [N, ...]. The loop scales it to its first noise level.
            conditions: Further arguments of the model, tensors with N in front; the loop hands them
                on, all or those that it wants.
            generator: For noise that is added on the way, seeded for this batch, on the device of
                `noise`.

        Returns:
            The samples, float [N, ...].
        """
        ...


def is_sampler(loop: object) -> TypeGuard[Sampler]:
    """Whether an object is a `Sampler`, and no scheduler of diffusers."""
    return callable(getattr(loop, "sample", None)) and not hasattr(loop, "set_timesteps")


def model_convention(model: Any) -> CallingConvention:
    """How a model is called along a schedule, by its class and config.

    Args:
        model: A module, or what was made of one; of another callable nothing is known, and it is
            called as UNets are.
    """
    inner = unwrap(model) if isinstance(model, nn.Module) else model
    traced = getattr(getattr(inner, "signature", None), "model_class", None)
    config = getattr(inner, "config", None)
    return convention_of(
        traced if isinstance(traced, str) else type(inner).__name__,
        config if isinstance(config, Mapping) else {},
    )


def check_scheduled(model: Any, convention: CallingConvention) -> None:
    """Refuse a module that a scheduler's loop cannot call.

    Args:
        model: What is to be called; of what is no module nothing is known.
        convention: What it is called with.

    Raises:
        ConfigError: It does not take these arguments.
    """
    if not isinstance(model, nn.Module):
        return
    inner = unwrap(model)
    parameters = inspect.signature(inner.forward).parameters
    whatever = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if not whatever and not {convention.sample, convention.timestep} <= set(parameters):
        raise ConfigError(
            f"{type(inner).__name__} takes ({', '.join(parameters)}), and the loop of a scheduler "
            f"calls it with {convention.sample} and {convention.timestep}; say how it is called "
            f"with convention=CallingConvention(sample=..., timestep=...) of "
            f"mpqdm_fx.calibration.conventions, or give a Sampler in the scheduler's place (see "
            f"mpqdm_fx.calibration.samplers)"
        )


def run_sampler(
    sampler: Sampler,
    model: Denoiser,
    noise: Tensor,
    conditions: Mapping[str, Any],
    generator: torch.Generator,
) -> Tensor:
    """Run a sampler once, without gradients.

    Args:
        sampler: The loop.
        model: Called with keyword arguments.
        noise: Standard normal, float [N, ...].
        conditions: Further arguments of the model.
        generator: For noise that is added on the way.

    Returns:
        The samples [N, ...].

    Raises:
        CalibrationError: The loop names no arguments, never calls the model, or returns no tensor
            with a sample for each row of `noise`; or the model refuses what it is called with.
    """
    name, count = type(sampler).__name__, 0

    def named(*args: Any, **inputs: Any) -> Tensor:
        nonlocal count
        if args:
            raise CalibrationError(
                f"{name} calls the model with positional arguments; name them as the model's "
                f"forward does, for example model(noisy=x, sigma=sigma)"
            )
        count += 1
        return first_tensor(called(model, inputs))

    with torch.no_grad():
        samples = sampler.sample(named, noise, dict(conditions), generator)
    if not count:
        raise CalibrationError(f"{name} returned without a call of the model")
    if not isinstance(samples, Tensor) or samples.shape[:1] != noise.shape[:1]:
        shape = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise CalibrationError(
            f"{name} returned {shape} for noise of shape {tuple(noise.shape)}; return a tensor "
            f"with a sample for each row of the noise"
        )
    return samples


def rows_of(inputs: Mapping[str, Any], runs: int, sampler: Sampler) -> int:
    """Rows of a sampler's call: how often the runs stand behind each other in it.

    Args:
        inputs: Keyword arguments of the call.
        runs: Runs that are made at once.
        sampler: For the message.

    Raises:
        CalibrationError: A tensor has no rows, or not as many as the others, or the rows are no
            multiple of the runs; names the argument.
    """
    rows = 0
    for name, leaf in named_leaves(inputs):
        if not isinstance(leaf, Tensor):
            continue
        length = len(leaf) if leaf.ndim else 0
        rows = rows or length
        if not length or length != rows or rows % runs:
            raise CalibrationError(
                f"{type(sampler).__name__} calls the model with {name} of shape "
                f"{tuple(leaf.shape)} in a batch of {runs} runs; give every tensor the batch (or "
                f"twice it, or more) in front, for example {name}.expand({runs})"
            )
    if not rows:
        raise CalibrationError(f"{type(sampler).__name__} calls the model without a tensor")
    return rows


def called(model: Denoiser, inputs: Mapping[str, Any]) -> Any:
    """The model's output; its own complaints about the inputs say which these were.

    Raises:
        CalibrationError: The model cannot be called so.
    """
    try:
        return model(**inputs)
    except (MPQError, torch.OutOfMemoryError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        shapes = pytree.tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), dict(inputs))
        raise CalibrationError(
            f"the model cannot be called with inputs of the shapes {shapes}: "
            f"{type(error).__name__}: {first_line(error)}; check that the conditions belong to it"
        ) from error


def first_tensor(output: Any) -> Tensor:
    """Return the tensor in a model's output: itself, `.sample` of an output object, or entry 0.

    Raises:
        CalibrationError: there is no tensor to be found.
    """
    tensor = getattr(output, "sample", None) if not isinstance(output, Tensor) else output
    if tensor is None and isinstance(output, (tuple, list)) and output:
        tensor = output[0]
    if not isinstance(tensor, Tensor):
        raise CalibrationError(
            f"the model returned {type(output).__name__}; expected a tensor, a tuple that starts "
            "with one, or an output with .sample"
        )
    return tensor
