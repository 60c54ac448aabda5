"""A folder whose model stays what it was: copied, with one more record in its summary."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.folders import MANIFEST, seal_folder, staged_directory
from mpqdm_fx.model.folder import ModelFolder
from mpqdm_fx.model.summary import read_summary, write_summary
from mpqdm_fx.sources.denoisers import SOURCE

__all__ = ["copy_folder"]


def copy_folder(
    folder: ModelFolder,
    output: Path,
    *,
    more: Mapping[str, Any],
    origin: str | None = None,
    overwrite: bool = False,
    retell: Callable[[Path, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Copy a folder's listed files, each compared with its hash, and seal the copy.

    Args:
        folder: The folder; it is not changed.
        output: Folder; it appears whole or not at all.
        more: Further numbers for the summary, plain JSON types.
        origin: Where the float model is now; None leaves what the folder says.
        overwrite: Whether `output` may be a result that is replaced.
        retell: Called with the copy and its summary, to write its report anew.

    Returns:
        The summary, plain JSON types.

    Raises:
        ArtifactError: A file is not what was written, or `output` cannot be replaced.
    """
    summary = {**read_summary(folder), **more}
    with staged_directory(output, overwrite=overwrite) as stage:
        for name in (*folder.files.entries, MANIFEST):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            if name == MANIFEST:
                shutil.copyfile(folder.root / name, stage / name)
                continue
            with folder.files.opened(name) as path:
                shutil.copyfile(path, stage / name)
        if origin is not None:
            source = {**folder.files.read_json(SOURCE), "model": origin}
            write_text(stage / SOURCE, json.dumps(source))
        if retell is not None:
            retell(stage, summary)
        sizes = {name: (stage / name).stat().st_size for name in summary["files"]}
        summary["files"] = sizes
        write_summary(stage, summary)
        seal_folder(stage)
    return summary
