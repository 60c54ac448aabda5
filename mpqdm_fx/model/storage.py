"""Save and load a quantized model: safetensors, JSON, no pickle; nothing is left half-written."""

import copy
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from mpqdm_fx.capture.entry import unwrap
from mpqdm_fx.errors import ArtifactError, ConfigError, MPQError
from mpqdm_fx.graph.calling import example_call, output_class
from mpqdm_fx.graph.describe import Description, code_in
from mpqdm_fx.graph.fold_parametrizations import fold_parametrizations
from mpqdm_fx.graph.rebuild import infer_values, rebuild
from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.folders import (
    GRAPH,
    MODEL_CONFIG,
    OUTPUTS,
    WEIGHTS,
    seal_folder,
    staged_directory,
)
from mpqdm_fx.io.model_config import model_from_config
from mpqdm_fx.io.schema import plain, validated
from mpqdm_fx.io.sealed import seal
from mpqdm_fx.io.versions import FORMAT, FORMAT_VERSION, versions
from mpqdm_fx.model.folder import ModelFolder, open_folder
from mpqdm_fx.model.manifest import Manifest
from mpqdm_fx.model.packed import PackedWeights, read_packed, write_packed
from mpqdm_fx.model.plain import given_config, plain_config, plain_signature
from mpqdm_fx.model.proof import check_outputs, write_outputs
from mpqdm_fx.model.quantized import Quantization, QuantizedModel
from mpqdm_fx.model.stages import normalized, restore
from mpqdm_fx.model.stored_graph import check_same_graph, read_graph, write_graph
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.passes.quantize.scale_inputs import SCALES, ScaleInputs
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.report import QuantizationReport

__all__ = ["load", "save", "write_model"]

logger = logging.getLogger(__name__)


@plain_torch()
def save(
    quantized: QuantizedModel,
    directory: str | Path,
    *,
    overwrite: bool = False,
    model_required: bool = False,
) -> Path:
    """Write a quantized model to a folder.

    The folder gets `mpqdm.json` (versions, settings, plan, ranges, checksums), `model.safetensors`
    (packed weights), `graph.json.xz` (the graph, as `load` makes it again without the model's
    class), `proof.safetensors` (what `load` compares with) and, for a model of diffusers, its
    `config.json`. What was written is made into a model again and has to return the same bits
    before the folder appears.

    Args:
        quantized: The model.
        directory: The folder; it appears whole or not at all.
        overwrite: Whether a folder that this package wrote may be replaced.
        model_required: Also write a model that runs code of its own, which no file holds (a layer
            of the user's own, a method set on one layer); `load` then wants a model with that code.

    Returns:
        The folder.

    Raises:
        ArtifactError: The path cannot be used, holds other files, or is a result and not to be
            overwritten; or loading would not give the same model.
    """
    with staged_directory(directory, overwrite=overwrite) as stage:
        write_model(quantized, stage, model_required=model_required)
    return Path(directory)


def write_model(
    quantized: QuantizedModel,
    stage: Path,
    *,
    program: Mapping[str, Any] | None = None,
    model_required: bool = False,
) -> None:
    """Write a quantized model's files into an existing folder, and seal it.

    Args:
        quantized: The model.
        stage: The folder; what is in it already is listed too.
        program: What its program was made with, plain JSON types; None if it has none.
        model_required: As of `save`.

    Raises:
        ArtifactError: Loading would not give the same model.
    """
    signature = plain_signature(quantized.signature)
    config = plain_config(quantized.config, quantized.signature.model_class)
    graph = write_graph(stage / GRAPH, quantized.rounded, model_required=model_required)
    layout = write_packed(stage / WEIGHTS, quantized.rounded, quantized.plan)
    if config is not None:
        text = json.dumps(config, indent=2, sort_keys=True)
        (stage / MODEL_CONFIG).write_text(text, encoding="utf-8")
    written_in = write_outputs(stage / OUTPUTS, quantized)
    needs_model = code_in(graph) is not None
    levels = quantized.noise_levels
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "versions": versions(),
        "signature": signature,
        "settings": quantized.settings.to_dict(),
        "weights": layout,
        "ranges": {name: dataclasses.asdict(a) for name, a in quantized.ranges.items()},
        "noise_levels": None if levels is None else list(levels.boundaries),
        "report": quantized.report.to_dict(),
        "program": None if program is None else dict(program),
        "proof": {"model_required": needs_model, "environment": dict(written_in)},
    }
    try:  # what a load would refuse is not written
        read = validated(Manifest, seal(plain({**manifest, "files": {}})), "its manifest")
    except ArtifactError as error:
        name = quantized.signature.model_class
        raise ArtifactError(f"{name} cannot be saved so that it loads: {error}") from None
    if not needs_model:
        weights = read_packed(stage / WEIGHTS, read.weights, name=stage / WEIGHTS)
        again = _rebuilt(graph, read.signature, weights)
        check_same_graph(again, graph)
        check_outputs(stage / OUTPUTS, written_in, quantized.with_graph(again))
    seal_folder(stage, plain(manifest))


