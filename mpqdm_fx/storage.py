"""Save and load a quantized model: safetensors, JSON, no pickle; nothing is left half-written."""

import copy
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mpqdm_fx.activations import NoiseLevels, activation_from_dict, activation_to_dict
from mpqdm_fx.backends.packed import read_packed, write_packed
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ArtifactError, ConfigError, MPQError
from mpqdm_fx.folders import (
    MODEL_CONFIG,
    WEIGHTS,
    ModelFolder,
    open_folder,
    seal_folder,
    staged_directory,
)
from mpqdm_fx.graph.calling import example_inputs, signature_from_dict, signature_to_dict
from mpqdm_fx.io.schema import plain
from mpqdm_fx.passes.quantize_activations import QuantizeActivations
from mpqdm_fx.quantized import QuantizationReport, QuantizedModel
from mpqdm_fx.stages import assemble, normalized, restore
from mpqdm_fx.versions import FORMAT, FORMAT_VERSION, versions

__all__ = ["load", "save", "write_model"]


def save(quantized: QuantizedModel, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write a quantized model to a folder.

    The folder gets `mpqdm.json` (versions, settings, plan, ranges, checksums), `model.safetensors`
    (packed weights) and, for a diffusers model, its `config.json`.

    Args:
        quantized: The model.
        directory: The folder; it appears whole or not at all.
        overwrite: Whether a folder that this package wrote may be replaced.

    Returns:
        The folder.

    Raises:
        ArtifactError: The path cannot be used, holds other files, or is a result and not to be
            overwritten.
    """
    with staged_directory(directory, overwrite=overwrite) as stage:
        write_model(quantized, stage)
    return Path(directory)


def write_model(
    quantized: QuantizedModel, stage: Path, *, program: Mapping[str, Any] | None = None
) -> None:
    """Write a quantized model's files into an existing folder, and seal it.

    Args:
        quantized: The model.
        stage: The folder; what is in it already is listed too.
        program: What its program was made with, plain JSON types; None if it has none.
    """
    layout = write_packed(stage / WEIGHTS, quantized.rounded, quantized.plan)
    if _is_diffusers_class(quantized.signature.model_class):
        config = {**_plain(quantized.config), "_class_name": quantized.signature.model_class}
        text = json.dumps(config, indent=2, sort_keys=True, default=str)
        (stage / MODEL_CONFIG).write_text(text, encoding="utf-8")
    levels = quantized.noise_levels
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "versions": versions(),
        "signature": signature_to_dict(quantized.signature),
        "settings": quantized.settings.to_dict(),
        "weights": layout,
        "ranges": {name: activation_to_dict(a) for name, a in quantized.ranges.items()},
        "noise_levels": None if levels is None else list(levels.boundaries),
        "report": quantized.report.to_dict(),
        "program": None if program is None else dict(program),
    }
    seal_folder(stage, plain(manifest))


def _plain(config: Any) -> dict[str, Any]:
    """A model's configuration without diffusers' private keys."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def _is_diffusers_class(name: str) -> bool:
    return hasattr(importlib.import_module("diffusers"), name)


def load(directory: str | Path, model: nn.Module | None = None) -> QuantizedModel:
    """Load a saved model: the same graph, the same integers, the same numbers.

    Args:
        directory: Folder written by `save`.
        model: A model of the architecture that was quantized; its values do not matter and it is
            not changed. Needed only if the model was no diffusers model.

    Raises:
        ArtifactError: The folder is damaged or of a newer version, or the model does not fit.
    """
    root = Path(directory)
    folder = open_folder(root)
    manifest = folder.manifest
    try:
        signature = signature_from_dict(manifest["signature"])
        settings = MPQConfig.from_dict(manifest["settings"])
        ranges = {name: activation_from_dict(entry) for name, entry in manifest["ranges"].items()}
        boundaries = manifest.get("noise_levels")  # format version 1 has none
        levels = None if boundaries is None else NoiseLevels(boundaries=tuple(boundaries))
        QuantizeActivations(ranges=ranges, noise_levels=levels)  # refuses what does not fit
        with folder.files.opened(WEIGHTS) as path:
            weights = read_packed(path, manifest["weights"], name=root / WEIGHTS)
        report = QuantizationReport.from_dict(manifest["report"])
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ArtifactError(f"{folder.files.manifest} is damaged: {error!r}") from None
    # A copy, since the saved tensors are put into its modules.
    skeleton = copy.deepcopy(model).eval() if model is not None else _skeleton(folder)
    try:
        graph_module = normalized(skeleton, example_inputs(signature), settings)
        rounded = restore(graph_module, weights)
    except MPQError as error:
        raise ArtifactError(f"{root} does not fit {type(skeleton).__name__}: {error}") from error
    return assemble(
        rounded,
        plan=weights.plan,
        ranges=ranges,
        settings=settings,
        report=report,
        model_config=getattr(skeleton, "config", None),
        noise_levels=levels,
    )


def _skeleton(folder: ModelFolder) -> nn.Module:
    """A model of the saved architecture with arbitrary values."""
    if MODEL_CONFIG not in folder.files:
        raise ArtifactError(
            f"{folder.root} holds no diffusers model: call load(directory, model=...) with a model "
            f"of the architecture that was quantized"
        )
    config = folder.files.read_json(MODEL_CONFIG)
    name = str(config.get("_class_name"))
    if not _is_diffusers_class(name):
        raise ArtifactError(f"the installed diffusers has no class {name!r}; update diffusers")
    model: nn.Module = getattr(importlib.import_module("diffusers"), name).from_config(config)
    return model.eval()
