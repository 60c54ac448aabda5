"""Progress over the stages of a lowering."""

import logging
import time
from typing import Self

from mpqdm_fx.io.progress import stage

__all__ = ["Stages"]

logger = logging.getLogger(__name__)

_STAGES = ("decompose", "convert", "export", "lower", "serialise", "execute")


class Stages:
    """Progress over the stages of a lowering, and one line each in the log."""

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._stage = stage("lowering", len(_STAGES), "stage")
        return self

    def __call__(self, name: str) -> None:
        """Enter a stage; stages that were left out count as done."""
        self._stage(_STAGES.index(name) - self._stage.done, note=name)
        logger.info("XNNPACK: %s (%.0f s)", name, self.seconds)

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._start

    def __exit__(self, *error: object) -> None:
        self._stage.close(finished=error[0] is None)
