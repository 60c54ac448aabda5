"""Folders of quantized models: opened with checks, and rewritten whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.exchange import staged_folder
from mpqdm_fx.io.folders import (
    GRAPH,
    MANIFEST,
    OUTPUTS,
    WEIGHTS,
    check_target,
    refuse_other_results,
    seal_folder,
)
from mpqdm_fx.io.schema import read_as
from mpqdm_fx.io.sealed import SealedFolder
from mpqdm_fx.model.manifest import Manifest

__all__ = ["ModelFolder", "open_folder", "rewritten_folder"]


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A folder of a quantized model.

    Attributes:
        root: The folder.
        manifest: Content of its `mpqdm.json`.
        files: Its files; each is hashed when it is used.
    """

    root: Path
    manifest: Manifest
    files: SealedFolder

    def require(self, name: str) -> None:
        """Refuse a folder that does not list a file; of an older version's, say that it is one.

        Args:
            name: The file.

        Raises:
            ArtifactError: The file is not listed.
        """
        if name not in self.files and self.manifest.proof is None:
            raise ArtifactError(
                f"{self.root} was written by an older version, which lists no {name}; quantize the "
                f"model again"
            )
        self.files.require(name)


def open_folder(directory: str | Path) -> ModelFolder:
    """Open a folder written by `save` or `mpqdm-fx quantize`.

    Sizes of all listed files are compared; a file is hashed when it is used.

    Raises:
        ArtifactError: The folder is missing, damaged or of a newer version; names file and field.
    """
    root = Path(directory)
    path = root / MANIFEST
    if not root.is_dir():
        raise ArtifactError(f"{root} is not a folder; give one that mpqdm-fx quantize wrote")
    if not path.exists():
        refuse_other_results(root)
        raise ArtifactError(f"{root} has no {MANIFEST}: it was not written by mpqdm-fx quantize")
    manifest = read_as(Manifest, path)
    files = SealedFolder(root, manifest.files, path)
    files.require(*((WEIGHTS,) if manifest.proof is None else (WEIGHTS, GRAPH, OUTPUTS)))
    return ModelFolder(root=root, manifest=manifest, files=files)


@contextlib.contextmanager
def rewritten_folder(root: Path) -> Iterator[Path]:
    """A stage that holds a folder's files already, and takes its place if the block ends well.

    Files are links to the old ones where the disk can do that: replace them, do not write into
    them. The folder is sealed anew.

    Args:
        root: Folder written by this package.

    Raises:
        ArtifactError: It holds files of others, which would become its own; a file is not what was
            written; or it is of an older version, which lists none.
    """
    check_target(root, overwrite=True)
    opened = open_folder(root)
    if opened.manifest.proof is None:
        raise ArtifactError(f"{root} was written by an older version; save it again first")
    opened.files.check()
    with staged_folder(root) as stage:
        shutil.copytree(root, stage, dirs_exist_ok=True, copy_function=_link)
        yield stage
        seal_folder(stage)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
