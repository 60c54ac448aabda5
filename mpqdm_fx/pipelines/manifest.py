"""What an exported folder says about itself: `pipeline.json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpqdm_fx.backends.compressed import SUFFIX
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.folders import listed_files
from mpqdm_fx.io.schema import plain
from mpqdm_fx.io.sealed import seal
from mpqdm_fx.io.versions import versions
from mpqdm_fx.pipelines.layout import Layout, Size
from mpqdm_fx.pipelines.program_files import FORMAT, MANIFEST, VERSION

__all__ = ["MANIFEST", "VERSION", "compressed_entry", "method_entry", "write_manifest"]


def method_entry(
    part: str,
    size: Size | None,
    method: str,
    outputs: Sequence[str] | None,
    program: Mapping[str, Any],
) -> dict[str, Any]:
    """One entry point of the folder.

    Args:
        part: The part that it runs.
        size: Image size that it is made for; None if any.
        method: Its name in the file.
        outputs: Names of what it returns; None if the program names them itself.
        program: `XnnpackProgram.to_dict()`.
    """
    names = outputs or [spec["name"] for spec in program["outputs"]]
    results = [{**spec, "name": name} for name, spec in zip(names, program["outputs"], strict=True)]
    return {
        "part": part,
        "size": None if size is None else list(size),
        "file": program["path"],
        "weights": program["weights_path"],
        "method": method,
        "inputs": list(program["inputs"]),
        "outputs": results,
        "four_bit_layers": len(program["four_bit_layers"]),
        "subgraphs": program["subgraphs"],
        "undelegated": program["undelegated"],
        "program_sqnr_db": program["sqnr_db"],
    }


def compressed_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `method_entry` whose files are compressed."""
    files = {key: entry[key] for key in ("file", "weights") if entry[key] is not None}
    return {**entry, **{key: f"{name}{SUFFIX}" for key, name in files.items()}}


def write_manifest(
    stage: Path,
    layout: Layout,
    *,
    sizes: Sequence[Size],
    defaults: Mapping[str, Any],
    methods: Sequence[Mapping[str, Any]],
    parts: Mapping[str, Mapping[str, Any]],
    quantization: Mapping[str, Any] | None,
    timesteps: Sequence[float] | None,
    expanded: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `pipeline.json` into a folder whose other files are all there.

    Args:
        stage: The folder.
        layout: The pipeline.
        sizes: Image sizes; the first is the default.
        defaults: Steps and guidance.
        methods: Entries of `method_entry`.
        parts: Precision, bits and signal-to-noise ratio of each part.
        quantization: Settings of the denoiser, or None if it is float.
        timesteps: Those that the denoiser has tables for, in the order of their rows; None if it
            takes any.
        expanded: Size and hash of what each compressed file expands to.

    Returns:
        The manifest.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "pipeline": layout.class_name,
        "kind": layout.family.kind,
        "sizes": [list(size) for size in sizes],
        "latents": {"channels": layout.latent_channels, "scale": layout.scale},
        "convention": asdict(layout.convention),
        "defaults": dict(defaults),
        "settings": dict(layout.settings),
        "methods": list(methods),
        "parts": {name: dict(part) for name, part in parts.items()},
        "quantization": quantization,
        "timesteps": None if timesteps is None else list(timesteps),
        "expanded": dict(expanded),
        "files": listed_files(stage, MANIFEST),
    }
    sealed = seal(plain(manifest))
    write_text(stage / MANIFEST, json.dumps(sealed, indent=1, allow_nan=False))
    return sealed
