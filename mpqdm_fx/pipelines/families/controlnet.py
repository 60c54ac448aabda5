"""Stable Diffusion with a control network."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.families.family import denoiser_part, ready, sized_part
from mpqdm_fx.pipelines.families.stable_diffusion import StableDiffusion
from mpqdm_fx.pipelines.loops.controlnet import ControlNet
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.parts import Part

__all__ = ["ControlResiduals", "StableDiffusionControlNet"]

_DOWN, _MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"


class ControlResiduals(nn.Module):
    """A control network that returns its residuals as one tuple, unweighted.

    Args:
        controlnet: `ControlNetModel`.
    """

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
    ) -> tuple[Tensor, ...]:
        """Residuals for the denoiser's skips, and last for its middle.

        Args:
            sample: Latents, float [B, C, h, w].
            timestep: Float [B].
            encoder_hidden_states: Float [B, L, D].
            controlnet_cond: The control picture in 0..1, float [B, 3, H, W].
        """
        down, middle = self.controlnet(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            controlnet_cond=controlnet_cond,
            return_dict=False,
        )
        return (*down, middle)


class StableDiffusionControlNet(StableDiffusion):
    """The control network is a part that runs in every step, before the denoiser."""

    loop: ClassVar[type[Loop]] = ControlNet
    needed: ClassVar[tuple[str, ...]] = (*StableDiffusion.needed, "controlnet")

    def check(self, pipeline: Any) -> None:
        """Refuse several control networks, and those that pool."""
        super().check(pipeline)
        name = type(pipeline.controlnet).__name__
        if name != "ControlNetModel":
            raise ConfigError(f"controlnet is a {name}; only one ControlNetModel is supported")
        if pipeline.controlnet.config.global_pool_conditions:
            raise ConfigError(
                "controlnet pools its residuals (global_pool_conditions), as guess mode wants "
                "them; only control networks without are supported"
            )

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """As of text, with the control network; its picture is no latents."""
        return [part for part in super().parts(pipeline) if part.name != "vae_encoder"]

    def stepped_parts(self, pipeline: Any) -> Sequence[Part]:
        """Control network and denoiser."""
        network = ControlResiduals(ready(pipeline.controlnet))
        names = [f"{_DOWN}.{index}" for index in range(_skips(pipeline.controlnet))]
        control = sized_part(
            "controlnet", network, (*names, _MIDDLE),
            stepped=("sample", "timestep", "controlnet_cond"),
        )  # fmt: skip
        denoiser = denoiser_part(pipeline.unet)
        stepped = (*denoiser.stepped, _DOWN, _MIDDLE)
        return [control, sized_part("denoiser", denoiser.module, denoiser.outputs, stepped=stepped)]


def _skips(controlnet: Any) -> int:
    """Residuals for the denoiser's skips: one for each that it keeps."""
    return len(controlnet.controlnet_down_blocks)
