"""Folders that this package writes: sealed, replaced whole, never somebody else's.

Each has a manifest that lists all of its files: `mpqdm.json`, or `pipeline.json` of an export, or
`pareto.json` of several budgets.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.exchange import staged_folder
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.sealed import Entry, read_json, seal
from mpqdm_fx.io.system_errors import check_name_length
from mpqdm_fx.io.versions import FIRST_SEALED, FORMAT

__all__ = [
    "EXPORT_MANIFEST",
    "GRAPH",
    "MANIFEST",
    "MODEL_CONFIG",
    "OUTPUTS",
    "PARETO_MANIFEST",
    "SCHEDULER_CONFIG",
    "WEIGHTS",
    "check_target",
    "holds_result",
    "is_export",
    "listed_files",
    "refuse_other_results",
    "seal_folder",
    "staged_directory",
]

MANIFEST = "mpqdm.json"
EXPORT_MANIFEST = "pipeline.json"
PARETO_MANIFEST = "pareto.json"
WEIGHTS = "model.safetensors"
GRAPH = "graph.json.xz"
OUTPUTS = "proof.safetensors"
MODEL_CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"

_FORMATS: Mapping[str, str] = {
    EXPORT_MANIFEST: "mpqdm_fx.pipeline",
    PARETO_MANIFEST: "mpqdm-fx pareto",
}
# What running a folder leaves in it: expanded programs, and Python's compiled files.
_MADE_BY_RUNNING = re.compile(r"\.[^/]+\.[0-9a-f]{16}(\.[0-9a-f]{8}\.part)?|__pycache__/[^/]+\.pyc")


def refuse_other_results(root: Path) -> None:
    """Refuse a folder of `export` or `pareto` where one model belongs, quantized or float.

    Raises:
        ArtifactError: It is one; says what takes it.
    """
    if is_export(root):
        raise ArtifactError(
            f"{root} is an exported pipeline, which keeps its programs alone: draw with python "
            f"{root / 'run.py'}, read its numbers with mpqdm-fx report {root}, judge it with "
            f"the gates of mpqdm-fx export"
        )
    if _is_of(root, PARETO_MANIFEST):
        raise ArtifactError(
            f"{root} holds the budgets of mpqdm-fx pareto; give {root / 'picked'}, the result that "
            f"--pick makes"
        )


def holds_result(root: Path) -> bool:
    """Whether a folder is one that this package wrote."""
    return (root / MANIFEST).exists() or any(_is_of(root, name) for name in _FORMATS)


def is_export(root: Path) -> bool:
    """Whether a folder is an exported pipeline."""
    return _is_of(root, EXPORT_MANIFEST)


def _is_of(root: Path, manifest: str) -> bool:
    """Whether a folder has a manifest of ours; others may have a file of that name."""
    try:
        return (root / manifest).is_file() and (
            read_json(root / manifest).get("format") == _FORMATS[manifest]
        )
    except ArtifactError:
        return False


def seal_folder(root: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write a folder's manifest: all its files with their hashes, and its own digest.

    Args:
        root: The folder.
        manifest: Content; by default that of the manifest that is there.

    Returns:
        What was written.
    """
    path = root / MANIFEST
    content = read_json(path) if manifest is None else manifest
    sealed = seal({**content, "files": listed_files(root, MANIFEST)})
    write_text(path, json.dumps(sealed, separators=(",", ":"), allow_nan=False))
    return sealed


def listed_files(root: Path, manifest: str) -> dict[str, Any]:
    """All files of a folder but its manifest and what running it leaves, as manifests list them."""
    entries = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name != manifest and not _MADE_BY_RUNNING.fullmatch(name):
            entries[name] = Entry.of(path).to_dict()
    return entries


def check_target(output: str | Path, manifest: str = MANIFEST, *, overwrite: bool = False) -> Path:
    """Check that a folder can be written or replaced.

    Args:
        output: The folder.
        manifest: File by which a folder that this package wrote is known.
        overwrite: Whether a folder that this package wrote may be replaced.

    Raises:
        ArtifactError: `output` is a file, holds something that this package did not write, or is a
            result and is not to be overwritten; or this process works in it, or its name is too
            long.
    """
    target = Path(output)
    check_name_length(target)
    if Path.cwd().is_relative_to(target.resolve()):
        raise ArtifactError(
            f"{target} is the current folder, or holds it, and it is replaced as a whole; give "
            f"another folder"
        )
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file; give a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return target
    if not (target / manifest).exists():
        raise ArtifactError(
            f"{target} exists and holds other files ({manifest} is missing); give a new folder"
        )
    data = read_json(target / manifest)
    foreign = _foreign_files(target, manifest, data.get("files"))
    if foreign and manifest == MANIFEST and _is_older(data):  # which may well be its own
        raise ArtifactError(
            f"{target} was written by an older version, which does not list all of its files; it "
            f"is left as it is; move it, or quantize again into a new folder"
        )
    if foreign:
        raise ArtifactError(
            f"{target} holds files that are not of its result: {', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}; it is not replaced; move them, or give a new "
            f"folder"
        )
    if not overwrite:
        raise ArtifactError(
            f"{target} holds a result; give another folder, or say that it may be replaced "
            f"(overwrite=True)"
        )
    return target


def _is_older(data: Mapping[str, Any]) -> bool:
    """Whether a manifest is of a version that did not list all files."""
    version = data.get("version")
    return data.get("format") == FORMAT and type(version) is int and 1 <= version < FIRST_SEALED


def _foreign_files(root: Path, manifest: str, listed: Any) -> list[str]:
    """Files of a folder that its manifest does not list."""
    names = {manifest, *(listed if isinstance(listed, Mapping) else ())}
    foreign = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        plain_folder = path.is_dir() and not path.is_symlink()
        if not (plain_folder or name in names or _MADE_BY_RUNNING.fullmatch(name)):
            foreign.append(name)
    return foreign


@contextlib.contextmanager
def staged_directory(
    output: str | Path, manifest: str = MANIFEST, *, overwrite: bool = False
) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its place if the block ends well.

    Args:
        output: The folder to appear. An older one is replaced whole, in one step.
        manifest: File by which such an older one is known.
        overwrite: Whether there may be an older one.

    Raises:
        ArtifactError: As `check_target`.
    """
    target = check_target(output, manifest, overwrite=overwrite)
    with staged_folder(target) as stage:
        yield stage