@plain_torch()
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
    folder = open_folder(directory)
    manifest = folder.manifest
    signature, settings, report = manifest.signature, manifest.settings, manifest.report
    output_class(signature)  # refuses one that is not known
    levels = None
    try:
        if manifest.noise_levels is not None:
            named = settings.noise_argument
            levels = NoiseLevels(boundaries=manifest.noise_levels, argument=named)
        # refuses what does not fit
        QuantizeActivations(ranges=manifest.ranges, noise_levels=levels)
        with folder.files.opened(WEIGHTS) as path:
            weights = read_packed(path, manifest.weights, name=folder.root / WEIGHTS)
    except ConfigError as error:
        raise ArtifactError(f"{folder.files.manifest} is damaged: {error}") from None
    proof = manifest.proof
    try:
        if proof is None:
            logger.warning(
                "%s was written by an older version: it carries no proof that the model is the one "
                "that was saved; save it again",
                folder.root,
            )
            skeleton = model or _skeleton(folder)
            rounded = _traced(skeleton, signature, settings, weights, report)
        else:
            rounded = _proven(folder, model, signature, settings, weights, report)
        config = None
        if MODEL_CONFIG in folder.files:
            config = given_config(folder.files.read_json(MODEL_CONFIG, finite=False))
        quantization = Quantization(
            plan=weights.plan,
            ranges=manifest.ranges,
            noise_levels=levels,
            settings=settings,
            report=report,
            config=getattr(model, "config", None) if config is None else config,
        )
        loaded = QuantizedModel(rounded, quantization)
        if proof is not None:
            with folder.files.opened(OUTPUTS) as path:
                check_outputs(path, proof.environment, loaded)
    except MPQError as error:
        where = "" if model is None else f" does not fit {type(model).__name__}"
        raise ArtifactError(f"{folder.root}{where}: {error}") from error
    return loaded


def _proven(
    folder: ModelFolder,
    model: nn.Module | None,
    signature: Signature,
    settings: MPQConfig,
    weights: PackedWeights,
    report: QuantizationReport,
) -> fx.GraphModule:
    """The rounded graph as the folder describes it, or of a model that fits that description."""
    with folder.files.opened(GRAPH) as path:
        description = read_graph(path)
    if model is not None:
        rounded = _traced(model, signature, settings, weights, report)
        check_same_graph(rounded, description)
        return rounded
    if (code := code_in(description)) is not None:
        raise ArtifactError(
            f"it cannot be loaded by itself: {code}, which is code of the model's own; call "
            f"load(folder, model=...) with a model that has it"
        )
    return _rebuilt(description, signature, weights)


def _rebuilt(
    description: Description, signature: Signature, weights: PackedWeights
) -> fx.GraphModule:
    """The rounded graph of what a folder holds."""
    rounded = restore(rebuild(description, signature), weights)
    infer_values(rounded)
    return rounded


def _traced(
    model: nn.Module,
    signature: Signature,
    settings: MPQConfig,
    weights: PackedWeights,
    report: QuantizationReport,
) -> fx.GraphModule:
    """The rounded graph of a model, which is not changed."""
    # A copy, since the saved tensors are put into its modules. Computed weights cannot be copied.
    skeleton = copy.deepcopy(fold_parametrizations(unwrap(model))).eval()
    graph_module = normalized(skeleton, example_call(signature), settings)
    traced = graph_module.meta["signature"]
    graph_module.meta["signature"] = dataclasses.replace(traced, dtype=signature.dtype)
    scale = ScaleInputs(factors=_factors(weights, report))
    return restore(scale(graph_module).graph_module, weights)


def _factors(weights: PackedWeights, report: QuantizationReport) -> dict[str, Tensor]:
    """What the inputs of layers are divided by; layers that share an input share the factors."""
    factors: dict[str, Tensor] = {}
    for choice in report.activations:
        names = [f"{SCALES}.{name}" for name in choice.layers]
        inverse = next((weights.floats[name] for name in names if name in weights.floats), None)
        if inverse is not None:
            factors.update(dict.fromkeys(choice.layers, inverse.float().reciprocal().flatten()))
    return factors


def _skeleton(folder: ModelFolder) -> nn.Module:
    """A model of the saved architecture with arbitrary values, for folders that hold no graph."""
    if MODEL_CONFIG not in folder.files:
        raise ArtifactError(
            "it holds no diffusers model: call load(directory, model=...) with a model of the "
            "architecture that was quantized"
        )
    config = folder.files.read_json(MODEL_CONFIG, finite=False)
    return model_from_config(config, str(folder.root / MODEL_CONFIG))
