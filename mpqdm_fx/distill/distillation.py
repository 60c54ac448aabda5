"""`distill`: train a quantized model against the float model it came from."""

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.calibration.samplers import check_scheduled, is_sampler, model_convention
from mpqdm_fx.calibration.sampling import check_loop
from mpqdm_fx.calibration.trajectories import Conditions, make_conditions, sample_shape_of
from mpqdm_fx.capture.entry import unwrap
from mpqdm_fx.distill.called import Called
from mpqdm_fx.distill.checkpoint import History
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.importance import Effects, measure_effects
from mpqdm_fx.distill.judge import Errors, Judge
from mpqdm_fx.distill.runs import Recorder, Runs, Start
from mpqdm_fx.distill.student import Student, freeze, make_student
from mpqdm_fx.distill.train import Trainer
from mpqdm_fx.errors import ConfigError, DialectError
from mpqdm_fx.graph.calling import example_call
from mpqdm_fx.graph.describe import describe, first_difference
from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.tensors import hash_tensor
from mpqdm_fx.io.versions import versions
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.stages import in_form_of
from mpqdm_fx.records.validation import Count, checked

__all__ = ["Distilled", "distill"]

logger = logging.getLogger(__name__)

_HELD_OUT = 0x9E3779B97F  # what the seeds of training and of judging runs differ by


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilled:
    """What training gave.

    Attributes:
        quantized: The trained model; plan and sizes are those that it started with.
        history: Updates, seconds and losses.
        before: Squared error of the noise as a share of its energy at the start, on runs that the
            training has not seen; `after` at the end of the training.
        after: See `before`.
        improved: Whether the error on those runs, weighed by step like the loss, is less than
            before. If it is not, `quantized` is what training started from (`keep_better`).
    """

    quantized: QuantizedModel
    history: History
    before: float
    after: float
    improved: bool


