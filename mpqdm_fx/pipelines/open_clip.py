"""A CLIP model on the disk, which judges pictures by their prompts; nothing is downloaded."""

import importlib
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError, first_line
from mpqdm_fx.io.folders import MODEL_CONFIG
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.pipelines.folder import load_encoder
from mpqdm_fx.report.clip_score import ClipScore

__all__ = ["open_clip"]


def open_clip(folder: Path, option: str = "--clip") -> ClipScore:
    """Load a `CLIPModel` and its `CLIPProcessor`, as `save_pretrained` writes both.

    Args:
        folder: Folder of both.
        option: Where it was typed, for messages.

    Raises:
        ArtifactError: It is no such folder, or a file in it is missing or damaged.
    """
    remedy = "give a folder of a CLIPModel and its CLIPProcessor, written by save_pretrained"
    if not (folder / MODEL_CONFIG).is_file():
        raise ArtifactError(
            f"{option} {folder}: no folder of a model, and nothing is downloaded; {remedy}"
        )
    kind = read_json(folder / MODEL_CONFIG, finite=False).get("model_type")
    if kind != "clip":
        raise ArtifactError(f"{option} {folder}: its model is of type {kind!r}, not CLIP; {remedy}")
    model = load_encoder(folder, "CLIPModel", None)
    transformers: Any = importlib.import_module("transformers")
    try:
        processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers says to a folder
        raise ArtifactError(
            f"{option} {folder}: no CLIPProcessor: {first_line(error)}; {remedy}"
        ) from None
    return ClipScore(model, processor)
