"""What a source knows of the pipeline that its denoiser is part of."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Components"]


class Components(Protocol):
    """What stands beside a denoiser in its pipeline; `pipelines.components` has it."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts that runs take turns with; none where nothing encodes them."""

    @property
    def unencoded(self) -> str | None:
        """Why embeddings are random numbers; None if they are the text encoders'."""

    @property
    def scale(self) -> float:
        """Guidance scale as the pipeline takes it."""

    @property
    def guidance(self) -> float | None:
        """Weight of classifier-free guidance in runs; None calls the denoiser once a step."""

    def halves(
        self, base: Mapping[str, Any], count: int, *, unseen: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Conditions of so many runs over made ones, with the prompts and without them."""

    @property
    def decodes(self) -> bool:
        """Whether samples are latents, and are decoded here."""

    @property
    def undecoded(self) -> str | None:
        """Why samples that are latents are not decoded; None if they are, or are pixels."""

    def pictures(self, samples: Tensor) -> Tensor | None:
        """Latents as images; None if nothing decodes them."""
