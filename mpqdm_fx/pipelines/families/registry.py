"""Which pipelines can be exported: the families by the names of diffusers' classes."""

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.families.controlnet import StableDiffusionControlNet
from mpqdm_fx.pipelines.families.family import Family
from mpqdm_fx.pipelines.families.flux import Flux
from mpqdm_fx.pipelines.families.flux_2 import Flux2
from mpqdm_fx.pipelines.families.pixart import PixArtAlpha, PixArtSigma
from mpqdm_fx.pipelines.families.sana import Sana
from mpqdm_fx.pipelines.families.stable_audio import StableAudio
from mpqdm_fx.pipelines.families.stable_diffusion import (
    StableDiffusion,
    StableDiffusionImageToImage,
    StableDiffusionInpainting,
    StableDiffusionInstructPix2Pix,
    StableDiffusionXL,
    StableDiffusionXLImageToImage,
)
from mpqdm_fx.pipelines.families.stable_diffusion_3 import StableDiffusion3
from mpqdm_fx.pipelines.families.unconditional import (
    AncestralPixelDiffusion,
    LatentDiffusion,
    PixelDiffusion,
)
from mpqdm_fx.pipelines.families.z_image import ZImage
from mpqdm_fx.pipelines.loops.loop import register_loop

__all__ = ["family_of", "is_supported", "register_family"]

_FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "LatentConsistencyModelPipeline": StableDiffusion(),
    "StableDiffusionImg2ImgPipeline": StableDiffusionImageToImage(),
    "StableDiffusionInpaintPipeline": StableDiffusionInpainting(),
    "StableDiffusionInstructPix2PixPipeline": StableDiffusionInstructPix2Pix(),
    "StableDiffusionControlNetPipeline": StableDiffusionControlNet(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXLImageToImage(),
    "StableDiffusion3Pipeline": StableDiffusion3(),
    "PixArtSigmaPipeline": PixArtSigma(),
    "PixArtAlphaPipeline": PixArtAlpha(),
    "SanaPipeline": Sana(),
    "SanaSprintPipeline": Sana(),
    "FluxPipeline": Flux(),
    "Flux2KleinPipeline": Flux2(),
    "ZImagePipeline": ZImage(),
    "StableAudioPipeline": StableAudio(),
    "DDPMPipeline": AncestralPixelDiffusion(),
    "DDIMPipeline": PixelDiffusion(),
    "LDMPipeline": LatentDiffusion(),
}


def is_supported(name: str) -> bool:
    """Whether pipelines of a class can be exported."""
    return name in _FAMILIES


def family_of(name: str) -> Family:
    """The family of a pipeline class.

    Args:
        name: The class's name.

    Raises:
        ConfigError: It has none; says which have one, and what else can be done.
    """
    if name not in _FAMILIES:
        raise ConfigError(
            f"{name} cannot be exported; supported are {', '.join(_FAMILIES)}. The denoiser alone "
            f"of another pipeline can be quantized: mpqdm_fx.quantize; a family of one's own is "
            f"made known by mpqdm_fx.pipelines.families.registry.register_family"
        )
    return _FAMILIES[name]


def register_family(name: str, family: Family) -> None:
    """Make pipelines of a class known to `export_pipeline`.

    Args:
        name: Name of the pipeline class, one of diffusers.
        family: How it is taken apart and draws. Its loop's file is copied into exported folders,
            so that it imports nothing but torch, numpy, and other files of `pipelines.loops`.

    Raises:
        ConfigError: The class has another family already.
        ValueError: The loop's file is called like another loop's.
    """
    if _FAMILIES.get(name, family) is not family:
        raise ConfigError(f"{name} has a family already: {type(_FAMILIES[name]).__name__}")
    register_loop(family.kind, family.loop)
    _FAMILIES[name] = family
