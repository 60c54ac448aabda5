"""From a name on the command line to a model, its scheduler and the inputs it can be run on."""

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.models import bundled

__all__ = ["Source", "diffusers_class", "example_inputs_for", "load_source"]

logger = logging.getLogger(__name__)

CONTEXT_LENGTH = 77  # tokens of CLIP's text encoder, which most cross-attention UNets read


@dataclass(frozen=True, kw_only=True)
class Source:
    """A float model and what is needed to run it.

    Attributes:
        name: What the user called it.
        model: The model in evaluation mode, or what is called like it.
        scheduler: A diffusers scheduler.
        example_inputs: Keyword arguments of one call, batch 2.
        sample_shape: Shape of one sample, without the batch axis.
        classes: Number of class labels, 0 if the model takes none.
    """

    name: str
    model: Any
    scheduler: Any
    example_inputs: Mapping[str, Any]
    sample_shape: tuple[int, ...]
    classes: int

    def conditions(self, count: int, seed: int) -> dict[str, Any]:
        """Conditions for `count` samples: balanced class labels, or seeded random embeddings.

        Args:
            count: Number of samples.
            seed: Seed of the random embeddings.

        Returns:
            Keyword arguments beside `sample` and `timestep`, batch `count`.
        """
        generator = torch.Generator().manual_seed(seed)
        conditions: dict[str, Any] = {}
        for name, value in self.example_inputs.items():
            if name in ("sample", "timestep"):
                continue
            if name == "class_labels" and self.classes:
                conditions[name] = torch.arange(count) % self.classes
            else:
                conditions[name] = _random_like(value, count, generator)
        return conditions


def _random_like(value: Any, count: int, generator: torch.Generator) -> Any:
    if isinstance(value, Mapping):
        return {key: _random_like(entry, count, generator) for key, entry in value.items()}
    shape = (count, *value.shape[1:])
    return torch.randn(shape, generator=generator).to(value.dtype)


def diffusers_class(name: str) -> Any:
    """The diffusers class called `name`.

    Raises:
        ArtifactError: diffusers has none.
    """
    found = getattr(importlib.import_module("diffusers"), name, None)
    if found is None:
        raise ArtifactError(f"the installed diffusers has no class {name!r}; update diffusers")
    return found


def load_source(model: str, subfolder: str | None = None) -> Source:
    """Load a model by name or path.

    Args:
        model: `"digits"`, a diffusers model folder (config.json and safetensors), or a pipeline
            folder together with `subfolder`.
        subfolder: Folder of the denoiser inside a pipeline folder, for example `"unet"`.

    Raises:
        ConfigError: No such model, or its example inputs cannot be guessed.
        ArtifactError: The folder is damaged.
    """
    if model == "digits":
        unet = bundled.load_digits_unet()
        return _source("digits", unet, bundled.load_digits_scheduler())
    root = Path(model)
    if not root.is_dir():
        raise ConfigError(
            f"{model!r} is neither a bundled model (digits) nor a folder; give a diffusers model "
            f"folder, or a pipeline folder with --subfolder unet"
        )
    if (root / "model_index.json").exists() and subfolder is None:
        raise ConfigError(
            f"{model} is a pipeline folder; say which part to quantize, e.g. --subfolder unet"
        )
    folder = root / subfolder if subfolder else root
    class_name = read_json(folder / "config.json").get("_class_name")
    if not isinstance(class_name, str):
        raise ArtifactError(f"{folder / 'config.json'} has no _class_name: not a diffusers model")
    try:
        loaded = diffusers_class(class_name).from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ArtifactError(f"{folder}: diffusers could not load it: {first}") from None
    return _source(model, loaded.float().eval(), _scheduler(root))


def _scheduler(root: Path) -> Any:
    """The folder's own scheduler, or DDIM over the usual 1000 steps."""
    folder = root / "scheduler"
    if (folder / "scheduler_config.json").exists():
        name = read_json(folder / "scheduler_config.json").get("_class_name", "DDIMScheduler")
        return diffusers_class(name).from_pretrained(folder)
    logger.warning("%s has no scheduler folder: DDIM with its default schedule is used", root)
    return diffusers_class("DDIMScheduler")()


def _source(name: str, model: nn.Module, scheduler: Any) -> Source:
    inputs = example_inputs_for(model)
    return Source(
        name=name,
        model=model,
        scheduler=scheduler,
        example_inputs=inputs,
        sample_shape=tuple(inputs["sample"].shape[1:]),
        classes=int(getattr(model, "config", {}).get("num_class_embeds") or 0),
    )


def example_inputs_for(model: nn.Module, *, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Random keyword arguments of the right shapes for a diffusers UNet.

    Args:
        model: `UNet2DModel` or `UNet2DConditionModel` (or one with the same arguments).
        batch: Batch size.
        seed: Seed of the random values.

    Raises:
        ConfigError: The class is another one: its arguments cannot be guessed.
    """
    kind = type(model).__name__
    if kind not in ("UNet2DModel", "UNet2DConditionModel"):
        raise ConfigError(
            f"example inputs for a {kind} cannot be guessed; use the Python interface: "
            f"mpqdm_fx.trace(model, example_inputs)"
        )
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    size = config["sample_size"] or 64
    height, width = (size, size) if isinstance(size, int) else size
    inputs: dict[str, Any] = {
        "sample": normal(config["in_channels"], height, width),
        "timestep": torch.full((batch,), 500, dtype=torch.int64),
    }
    if config.get("num_class_embeds"):
        inputs["class_labels"] = torch.arange(batch) % config["num_class_embeds"]
    if kind == "UNet2DConditionModel":
        width_of_context = config["cross_attention_dim"]
        if not isinstance(width_of_context, int):
            width_of_context = width_of_context[0]
        inputs["encoder_hidden_states"] = normal(CONTEXT_LENGTH, width_of_context)
        if config.get("addition_embed_type") == "text_time":
            text = (
                config["projection_class_embeddings_input_dim"]
                - 6 * config["addition_time_embed_dim"]
            )
            times = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32) * 8
            inputs["added_cond_kwargs"] = {
                "text_embeds": normal(text),
                "time_ids": times.repeat(batch, 1),
            }
    return inputs
