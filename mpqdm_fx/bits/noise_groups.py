"""Which group of noise levels each calibration sample is in: what statistics are parted by.

A layer may read numbers a thousand times larger at one noise level than at another, and an error
may matter a million times less to the output there. So a layer's statistics weigh each group of
noise levels by what its errors do to the output, and calls are held out group by group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx

from mpqdm_fx.graph.noise_argument import find_noise_argument, noise_levels_of
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.config import MPQConfig

__all__ = ["NoiseGroups"]

_MOST = 8
"""Most groups: each needs samples enough to measure what its errors do."""


@dataclass(frozen=True, kw_only=True)
class NoiseGroups:
    """Groups of noise levels of calibration calls.

    Attributes:
        levels: What parts them; its `argument` is the model's argument that tells the level, None
            if the model is told none: then there is one group.
    """

    levels: NoiseLevels

    @classmethod
    def one(cls) -> Self:
        """All samples in one group."""
        return cls(levels=NoiseLevels(boundaries=()))

    @classmethod
    def of(
        cls, graph_module: fx.GraphModule, calls: Sequence[Mapping[str, Any]], settings: MPQConfig
    ) -> Self:
        """Part the noise levels of calls into at most 8 groups of about equally many samples.

        Args:
            graph_module: A traced graph.
            calls: Inputs of the graph, by placeholder.
            settings: Says which argument tells the noise level.

        Raises:
            ConfigError: See `find_noise_argument`.
            CalibrationError: The levels are not one per sample, or not finite.
        """
        node = find_noise_argument(graph_module, settings.noise_argument)
        if node is None:
            return cls.one()
        levels = [
            level for level in noise_levels_of(graph_module, calls, settings) if level is not None
        ]
        values = torch.cat(levels)
        groups = min(_MOST, len(torch.unique(values)))
        return cls(levels=NoiseLevels.of(values, groups, argument=str(node.target)))

    @property
    def count(self) -> int:
        """Number of groups."""
        return self.levels.count

    def of_samples(self, call: Mapping[str, Any]) -> Tensor:
        """Group of each sample of a call, int64 [B].

        Args:
            call: Inputs of the graph, by placeholder; or a part of a call's samples.
        """
        batch = batch_size_of(call)
        if self.levels.argument is None:
            return torch.zeros(batch, dtype=torch.int64)
        levels = torch.as_tensor(call[self.levels.argument]).detach().cpu()
        return self.levels.group_of(levels).expand(batch)

    def held_out(self, calls: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Calls that judge what is fitted to the others: the last quarter of each group's.

        Calls come image by image or run by run, so the last ones belong to other images. A call of
        several groups counts as of none. Where no group has two calls, it is the last quarter of
        all; a single call is not held out.

        Args:
            calls: Inputs of the graph, by placeholder.
        """
        of_group: dict[int, list[int]] = {}
        for index, call in enumerate(calls):
            groups = set(self.of_samples(call).tolist())
            of_group.setdefault(groups.pop() if len(groups) == 1 else -1, []).append(index)
        parts = [group for group in of_group.values() if len(group) > 1] or [
            list(range(len(calls)))
        ]
        return tuple(
            sorted(
                i for group in parts if len(group) > 1 for i in group[-max(1, len(group) // 4) :]
            )
        )
