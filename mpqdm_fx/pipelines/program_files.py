"""The programs of a folder that `mpqdm-fx export` wrote: what there is, and how one is run.

This file is copied into that folder, beside `run.py`, and needs no other file of the package.
"""

import copy
import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["MANIFEST", "VERSION", "ProgramFiles", "RunnerError"]

MANIFEST = "pipeline.json"
#: Of the manifest. Version 1 had a file for each part and size, with one method each; version 2 had
#: no weights in files of their own and no compressed files.
VERSION = 3


class RunnerError(ValueError):
    """The folder or what was asked for cannot be used; says why."""


class ProgramFiles:
    """A folder of programs; each is loaded when it is first run.

    A compressed one is expanded then, once, to a hidden file beside it.

    Args:
        folder: Folder written by `mpqdm-fx export`.
        verify: Compare every file's checksum with the manifest's.

    Attributes:
        manifest: The content of `pipeline.json`.

    Raises:
        RunnerError: The folder is not whole, or written by a newer version.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder, verify)
        self._programs: dict[str, Any] = {}
        self._methods: dict[tuple[str, str], Any] = {}

    def has(self, part: str, size: tuple[int, int] | None = None) -> bool:
        """Whether a part has a method for an image size; None: one for images of any size."""
        return self._find(part, size) is not None

    def run(
        self, part: str, size: tuple[int, int] | None, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run one method.

        Args:
            part: The part of the pipeline.
            size: Height and width of the image in pixels; None for a method that takes any.
            inputs: Tensors by name; those that the method does not take are passed over.

        Returns:
            Outputs by name.

        Raises:
            RunnerError: There is no such method, or an input is missing or of another shape.
        """
        entry = self._find(part, size)
        if entry is None:
            raise RunnerError(f"{self.folder / MANIFEST} names no method of {part} for {size}")
        values = []
        for spec in entry["inputs"]:
            if spec["name"] not in inputs:
                raise RunnerError(f"{part}: its program takes {spec['name']}, which is missing")
            value = inputs[spec["name"]].to(getattr(torch, spec["dtype"])).contiguous()
            if list(value.shape) != list(spec["shape"]):
                raise RunnerError(
                    f"{part}: {spec['name']} has shape {list(value.shape)}, its program takes "
                    f"{spec['shape']}"
                )
            values.append(value)
        names = [spec["name"] for spec in entry["outputs"]]
        return dict(zip(names, self._load(entry).execute(values), strict=True))

    def _find(self, part: str, size: tuple[int, int] | None) -> Any:
        for entry in self.manifest["methods"]:
            if entry["part"] == part and entry["size"] == (list(size) if size else None):
                return entry
        return None

    def _load(self, entry: Mapping[str, Any]) -> Any:
        key = (entry["file"], entry["method"])
        if key not in self._methods:
            if key[0] not in self._programs:
                self._programs[key[0]] = self._open(entry["file"], entry.get("weights"))
            self._methods[key] = self._programs[key[0]].load_method(key[1])
        return self._methods[key]

    def _open(self, file: str, weights: str | None) -> Any:
        if weights is not None:
            return _WithWeights(self._plain(file), self._plain(weights))
        from executorch.runtime import Runtime, Verification

        return Runtime.get().load_program(self._plain(file), verification=Verification.Minimal)

    def _plain(self, file: str) -> Path:
        """What runs: a compressed file's content, under the name that the package gives it too."""
        path = self.folder / file
        if path.suffix != ".xz":
            return path
        plain = path.with_name(f".{path.stem}.{self.manifest['files'][file]['sha256'][:16]}")
        if not plain.is_file():
            partial = plain.with_name(f"{plain.name}.{os.getpid()}.part")
            try:
                with lzma.open(path) as packed, partial.open("wb") as expanded:
                    shutil.copyfileobj(packed, expanded, 1 << 20)
                partial.replace(plain)
            except (lzma.LZMAError, EOFError, OSError) as error:
                raise RunnerError(f"{path} cannot be expanded beside it: {error}") from None
            finally:
                partial.unlink(missing_ok=True)
        return plain


class _WithWeights:
    """A program whose weights are in a file of their own, and its methods.

    ExecuTorch's public `Runtime` takes no such file (1.4.1); this is what it is made of.
    """

    def __init__(self, program: Path, weights: Path) -> None:
        from executorch.extension.pybindings.portable_lib import _load_for_executorch

        self._module = _load_for_executorch(str(program), str(weights))
        self._method = "forward"

    def load_method(self, name: str) -> "_WithWeights":
        method = copy.copy(self)
        method._method = name
        return method

    def execute(self, values: list[Tensor]) -> Any:
        return self._module.run_method(self._method, values)


def _read_manifest(folder: Path, verify: bool) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunnerError(f"{folder} was not written by mpqdm-fx export: {error}") from None
    except ValueError as error:
        raise RunnerError(f"{path} is damaged: {error}") from None
    if manifest.get("version", VERSION + 1) > VERSION:
        raise RunnerError(f"{path} was written by a newer version of mpqdm-fx")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise RunnerError(f"{file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise RunnerError(
                f"{file} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            )
        if verify and _sha256(file) != expected["sha256"]:
            raise RunnerError(f"{file} is damaged: its checksum differs from the manifest's")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
