"""Save and load a quantized model: safetensors, JSON, no pickle; nothing is left half-written."""

import copy
import importlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import fx, nn

from mpqdm_fx.activations import NoiseLevels, activation_from_dict, activation_to_dict
from mpqdm_fx.backends.packed import PackedWeights, read_packed, write_packed
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.errors import ArtifactError, ConfigError, MPQError
from mpqdm_fx.files import check_version, checksum, read_json
from mpqdm_fx.graph.calling import example_inputs, signature_from_dict
from mpqdm_fx.graph.describe import code_in
from mpqdm_fx.graph.rebuild import infer_values, rebuild
from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.passes.quantize_activations import QuantizeActivations
from mpqdm_fx.plain import plain_config, plain_signature, read_config
from mpqdm_fx.proof import check_outputs, write_outputs
from mpqdm_fx.quantized import QuantizationReport, QuantizedModel
from mpqdm_fx.stages import assemble, normalized, restore
from mpqdm_fx.stored_graph import check_same_graph, read_graph, rebuilt_copy, write_graph
from mpqdm_fx.versions import FORMAT, FORMAT_VERSION, versions

__all__ = [
    "GRAPH",
    "MANIFEST",
    "OUTPUTS",
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
GRAPH = "graph.json.xz"
OUTPUTS = "proof.safetensors"
_LAST_WITHOUT_PROOF = 2  # format version


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


def save(quantized: QuantizedModel, directory: str | Path, *, model_required: bool = False) -> Path:
    """Write a quantized model to a folder, or replace the one that is there.

    The folder gets `mpqdm.json` (versions, settings, plan, ranges, checksums), `model.safetensors`
    (packed weights), `graph.json.xz` (the graph, as `load` makes it again without the model's
    class), `proof.safetensors` (what `load` compares with) and, for a model of diffusers, its
    `config.json`. What was written is made into a model again and has to return the same bits
    before the folder appears.

    Args:
        quantized: The model.
        directory: The folder.
        model_required: Also write a model that runs code of its own, which no file holds (a layer
            of the user's own, a method set on one layer); `load` then wants a model with that code.

    Returns:
        The folder.

    Raises:
        ArtifactError: The path cannot be used, or loading would not give the same model.
    """
    with staged_directory(directory) as stage:
        write_model(quantized, stage, model_required=model_required)
    return Path(directory)


def write_model(
    quantized: QuantizedModel,
    stage: Path,
    *,
    program: Mapping[str, Any] | None = None,
    model_required: bool = False,
) -> None:
    """Write a quantized model's files into an existing folder.

    Args:
        quantized: The model.
        stage: The folder.
        program: What its program was made with, plain JSON types; None if it has none.
        model_required: As of `save`.

    Raises:
        ArtifactError: Loading would not give the same model.
    """
    signature = plain_signature(quantized.signature)
    config = plain_config(quantized.config, quantized.signature.model_class)
    graph = write_graph(stage / GRAPH, quantized.rounded, model_required=model_required)
    layout = write_packed(stage / WEIGHTS, quantized.rounded, quantized.plan)
    files = [WEIGHTS, GRAPH, OUTPUTS]
    if config is not None:
        text = json.dumps(config, indent=2, sort_keys=True)
        (stage / MODEL_CONFIG).write_text(text, encoding="utf-8")
        files.append(MODEL_CONFIG)
    written_in = write_outputs(stage / OUTPUTS, quantized)
    needs_model = code_in(graph) is not None
    if not needs_model:
        rounded = rebuilt_copy(graph, quantized.rounded, quantized.signature)
        check_outputs(stage / OUTPUTS, written_in, _like(quantized, rounded))
    levels = quantized.noise_levels
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "versions": versions(),
        "signature": signature,
        "settings": quantized.settings.to_dict(),
        "weights": layout,
        "ranges": {name: activation_to_dict(a) for name, a in quantized.ranges.items()},
        "noise_levels": None if levels is None else list(levels.boundaries),
        "report": quantized.report.to_dict(),
        "program": None if program is None else dict(program),
        "proof": {"model_required": needs_model, "environment": written_in},
        "files": {name: checksum(stage / name) for name in files},
    }
    (stage / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")), encoding="utf-8")


def _like(quantized: QuantizedModel, rounded: fx.GraphModule) -> QuantizedModel:
    """The same quantized model from another graph of its."""
    return assemble(
        rounded,
        plan=quantized.plan,
        ranges=quantized.ranges,
        settings=quantized.settings,
        report=quantized.report,
        model_config=quantized.config,
        noise_levels=quantized.noise_levels,
    )


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


def load(directory: str | Path, model: nn.Module | None = None) -> QuantizedModel:
    """Load a saved model: the same graph, the same integers, the same numbers.

    The graph is made from the folder alone. Before it is returned, the model has to return the
    outputs that were stored (`proof` says how closely): one call of batch 1.

    Args:
        directory: Folder written by `save`.
        model: A model of the architecture that was quantized, to be compared with the folder's
            graph; its values do not matter and it is not changed. Needed only for a folder of
            `save(..., model_required=True)`.

    Raises:
        ArtifactError: The folder is damaged or of a newer version, the model is another one, or
            the numbers are not those that were stored.
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
        proof = manifest["proof"] if manifest["version"] > _LAST_WITHOUT_PROOF else None
        written_in = None if proof is None else dict(proof["environment"])
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ArtifactError(f"{root / MANIFEST} is damaged: {error!r}") from None
    if written_in is None:
        logger.warning(
            "%s was written by an older version: it carries no proof that the model is the one "
            "that was saved; save it again",
            root,
        )
        rounded = _traced(root, model or _skeleton(root), signature, settings, weights)
    else:
        rounded = _proven(root, model, signature, settings, weights)
    config = read_config(root / MODEL_CONFIG)
    loaded = assemble(
        rounded,
        plan=weights.plan,
        ranges=ranges,
        settings=settings,
        report=report,
        model_config=getattr(model, "config", None) if config is None else config,
        noise_levels=levels,
    )
    if written_in is not None:
        try:
            check_outputs(root / OUTPUTS, written_in, loaded)
        except ArtifactError as error:
            raise ArtifactError(f"{root}: {error}") from None
    return loaded


def _proven(
    root: Path,
    model: nn.Module | None,
    signature: Signature,
    settings: MPQConfig,
    weights: PackedWeights,
) -> fx.GraphModule:
    """The rounded graph as the folder describes it, or of a model that fits that description."""
    description = read_graph(root / GRAPH)
    if model is not None:
        rounded = _traced(root, model, signature, settings, weights)
        try:
            check_same_graph(rounded, description)
        except ArtifactError as error:
            raise ArtifactError(f"{root} does not fit {type(model).__name__}: {error}") from None
        return rounded
    if (code := code_in(description)) is not None:
        raise ArtifactError(
            f"{root} cannot be loaded by itself: {code}, which is code of the model's own; call "
            f"load(folder, model=...) with a model that has it"
        )
    try:
        rounded = restore(rebuild(description, signature), weights)
        infer_values(rounded)
    except MPQError as error:
        raise ArtifactError(f"{root}: {error}") from error
    return rounded


def _traced(
    root: Path,
    model: nn.Module,
    signature: Signature,
    settings: MPQConfig,
    weights: PackedWeights,
) -> fx.GraphModule:
    """The rounded graph of a model."""
    constants = {name: value for name, value in signature.baked if "." not in name}
    # A copy, since the saved tensors are put into its modules.
    skeleton = copy.deepcopy(model).eval()
    try:
        traced = normalized(skeleton, {**constants, **example_inputs(signature)}, settings)
        return restore(traced, weights)
    except MPQError as error:
        raise ArtifactError(f"{root} does not fit {type(model).__name__}: {error}") from error


def _skeleton(root: Path) -> nn.Module:
    """A model of the saved architecture with arbitrary values, for folders that hold no graph."""
    path = root / MODEL_CONFIG
    if not path.exists():
        raise ArtifactError(
            f"{root} holds no diffusers model: call load(directory, model=...) with a model of "
            f"the architecture that was quantized"
        )
    config = read_json(path)
    name = str(config.get("_class_name"))
    found = getattr(importlib.import_module("diffusers"), name, None)
    if found is None:
        raise ArtifactError(f"the installed diffusers has no class {name!r}; update diffusers")
    model: nn.Module = found.from_config(config)
    return model.eval()
