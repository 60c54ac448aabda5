"""Save and load a quantized model: safetensors, JSON, no pickle; nothing is left half-written."""

import copy
import dataclasses
import importlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from mpqdm_fx.activations import NoiseLevels, activation_from_dict, activation_to_dict
from mpqdm_fx.ambient import plain_torch
from mpqdm_fx.backends.packed import read_packed, write_packed
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ArtifactError, ConfigError, MPQError
from mpqdm_fx.files import check_version, checksum, read_json
from mpqdm_fx.graph.calling import example_inputs, signature_from_dict, signature_to_dict
from mpqdm_fx.graph.entry import unwrap
from mpqdm_fx.passes.quantize_activations import QuantizeActivations
from mpqdm_fx.quantized import QuantizationReport, QuantizedModel
from mpqdm_fx.stages import assemble, normalized, restore
from mpqdm_fx.versions import FORMAT, FORMAT_VERSION, versions

__all__ = [
    "MANIFEST",
    "WEIGHTS",
    "check_target",
    "load",
    "read_manifest",
    "save",
    "staged_directory",
]

logger = logging.getLogger(__name__)

MANIFEST = "mpqdm.json"
WEIGHTS = "model.safetensors"
MODEL_CONFIG = "config.json"


def check_target(output: str | Path, manifest: str = MANIFEST) -> Path:
    """Check that a folder can be written or replaced.

    Args:
        output: The folder.
        manifest: File by which a folder that this package wrote is known.

    Raises:
        ArtifactError: `output` is a file, or holds something that this package did not write.
    """
    target = Path(output)
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file; give a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / manifest).exists():
        raise ArtifactError(
            f"{target} exists and holds other files ({manifest} is missing); give a new folder"
        )
    return target


@contextmanager
def staged_directory(output: str | Path, manifest: str = MANIFEST) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place if the block ends well.

    Args:
        output: The folder to appear. An older one of the same name is replaced whole.
        manifest: File by which such an older one is known.

    Raises:
        ArtifactError: `output` is a file, or holds something that this package did not write.
    """
    target = check_target(output, manifest)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    stage.chmod(0o755)
    try:
        yield stage
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            target.rename(old / "old")
            stage.rename(target)
            shutil.rmtree(old)
        else:
            stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@plain_torch()
def save(quantized: QuantizedModel, directory: str | Path) -> Path:
    """Write a quantized model to a folder, or replace the one that is there.

    The folder gets `mpqdm.json` (versions, settings, plan, ranges, checksums), `model.safetensors`
    (packed weights) and, for a diffusers model, its `config.json`.

    Args:
        quantized: The model.
        directory: The folder.

    Returns:
        The folder.

    Raises:
        ArtifactError: The path cannot be used.
    """
    with staged_directory(directory) as stage:
        write_model(quantized, stage)
    return Path(directory)


def write_model(
    quantized: QuantizedModel, stage: Path, *, program: Mapping[str, Any] | None = None
) -> None:
    """Write a quantized model's files into an existing folder.

    Args:
        quantized: The model.
        stage: The folder.
        program: What its program was made with, plain JSON types; None if it has none.
    """
    layout = write_packed(stage / WEIGHTS, quantized.rounded, quantized.plan)
    files = [WEIGHTS]
    if _is_diffusers_class(quantized.signature.model_class):
        config = {**_plain(quantized.config), "_class_name": quantized.signature.model_class}
        text = json.dumps(config, indent=2, sort_keys=True, default=str)
        (stage / MODEL_CONFIG).write_text(text, encoding="utf-8")
        files.append(MODEL_CONFIG)
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
        "files": {name: checksum(stage / name) for name in files},
    }
    (stage / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")), encoding="utf-8")


def _plain(config: Any) -> dict[str, Any]:
    """A model's configuration without diffusers' private keys."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def _is_diffusers_class(name: str) -> bool:
    return hasattr(importlib.import_module("diffusers"), name)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read and check a folder's manifest and the files that it names.

    Raises:
        ArtifactError: The folder or a file is missing, damaged, or of a newer version.
    """
    root = Path(directory)
    path = root / MANIFEST
    if not root.is_dir():
        raise ArtifactError(f"{root} is not a folder")
    if not path.exists():
        raise ArtifactError(f"{root} has no {MANIFEST}: it was not written by mpqdm-fx quantize")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a manifest of this package")
    check_version(path, manifest.get("version"), FORMAT_VERSION)
    for name, expected in manifest["files"].items():
        file = root / name
        if not file.exists():
            raise ArtifactError(f"{file} is missing")
        found = checksum(file)
        if found["bytes"] != expected["bytes"]:
            raise ArtifactError(
                f"{file} is truncated or damaged: {found['bytes']} bytes, {expected['bytes']} "
                f"were written"
            )
        if found != expected:
            raise ArtifactError(f"{file} is corrupted: its checksum differs from the manifest's")
    return manifest


@plain_torch()
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
    manifest = read_manifest(root)
    try:
        signature = signature_from_dict(manifest["signature"])
        settings = MPQConfig.from_dict(manifest["settings"])
        ranges = {name: activation_from_dict(entry) for name, entry in manifest["ranges"].items()}
        boundaries = manifest.get("noise_levels")  # format version 1 has none
        levels = None if boundaries is None else NoiseLevels(boundaries=tuple(boundaries))
        QuantizeActivations(ranges=ranges, noise_levels=levels)  # refuses what does not fit
        weights = read_packed(root / WEIGHTS, manifest["weights"])
        report = QuantizationReport.from_dict(manifest["report"])
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ArtifactError(f"{root / MANIFEST} is damaged: {error!r}") from None
    # A copy, since the saved tensors are put into its modules.
    skeleton = copy.deepcopy(unwrap(model)).eval() if model is not None else _skeleton(root)
    try:
        graph_module = normalized(skeleton, example_inputs(signature), settings)
        traced = graph_module.meta["signature"]
        graph_module.meta["signature"] = dataclasses.replace(traced, dtype=signature.dtype)
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


def _skeleton(root: Path) -> nn.Module:
    """A model of the saved architecture with arbitrary values."""
    path = root / MODEL_CONFIG
    if not path.exists():
        raise ArtifactError(
            f"{root} holds no diffusers model: call load(directory, model=...) with a model of "
            f"the architecture that was quantized"
        )
    config = read_json(path)
    name = str(config.get("_class_name"))
    if not _is_diffusers_class(name):
        raise ArtifactError(f"the installed diffusers has no class {name!r}; update diffusers")
    model: nn.Module = getattr(importlib.import_module("diffusers"), name).from_config(config)
    return model.eval()
