"""The folder beside an export in which finished programs wait for the rest."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.backends.xnnpack.compressed import SUFFIX, compress_program
from mpqdm_fx.backends.xnnpack.runner import stored_files
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.files import differences, write_text
from mpqdm_fx.io.sealed import Entry, read_json

__all__ = ["WorkFolder"]

_HEADER = "export.json"


class WorkFolder:
    """Finished programs of an export, and solved layers of the part that is being quantized.

    Args:
        directory: The folder; made if it is not there.
        identity: What the run is: models, settings, sizes, versions; plain JSON types.
        resume: Go on with what is there. Otherwise a folder with an unfinished run is refused.

    Raises:
        ConfigError: The folder holds another run (the difference is named), or a run and `resume`
            is False.
        ArtifactError: The folder is damaged, or none of an export.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.directory = directory
        header = directory / _HEADER
        if directory.exists() and not header.is_file():
            raise ArtifactError(f"{directory} is in the way and no export's; move or delete it")
        if header.is_file():
            found = read_json(header, fix="delete the folder to start anew")
            different = [key for key, _, _ in differences(found, identity)]
            if different:
                raise ConfigError(
                    f"{directory} holds an unfinished export with other {', '.join(different)}; "
                    f"use what it was started with, or delete it"
                )
            if not resume:
                raise ConfigError(
                    f"{directory} holds an export that was not finished; resume it, or delete it"
                )
            return
        directory.mkdir(parents=True)
        _write(header, identity)

    def path(self, program: str) -> Path:
        """Where a program's file goes."""
        return self.directory / f"{program}.pte"

    def finished(self, program: str) -> dict[str, Any] | None:
        """The record of a finished program, or None if it was not finished."""
        record = self.path(program).with_suffix(".json")
        if not record.is_file() or not self.path(program).is_file():
            return None
        return read_json(record, fix="delete this file and resume")

    def finish(self, program: str, record: Mapping[str, Any]) -> None:
        """Keep the record of a program whose file is written."""
        _write(self.path(program).with_suffix(".json"), record)

    def place(self, program: str, folder: Path, *, compress: bool = False) -> dict[str, Any]:
        """Put a program's files into another folder too.

        Args:
            program: The program.
            folder: The other folder.
            compress: Put compressed files there; plain ones are no second copy where the disk can
                do that.

        Returns:
            Size and hash of what each compressed file expands to.
        """
        expanded = {}
        for path in stored_files(self.path(program)):
            if compress:
                packed = compress_program(path, folder / f"{path.name}{SUFFIX}")
                expanded[packed.name] = Entry.of(path).to_dict()
                continue
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)
        return expanded

    def remove(self) -> None:
        """Delete the folder: the export is through."""
        shutil.rmtree(self.directory)


def _write(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1))