@plain_torch()
@checked
def distill(
    quantized: QuantizedModel,
    teacher: nn.Module,
    config: DistillConfig,
    *,
    scheduler: Any,
    sample_shape: tuple[Count, ...] | None = None,
    conditions: Conditions | None = None,
    unconditional: Conditions | None = None,
    convention: CallingConvention | None = None,
    directory: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Distilled:
    """Train scales, levels, ranges, biases and merged low-rank factors of a quantized model.

    Data-free (EfficientDM, arXiv 2310.03270): the float model's own runs are the data, its answers
    the targets. The graph does not change and every code stays legal: what is measured during
    training is what is stored. The result converts and lowers like what it started from.

    Args:
        quantized: The model to start from; it is not changed.
        teacher: The float model that it was quantized from.
        config: Settings.
        scheduler: A diffusers scheduler, the one of deployment; it is copied. Or a `Sampler`, whose
            every call is an example (`config.steps` is not used).
        sample_shape: Shape of one sample without the batch; None reads the model's config.
        conditions: Further arguments of the model, as `Trajectories` takes them.
        unconditional: Those of the unconditional half of guidance, with a scheduler.
        convention: How the loop of a scheduler calls the model; None takes that of its class.
        directory: Folder for checkpoints, from which the same call goes on to the same bits (with
            a budget of updates; one of time depends on the clock). None keeps none.
        device: Where to train, for example `"cuda"`; the result lies on the CPU.

    Returns:
        The trained model and what training did; the model itself if that did not help it.

    Raises:
        ConfigError: `teacher` has not the graph of the model that was quantized, the folder holds
            another run, features are named that the model does not have, or the batch of its graph
            is fixed to another one; or a sampler is given guidance.
        CalibrationError: A run or the loss leaves the finite numbers, or conditions do not fit.
    """
    start = _start(config, sample_shape or sample_shape_of(teacher), conditions, unconditional)
    _check_batch(quantized.signature, config)
    teacher = unwrap(teacher)
    graph = _float_graph(quantized, teacher)
    sampled = is_sampler(scheduler)
    check_loop(scheduler, None if sampled else config.steps, config.guidance_scale)
    convention = convention or model_convention(teacher)
    if not sampled:
        check_scheduled(teacher, convention)
    fingerprint = graph_fingerprint(graph)
    student = _moved(make_student(quantized, graph, config), device)
    graph = _moved(graph, device)
    right = Called(graph, quantized.signature)
    model = Called(student.graph_module, quantized.signature)
    recorder = Recorder(
        teacher=right,
        scheduler=scheduler,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        convention=convention,
        device=device,
    )
    runs = recorder.record(right, start, progress="float model's runs")
    held_out = _held_out(recorder, config, runs)
    judge = Judge(model=model, recorder=recorder)
    before = judge.errors(held_out)
    if before.share > 1:
        logger.warning(
            "the quantized model's error is %.2f of what it predicts: is this the float model that "
            "it was quantized from, and its scheduler?",
            before.share,
        )
    trainer = Trainer(
        student,
        graph,
        runs,
        config,
        identity=_identity(quantized, fingerprint, config, recorder, runs),
        directory=None if directory is None else Path(directory),
        effects=_effects(model, recorder, config, runs) if config.final_share else None,
        on_policy=_own_runs(model, recorder, runs) if config.on_policy else None,
    )
    trainer.run()
    after = (
        judge.correct_mean(student, runs, held_out)
        if config.correct_mean
        else judge.errors(held_out)
    )
    student.cpu()
    return _distilled(student, quantized, trainer, before, after)


def _distilled(
    student: Student, quantized: QuantizedModel, trainer: Trainer, before: Errors, after: Errors
) -> Distilled:
    weighed = trainer.importance.weighed
    improved = weighed(after.steps) < weighed(before.steps)
    if not improved:
        logger.warning(
            "training did not lower the error on runs that it has not seen (squared error of the "
            "noise %.3g of its energy before, %.3g after; steps weighed by what they move: %+.0f "
            "%%)%s; lower rates or more trajectories may help",
            before.share,
            after.share,
            100 * (weighed(after.steps) / max(weighed(before.steps), 1e-30) - 1),
            ": the model stays what it was" if trainer.config.keep_better else "",
        )
    keep = improved or not trainer.config.keep_better
    return Distilled(
        quantized=freeze(student, quantized) if keep else quantized,
        history=trainer.history,
        before=before.share,
        after=after.share,
        improved=improved,
    )


def _float_graph(quantized: QuantizedModel, teacher: nn.Module) -> fx.GraphModule:
    """The float model's graph in the form that was quantized; refuses another model's."""
    difference: object
    try:
        graph = in_form_of(quantized, teacher, example_call(quantized.signature))
        difference = first_difference(describe(graph), describe(quantized.rounded))
    except DialectError as error:  # it lacks a layer whose input is scaled
        difference = error
    if difference is not None:
        raise ConfigError(f"the float model is not the one that was quantized: {difference}")
    return graph


def _check_batch(signature: Signature, config: DistillConfig) -> None:
    """Refuse rows that a graph of one fixed batch would refuse in the middle of the work."""
    halves = 2 if config.guided else 1
    few = (min(config.trajectories, n) for n in (config.effect_runs, config.held_out))
    counts = (config.trajectories, *few)
    fits = config.batch_size * halves == signature.batch
    fits = fits and not any(count % config.batch_size for count in counts)
    if not signature.dynamic_batch and not fits:
        remedy = (
            f"give batch_size={signature.batch // halves}, and trajectories, effect_runs and "
            f"held_out that are multiples of it"
        )
        if signature.batch % halves:
            remedy = "which are no two halves: train without guidance"
        raise ConfigError(
            f"{signature.model_class} was traced for {signature.batch} rows a call alone "
            f"({signature.note or 'its batch is fixed'}); {remedy}"
        )


_Module = TypeVar("_Module", bound=nn.Module)


def _moved(module: _Module, device: torch.device | str) -> _Module:
    """On a device: a copy, since graphs share modules with the models that they were made of."""
    if torch.device(device).type == "cpu":
        return module
    moved = copy.deepcopy(module).to(device)
    for graph_module in [m for m in moved.modules() if isinstance(m, fx.GraphModule)]:
        for node in graph_module.graph.nodes:
            if "device" in node.kwargs:  # a constant that was traced on the CPU
                node.update_kwarg("device", torch.device(device))
        graph_module.recompile()
    return moved


def _start(
    config: DistillConfig,
    shape: tuple[int, ...],
    conditions: Conditions | None,
    unconditional: Conditions | None,
) -> Start:
    generator = torch.Generator().manual_seed(config.seed)
    count = config.trajectories
    return Start(
        noise=torch.randn(count, *shape, generator=generator),
        conditions=make_conditions(conditions, count, generator),
        unconditional=make_conditions(unconditional, count, generator) if config.guided else None,
        seed=config.seed,
    )


def _held_out(recorder: Recorder, config: DistillConfig, runs: Runs) -> Runs:
    """Runs of the float model from other noise, with the first runs' conditions."""
    first = runs.start.rows(torch.arange(min(len(runs), config.held_out)))
    seed = config.seed + _HELD_OUT
    noise = torch.randn(first.noise.shape, generator=torch.Generator().manual_seed(seed))
    return recorder.record(recorder.teacher, dataclasses.replace(first, noise=noise, seed=seed))


def _effects(model: Called, recorder: Recorder, config: DistillConfig, runs: Runs) -> Effects:
    some = torch.arange(min(len(runs), config.effect_runs))
    return measure_effects(model, recorder, runs.start.rows(some))


def _own_runs(model: Called, recorder: Recorder, runs: Runs) -> Callable[[int], Runs]:
    """A function of a seed that draws runs of the student with the first runs' conditions."""
    first = runs.start.rows(torch.arange(min(len(runs), recorder.batch_size)))

    def draw(seed: int) -> Runs:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(first.noise.shape, generator=generator)
        return recorder.record(model, dataclasses.replace(first, noise=noise, seed=seed))

    return draw


def _identity(
    quantized: QuantizedModel,
    float_model: str,
    config: DistillConfig,
    recorder: Recorder,
    runs: Runs,
) -> Mapping[str, Any]:
    settings = config.to_dict()
    # a run may be given more time, and go on
    del settings["seconds"]
    digest, start, loop = hashlib.sha256(), runs.start, recorder.scheduler
    values: Any = (start.noise, start.conditions, start.unconditional)
    if is_sampler(loop):  # its settings are its own affair, but they show in what it does
        schedule: dict[str, Any] = {"sampler": f"{type(loop).__module__}.{type(loop).__qualname__}"}
        values = (values, dict(runs.inputs))
    else:
        # the convention turns the scheduler's steps into what the model is told
        called = dataclasses.asdict(recorder.convention)
        schedule = {**json.loads(loop.to_json_string()), "convention": called}
    for value in pytree.tree_leaves(values):
        if isinstance(value, Tensor):
            hash_tensor(digest, value)
        else:
            digest.update(repr(value).encode())
    return {
        **settings,
        "float model": float_model,
        "quantized model": graph_fingerprint(quantized.graph_module),
        "activation bits": quantized.settings.activation_bits,
        "scheduler": schedule,
        "noise and conditions": digest.hexdigest(),
        "versions": versions(),
    }
