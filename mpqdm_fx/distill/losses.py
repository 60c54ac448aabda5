"""The losses of one update."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.calibration.samplers import first_tensor
from mpqdm_fx.calibration.sampling import guided
from mpqdm_fx.distill.called import Called
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.features import feature_nodes, with_features
from mpqdm_fx.distill.recompute import Recomputed
from mpqdm_fx.distill.runs import Batch
from mpqdm_fx.distill.student import Student
from mpqdm_fx.io.processes import gathered, processes
from mpqdm_fx.numerics.solve.relation import feature_distance, pixels, relation_divergence

__all__ = ["Losses", "Parts"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Losses of one batch, each a number with a gradient.

    Attributes:
        task: Squared error of the (guided) noise as a share of the targets' mean energy, each row
            by its weight.
        relation: The second loss, not yet weighted; None without one.
        roughness: How unevenly neighbouring ranges moved.
    """

    task: Tensor
    relation: Tensor | None
    roughness: Tensor


class Losses:
    """Computes the losses of batches.

    Args:
        student: What is trained.
        teacher: The normalized float graph, with its signature in `meta`.
        config: Which losses.
        energy: Mean square of the targets, what the task's error is a share of.
        generator: Draws the pixels that relations use; its state is part of a run's.

    Attributes:
        memory: Teacher pixels of each compared feature [M, C], newest first, for
            `relation="queue"`.
    """

    def __init__(
        self,
        student: Student,
        teacher: fx.GraphModule,
        config: DistillConfig,
        energy: float,
        generator: torch.Generator,
    ) -> None:
        self.config = config
        self.student = student
        self._energy = max(energy, torch.finfo(torch.float32).tiny)
        self._generator = generator
        self.memory: list[Tensor] = []
        signature = teacher.meta["signature"]
        graph = student.graph_module
        if config.relation != "none":
            graph = with_features(graph, feature_nodes(graph, config.features))
            teacher = with_features(teacher, feature_nodes(teacher, config.features))
        trained: nn.Module = Recomputed(graph, config.recompute) if config.recompute else graph
        self._student, self._teacher = Called(trained, signature), Called(teacher, signature)

    def __call__(self, batch: Batch) -> Parts:
        """Losses of a batch."""
        roughness = torch.stack([r.roughness() for r in self.student.ranges.values()] or [_zero()])
        if self.config.relation == "none":
            task = self._task(self._student(**batch.inputs), batch)
            return Parts(task=task, relation=None, roughness=roughness.sum())
        output, features = self._student(**batch.inputs)
        with torch.no_grad():
            _, targets = self._teacher(**batch.inputs)
        task = self._task(output, batch)
        relation = self._relation(batch, features, targets)
        return Parts(task=task, relation=relation, roughness=roughness.sum())

    def _task(self, output: Any, batch: Batch) -> Tensor:
        answer = guided(first_tensor(output), self.config.guidance_scale)
        answer = answer[:, : batch.target.shape[1]]
        rows = (answer - batch.target).square().flatten(1).mean(1)
        if batch.weight is not None:
            rows = rows * batch.weight
        return rows.mean() / self._energy

    def _relation(
        self, batch: Batch, features: tuple[Tensor, ...], targets: tuple[Tensor, ...]
    ) -> Tensor:
        kind = self.config.relation
        if kind == "feature":
            return torch.stack(
                [feature_distance(s, w) for s, w in zip(features, targets, strict=True)]
            ).mean()
        if kind == "trd":
            # the gradient belongs to the current step; the one before is context
            with torch.no_grad():
                _, features_before = self._student(**batch.previous)
                _, targets_before = self._teacher(**batch.previous)
            features = tuple((s + b) / 2 for s, b in zip(features, features_before, strict=True))
            targets = tuple((w + b) / 2 for w, b in zip(targets, targets_before, strict=True))
        losses = [
            self._divergence(*pair) for pair in enumerate(zip(features, targets, strict=True))
        ]
        return torch.stack(losses).mean()

    def _divergence(self, place: int, pair: tuple[Tensor, Tensor]) -> Tensor:
        places = pair[0].flatten(2).shape[2] if pair[0].ndim == 4 else pair[0].shape[1]
        index = torch.randperm(places, generator=self._generator)[: self.config.pixels]
        student, teacher = (pixels(feature, index) for feature in pair)
        memory = None
        if self.config.relation == "queue":
            memory = self._remember(place, teacher)
        with torch.autocast(student.device.type, enabled=False):  # cosines need all their digits
            return relation_divergence(student, teacher, self.config.temperature, memory)

    def _remember(self, place: int, teacher: Tensor) -> Tensor:
        """Add the batch's teacher pixels to the queue and return it."""
        rows = teacher.flatten(0, 1)
        # a quarter at a time, so that the queue spans several batches and noise levels
        share = max(1, self.config.memory // (4 * processes()))
        some = torch.randperm(len(rows), generator=self._generator)[:share]
        while len(self.memory) <= place:
            self.memory.append(rows[:0])
        joined = torch.cat([gathered(rows[some]), self.memory[place]])[: self.config.memory]
        self.memory[place] = joined.detach()
        return self.memory[place]

    def state(self) -> Mapping[str, Tensor]:
        """Tensors of the queue, to save."""
        return {f"memory.{index}": rows for index, rows in enumerate(self.memory)}

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take a saved queue back, onto a device."""
        count = sum(key.startswith("memory.") for key in tensors)
        self.memory = [tensors[f"memory.{index}"].to(device) for index in range(count)]


def _zero() -> Tensor:
    return torch.zeros(())
