"""The training loop: teacher-forced distillation within a budget of updates or of time."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, distributed, fx, nn
from torch.utils import _pytree as pytree

from mpqdm_fx.distill.checkpoint import (
    RESTART,
    History,
    State,
    check_tensors,
    load_state,
    optimiser_tensors,
    restore_optimiser,
    save_state,
    state_path,
)
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.importance import Effects, importance
from mpqdm_fx.distill.losses import Losses, Parts
from mpqdm_fx.distill.optimiser import make_optimiser, set_progress
from mpqdm_fx.distill.runs import Batch, Runs
from mpqdm_fx.distill.student import Student
from mpqdm_fx.errors import ArtifactError, CalibrationError, ConfigError
from mpqdm_fx.io.processes import processes
from mpqdm_fx.io.progress import stage

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 60.0
_WEIGH_EVERY = 50  # updates after which the second loss is weighted anew


class Trainer:
    """Trains a student on runs of the float model.

    Args:
        student: What is trained, in place.
        teacher: The normalized float graph.
        runs: The data.
        config: Settings.
        identity: What the run is, for checkpoints.
        directory: Folder for checkpoints, None for none.
        effects: What errors do at each step; None weighs steps without.
        on_policy: Draws runs of the student itself: called with a seed; None without them.

    Raises:
        ConfigError: The folder holds another run, or the batch is no multiple of the processes.
    """

    def __init__(
        self,
        student: Student,
        teacher: fx.GraphModule,
        runs: Runs,
        config: DistillConfig,
        *,
        identity: Mapping[str, Any],
        directory: Path | None = None,
        effects: Effects | None = None,
        on_policy: Callable[[int], Runs] | None = None,
    ) -> None:
        self.student, self.runs, self.config = student, runs, config
        self.identity, self.directory = dict(identity), directory
        self.generator = torch.Generator().manual_seed(config.seed)
        energy = float(runs.targets.square().mean())
        self.losses = Losses(student, teacher, config, energy, self.generator)
        self.importance = importance(config, runs.calls, effects)
        self._device = next(student.parameters()).device
        self.optimiser = make_optimiser(student, config)
        self.average = EMAModel(self._trained, decay=config.ema)
        self.history = History()
        self.weight = 0.0
        self._draw_own = on_policy
        self._own: Runs | None = None
        self._recent: list[float] = []
        self._world = processes()
        self._rank = distributed.get_rank() if self._world > 1 else 0
        if config.batch_size % self._world:
            raise ConfigError(
                f"batch_size={config.batch_size} cannot be shared out to {self._world} processes; "
                f"give a multiple of {self._world}"
            )
        self._restore()

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.student.trained()]

    @property
    def _moving(self) -> list[Tensor]:
        """What has a rate."""
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def run(self) -> History:
        """Train to the end of the budget; the student then has the averaged parameters.

        Raises:
            CalibrationError: The loss is no finite number.
        """
        started, before, saved = time.perf_counter(), self.history.seconds, time.perf_counter()
        training = stage("training" if self._rank == 0 else None, total=1.0, unit="budget")
        while (progress := self._progress()) < 1.0:
            set_progress(self.optimiser, progress)
            self._update()
            self.history.seconds = before + time.perf_counter() - started
            training(progress - training.done, note=self._note())
            if self.directory is not None and time.perf_counter() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.perf_counter()
        training(1.0 - training.done)
        training.close()
        self.save()
        self.average.copy_to(self._trained)
        return self.history

    def _progress(self) -> float:
        """Share of the budget that is used up, the same in all processes."""
        config = self.config
        shares = [0.0]
        if config.updates is not None:
            shares.append(self.history.updates / config.updates)
        if config.seconds is not None:
            shares.append(self.history.seconds / config.seconds)
        share = torch.tensor(max(shares), dtype=torch.float64, device=self._device)
        if self._world > 1 and config.seconds is not None:
            distributed.broadcast(share, src=0)
        return float(share)

    def _note(self) -> str:
        loss = sum(self._recent[-50:]) / max(1, len(self._recent[-50:]))
        quality = -10 * math.log10(loss) if loss > 0 else math.inf
        return f"update {self.history.updates}, {quality:.2f} dB"

    def _update(self) -> None:
        batch = self._batch()
        self.optimiser.zero_grad(set_to_none=True)
        with self.student.rounded_by(self._rounding_seed()):
            value = self._gradients(batch)
        self._share_gradients()
        if not math.isfinite(value):
            raise CalibrationError(
                f"the loss became {value} at update {self.history.updates}; lower the rates "
                f"(weight_rate={self.config.weight_rate}, range_rate={self.config.range_rate})"
            )
        self.optimiser.step()
        for activation in self.student.ranges.values():
            activation.hold()
        self.history.updates += 1
        self.average.step(self._trained)
        self._recent.append(value)
        if len(self._recent) >= 100:
            self.history.losses.append(sum(self._recent) / len(self._recent))
            self._recent.clear()

    def _gradients(self, batch: Batch) -> float:
        """Add a batch's gradients to the parameters; its task loss."""
        with torch.autocast(
            self._device.type, dtype=torch.bfloat16, enabled=self.config.mixed_precision
        ):
            parts = self.losses(batch)
        self._weigh(parts)
        loss = parts.task + self.config.smoothness * parts.roughness
        if parts.relation is not None:
            loss = loss + self.weight * parts.relation
        # nothing else: graphs share modules with the caller's models
        loss.backward(inputs=self._moving)  # type: ignore[no-untyped-call]
        return float(parts.task.detach())

    def _rounding_seed(self) -> int | None:
        """The same in all processes: they share the generator's state."""
        if self.config.rounding == "nearest":
            return None
        return int(torch.randint(2**62, (), generator=self.generator))

    def _batch(self) -> Batch:
        """Rows of this process: every n-th of the update's."""
        config = self.config
        runs = self.runs
        if self._draw_own is not None:
            if self._own is None or self.history.updates % config.refresh == 0:
                self._own = self._draw_own(config.seed + 1 + self.history.updates)
            if float(torch.rand((), generator=self.generator)) < config.on_policy:
                runs = self._own
        count = config.batch_size
        which = torch.randint(len(runs), (count,), generator=self.generator)
        calls = self.importance.calls(count, self.generator)
        mine = slice(self._rank, None, self._world)
        drawn = runs.batch(which[mine], calls[mine])
        weight = self.importance.weight[calls[mine]]
        return dataclasses.replace(drawn, weight=weight).to(self._device)

    def _weigh(self, parts: Parts) -> None:
        """Choose the second loss's weight so that its gradient has the wished share."""
        if parts.relation is None or self.history.updates % _WEIGH_EVERY:
            return
        trained = self._trained
        norms = []
        for part in (parts.task, parts.relation):
            grads = torch.autograd.grad(part, trained, retain_graph=True, allow_unused=True)
            norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None)))
        if self._world > 1:
            sums = torch.tensor(norms, dtype=torch.float64, device=self._device)
            distributed.all_reduce(sums)
            norms = sums.tolist()
        self.weight = self.config.relation_share * norms[0] / norms[1] if norms[1] > 0 else 0.0

    def _share_gradients(self) -> None:
        if self._world == 1:
            return
        trained = self._moving
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in trained if p.grad is not None]
        # in one message: there are hundreds of small ones
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(joined)
        parts = torch.split(joined / self._world, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it."""
        if self.directory is None or self._rank != 0:
            return
        tensors = {
            **{f"now.{name}": value for name, value in self.student.trained()},
            **{f"average.{index}": v for index, v in enumerate(self.average.shadow_params)},
            **optimiser_tensors(self.optimiser),
            **self.losses.state(),
            "generator": self.generator.get_state(),
        }
        if self._own is not None:
            tensors |= _own_tensors(self._own)
        save_state(
            self.directory,
            self.identity,
            tensors,
            history=dataclasses.asdict(self.history),
            weight=self.weight,
            recent=self._recent,
        )

    @torch.no_grad()
    def _restore(self) -> None:
        if self.directory is None:
            return
        state = load_state(self.directory, self.identity)
        if state is None:
            return
        self._check(state)
        tensors, numbers = state.tensors, state.numbers
        for name, value in self.student.trained():
            value.copy_(tensors[f"now.{name}"])
        for index, value in enumerate(self.average.shadow_params):
            value.copy_(tensors[f"average.{index}"])
        self.average.optimization_step = numbers.history.updates
        restore_optimiser(self.optimiser, tensors)
        self.losses.load(tensors, self._device)
        try:
            self.generator.set_state(tensors["generator"])
        except RuntimeError as error:
            raise ArtifactError(
                f"{state_path(self.directory)} is damaged: {error}; {RESTART}"
            ) from None
        self.history = dataclasses.replace(numbers.history, resumed=numbers.history.updates)
        self.weight, self._recent = numbers.weight, list(numbers.recent)
        if "own.targets" in tensors:
            drawn = _own_tensors(self.runs)
            leaves = iter([tensors[name] for name in drawn if name != "own.targets"])
            inputs = pytree.tree_map_only(Tensor, lambda _: next(leaves), dict(self.runs.inputs))
            self._own = dataclasses.replace(
                self.runs, inputs=inputs, targets=tensors["own.targets"]
            )
        logger.info("going on at update %d", self.history.updates)

    def _check(self, state: State) -> None:
        """Refuse a state that this run cannot have left."""
        assert self.directory is not None
        path, tensors = state_path(self.directory), state.tensors
        limit = self.config.updates
        if limit is not None and state.numbers.history.updates > limit:
            raise ArtifactError(
                f"{path} has {state.numbers.history.updates} updates of {limit}; {RESTART}"
            )
        expected: dict[str, Tensor] = {f"now.{name}": v for name, v in self.student.trained()}
        expected |= {f"average.{i}": value for i, value in enumerate(self.average.shadow_params)}
        expected["generator"] = self.generator.get_state()
        for group in self._optional(tensors):
            if any(name in tensors for name in group):
                expected |= group
        check_tensors(path, tensors, expected)

    def _optional(self, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Tensors that a state has together or not at all."""
        for index, moving in enumerate(self._moving):
            moments = {f"adam.{index}.{key}": moving for key in ("exp_avg", "exp_avg_sq")}
            yield {**moments, f"adam.{index}.step": torch.zeros(())}
        if self._draw_own is not None:
            drawn = slice(min(len(self.runs), self.config.batch_size))
            yield {name: value[drawn] for name, value in _own_tensors(self.runs).items()}
        if self.config.relation == "queue":
            memory = {name: rows for name, rows in tensors.items() if name.startswith("memory.")}
            for index in range(len(memory)):
                rows = memory.get(f"memory.{index}", torch.empty(0))
                fits = rows.dim() == 2 and len(rows) <= self.config.memory
                yield {f"memory.{index}": rows if fits else torch.empty(0)}


def _own_tensors(runs: Runs) -> dict[str, Tensor]:
    """The tensors of the student's own runs, by their names in a checkpoint."""
    leaves = [leaf for leaf in pytree.tree_leaves(dict(runs.inputs)) if isinstance(leaf, Tensor)]
    inputs = {f"own.inputs.{index}": leaf.contiguous() for index, leaf in enumerate(leaves)}
    return {**inputs, "own.targets": runs.targets}
