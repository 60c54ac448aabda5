"""Progress over the stages of a lowering."""

import logging
import time
from typing import Self

from tqdm import tqdm

__all__ = ["Stages"]

logger = logging.getLogger(__name__)

_STAGES = ("decompose", "convert", "export", "lower", "serialise", "execute")


class Stages:
    """Progress over the stages of a lowering: a bar, and one line each in the log."""

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._bar = tqdm(total=len(_STAGES), desc="XNNPACK", unit="stage", disable=None)
        return self

    def __call__(self, name: str) -> None:
        """Enter a stage; stages that were left out count as done."""
        self._bar.n = _STAGES.index(name)
        self._bar.set_postfix_str(name)
        logger.info("XNNPACK: %s (%.0f s)", name, self.seconds)

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._start

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._bar.update(len(_STAGES) - self._bar.n)
        self._bar.close()
