"""A quantized model as a component of a diffusers pipeline.

Pipelines find the class of a component that is not diffusers' own by the name of its module, and
the class that it has to inherit from among that module's names. So this file is imported by whoever
loads such a pipeline, and `ModelMixin` stays a name of it.
"""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin

from mpqdm_fx.capture.foreign_models import LOW_PRECISION
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.folders import MODEL_CONFIG
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.storage import load, save

__all__ = ["QuantizedComponent"]


class QuantizedComponent(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """A quantized model where a diffusers pipeline wants a model of diffusers.

    `from_pretrained(folder, unet=QuantizedComponent(quantized))` of a pipeline takes it in the
    model's place and does not read the float weights; `save_pretrained` of the pipeline writes the
    packed weights, and where this module is imported, `from_pretrained` reads them again. The
    numbers are those of the fake-quantized graph. Casts are refused, as by diffusers' own quantized
    models: the graph computes in float32. It takes and returns the dtype of the model that was
    quantized, or the one that it is loaded in.

    Args:
        quantized: Quantized model of a class of diffusers; it is not copied.

    Raises:
        ConfigError: The model has no configuration of diffusers.
    """

    config_name = MODEL_CONFIG

    def __init__(self, quantized: QuantizedModel) -> None:
        if quantized.config is None:
            raise ConfigError(
                f"{quantized.signature.model_class} has no configuration of diffusers: pipelines "
                "take quantized models of diffusers' classes alone"
            )
        super().__init__()
        self.quantized = quantized
        self.is_quantized = True  # diffusers refuses to cast what says so
        self.register_to_config(**dict(quantized.config))
        self.training = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that inputs are taken and outputs returned in."""
        return self.quantized.dtype

    def __getattr__(self, name: str) -> Any:
        """Pipelines read shapes off modules, for example `unet.add_embedding.linear_1`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "quantized":  # not set yet
                raise
            children = dict(self.quantized.graph_module.named_children())
            if name not in children:
                raise
            return children[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fake-quantized graph on the model's own arguments.

        Raises:
            TraceError: The arguments do not fit the traced signature.
        """
        return self.quantized(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the packed weights, as `mpqdm_fx.save` does.

        Args:
            save_directory: The folder.
            **_: What else pipelines say; there is one form.

        Raises:
            ArtifactError: The path cannot be used.
        """
        save(self.quantized, save_directory, overwrite=True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **options: Any
    ) -> Self:
        """Read packed weights, as `mpqdm_fx.load` does.

        Args:
            pretrained_model_name_or_path: Folder written by `save_pretrained`, `mpqdm_fx.save` or
                `mpqdm-fx quantize`.
            subfolder: Part of a pipeline folder.
            **options: What else pipelines say. A dtype (`torch_dtype`) is that of inputs and
                outputs: float32, float16 or bfloat16; the rest changes nothing.

        Raises:
            ArtifactError: The folder is missing, damaged or of a newer version.
            ConfigError: It is to be loaded in another dtype, or on a device map.
        """
        dtypes = [options[name] for name in ("torch_dtype", "dtype") if options.get(name)]
        if not set(dtypes) <= {torch.float32, *LOW_PRECISION}:
            raise ConfigError(
                f"torch_dtype={dtypes[0]}: quantized graphs compute in float32, and take and "
                f"return float32, float16 or bfloat16; load the pipeline in one of these"
            )
        if options.get("device_map") is not None:
            raise ConfigError("device_map: load the pipeline without it and call pipeline.to(...)")
        root = Path(pretrained_model_name_or_path)
        quantized = load(root if subfolder is None else root / subfolder)
        return cls(quantized.with_dtype(dtypes[-1]) if dtypes else quantized)
