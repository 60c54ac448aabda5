"""The folder beside an export in which finished programs wait for the rest."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mpqdm_fx.backends.compressed import SUFFIX, compress_program
from mpqdm_fx.backends.xnnpack.runner import stored_files
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.exchange import remove_folder
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.schema import Format, Name, Strict, plain, read_as
from mpqdm_fx.io.sealed import Entry, SealedFolder, seal
from mpqdm_fx.io.unfinished import UnfinishedRun
from mpqdm_fx.pipelines.parts import Part

__all__ = ["HEADER", "WorkFolder", "read_forms"]

HEADER = "export.json"
"""File that says what a run is."""

_FORMS = "finished.json"


class _Finished(Strict):
    """What the folder keeps of a finished program."""

    stored_as: ClassVar[Format] = Format(sealed_from=1)

    run: str
    program: Name
    methods: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    quality: dict[str, Any]
    report: dict[str, Any]
    files: Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=2)]


class _Form(Strict):
    """What a part must be like to be started from; see `Part`."""

    settings: str
    shapes: dict[str, tuple[int, ...]]


class _Forms(Strict):
    """What a folder says of a run that is through."""

    stored_as: ClassVar[Format] = Format(sealed_from=1)

    parts: dict[Name, _Form]


def read_forms(directory: Path) -> dict[str, Any]:
    """Settings and shapes of the parts of a finished run, `WorkFolder.keep`.

    Args:
        directory: The run's folder.

    Raises:
        ArtifactError: The run was not finished, or the file is damaged.
    """
    if not (directory / _FORMS).is_file():
        raise ArtifactError(
            f"{directory} holds a run that was not finished: {_FORMS} is missing; go on with that "
            f"run first"
        )
    forms = read_as(_Forms, directory / _FORMS, fix="run anew the export that it is of")
    return {name: plain(form.model_dump()) for name, form in forms.parts.items()}


class WorkFolder:
    """Finished programs of an export, and solved layers of the part that is being quantized.

    Args:
        directory: The folder; made if it is not there.
        identity: What the run is: models, settings, sizes, versions; plain JSON types.
        resume: Go on with what is there. Otherwise a folder with a run is refused.
        remedy: What makes a program anew once its record is deleted; ends messages.

    Attributes:
        directory: The folder.
        run: SHA-256 of the identity, which every record of the run carries.

    Raises:
        ConfigError: The folder holds another run (the difference is named), or a run and `resume`
            is False.
        ArtifactError: The folder is damaged, or none of an export.
    """

    def __init__(
        self,
        directory: Path,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        remedy: str = "resume",
    ) -> None:
        if (directory / _FORMS).is_file() and not resume:
            raise ConfigError(
                f"{directory} holds the run of an export whose parts are finished; give another "
                f"folder, resume it, or delete it"
            )
        run = UnfinishedRun(directory, HEADER, identity, resume=resume)
        self.directory, self.run = run.directory, run.digest
        self._remedy = remedy

    def path(self, program: str) -> Path:
        """Where a program's file goes."""
        return self.directory / f"{program}.pte"

    def finished(self, program: str) -> dict[str, Any] | None:
        """The record of a finished program, or None if it was not finished.

        Raises:
            ArtifactError: The record or one of the program's files is not what was written, or of
                another run.
        """
        path = self._record(program)
        if not path.is_file():
            return None
        record = self._read(program)
        if (record.run, record.program) != (self.run, program):
            raise ArtifactError(
                f"{path} is of {record.program} in another run than {HEADER} beside it; delete it "
                f"and {self._remedy}"
            )
        with self._remedied(program):
            self._files(program, record.files).check()
        return {
            "methods": list(record.methods), "quality": record.quality, "report": record.report
        }  # fmt: skip

    def finish(self, program: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the record of a program whose files are written.

        Args:
            program: The program.
            record: Its `methods`, its `quality` and what the `report` needs, plain JSON types.

        Returns:
            The record as `finished` gives it.
        """
        files = {path.name: Entry.of(path).to_dict() for path in stored_files(self.path(program))}
        content = {**plain(record), "run": self.run, "program": program, "files": files}
        _write(self._record(program), seal(content))
        return {key: content[key] for key in ("methods", "quality", "report")}

    def _record(self, program: str) -> Path:
        return self.path(program).with_suffix(".json")

    def _read(self, program: str) -> _Finished:
        fix = f"delete this file and {self._remedy}"
        return read_as(_Finished, self._record(program), fix=fix)

    def _files(self, program: str, files: Mapping[str, Any]) -> SealedFolder:
        """The files of a program, as they were when it was finished."""
        path = self._record(program)
        sealed = SealedFolder(self.directory, files, path)
        stored = {file.name for file in stored_files(self.path(program))}
        if stored != set(files):
            raise ArtifactError(
                f"{path} is of {', '.join(sorted(files))}, and beside it lie "
                f"{', '.join(sorted(stored)) or 'none'}"
            )
        return sealed

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
        record = self._read(program)
        expanded = {}
        with self._remedied(program):
            sealed = self._files(program, record.files)
            for name, entry in sealed.entries.items():
                with sealed.opened(name) as path:
                    if compress:
                        packed = compress_program(path, folder / f"{name}{SUFFIX}")
                        expanded[packed.name] = entry.to_dict()
                    else:
                        _link(self.directory / name, folder / name, opened=path)
        return expanded

    @contextlib.contextmanager
    def _remedied(self, program: str) -> Iterator[None]:
        """Say what to do about a file of a program that is not what was written."""
        try:
            yield
        except ArtifactError as error:
            raise ArtifactError(
                f"{error}; delete {self._record(program)} and {self._remedy}, and it is made anew"
            ) from None

    def take(self, other: "WorkFolder", program: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Take the files of a program that another run finished, and its solved layers.

        Args:
            other: The run that has it.
            program: The program.
            record: As of `finish`.

        Returns:
            As of `finish`.

        Raises:
            ArtifactError: A file is not what was written.
        """
        layers = self.directory / program
        for path in stored_files(self.path(program)):  # of a run that was killed here
            path.unlink()
        remove_folder(layers)
        other.place(program, self.directory)
        if (other.directory / program).is_dir():
            shutil.copytree(other.directory / program, layers, copy_function=_link)
        return self.finish(program, record)

    def keep(self, parts: Iterable[Part]) -> None:
        """Say that all parts are finished, so that others can start from them.

        Args:
            parts: The pipeline's parts.
        """
        forms = {p.name: {"settings": p.settings_digest, "shapes": p.shapes} for p in parts}
        _write(self.directory / _FORMS, seal({"parts": forms}))

    def remove(self) -> None:
        """Delete the folder: the export is through."""
        remove_folder(self.directory)


def _link(source: str | Path, target: str | Path, *, opened: Path | None = None) -> None:
    """Put a file at another place too: no second copy where the disk can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(opened or source, target)


def _write(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False))
