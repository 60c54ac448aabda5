"""What a pipeline's class does to latents before its VAE decodes them, beside scaling them."""

import inspect
import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["LatentScaling", "latent_scaling"]


@dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """What of a VAE's config a pipeline uses: pipelines differ, whatever their VAE says.

    Attributes:
        shifted: Its `shift_factor`.
        normalised: Its `latents_mean` and `latents_std`.
    """

    shifted: bool
    normalised: bool


def latent_scaling(pipeline_class: Any) -> LatentScaling:
    """What the class's own code reads; none of its arguments or attributes says it.

    Args:
        pipeline_class: A pipeline class of diffusers. Of one that is not known all is used that a
            VAE has.
    """
    module = sys.modules.get(getattr(pipeline_class, "__module__", ""))
    if pipeline_class is None or module is None:
        return LatentScaling(shifted=True, normalised=True)
    code = inspect.getsource(module)
    return LatentScaling(shifted="shift_factor" in code, normalised="latents_mean" in code)
