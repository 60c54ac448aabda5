"""Runs that were not finished: what a folder says of its run, and who may go on with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.exchange import sweep_leftovers
from mpqdm_fx.io.files import first_difference, is_empty_but_for_hidden, write_text
from mpqdm_fx.io.schema import plain
from mpqdm_fx.io.sealed import digest_of, read_json
from mpqdm_fx.io.system_errors import writing

__all__ = ["UnfinishedRun", "refuse_another_run", "refuse_foreign_folder"]


class UnfinishedRun:
    """A folder that says what run it is of; made if it is not there.

    Args:
        directory: The folder.
        header: Name of the file that says what run it is.
        identity: What the run is: settings, model, data, versions; plain JSON types.
        resume: Go on with what is there.
        solved: Pattern of what is solved already; without any, there is nothing to resume.

    Attributes:
        directory: The folder.
        digest: SHA-256 of the identity, which every file of the run carries.

    Raises:
        ConfigError: The folder holds another run (the first difference is named), or `resume` is
            False and something is solved.
        ArtifactError: The folder is damaged, or none of a run.
    """

    def __init__(
        self,
        directory: Path,
        header: str,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        solved: str = "*",
    ) -> None:
        self.directory = directory
        sweep_leftovers(directory)
        content = plain(identity)
        self.digest = digest_of(content)
        if self.check(directory, header, content, resume=resume, solved=solved, whole=True):
            return
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            write_text(
                directory / header, json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
            )

    @staticmethod
    def check(
        directory: Path,
        header: str,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        solved: str,
        whole: bool = False,
    ) -> bool:
        """Whether there is a run to go on with; nothing is written.

        Args:
            directory: The folder.
            header: As of the class.
            identity: What the header must say.
            resume: As of the class.
            solved: As of the class.
            whole: Whether the header must say nothing else.

        Raises:
            ConfigError, ArtifactError: As of the class.
        """
        path = directory / header
        refuse_foreign_folder(directory, header)
        if not path.is_file():
            return False
        content = read_json(path, fix="delete the folder to start anew")
        kept = content if whole else {key: content.get(key) for key in identity}
        refuse_another_run(directory, kept, identity)
        if not resume and any(file.name != header for file in directory.glob(solved)):
            raise ConfigError(
                f"{directory} holds a run that was not finished; resume it, or delete it"
            )
        return True


def refuse_another_run(
    place: Path, content: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Refuse to go on with a run of something else.

    Args:
        place: Where it lies, for the message.
        content: What it says of itself, plain JSON types.
        identity: What is to be done.

    Raises:
        ConfigError: They differ; the first difference is named.
    """
    difference = first_difference(content, plain(identity))
    if difference:
        raise ConfigError(
            f"{place} holds an unfinished run with other settings: {difference}; use what it was "
            f"started with, or delete it"
        )


def refuse_foreign_folder(directory: Path, header: str) -> None:
    """Refuse a folder of somebody else's where a run would be kept: it goes when that is through.

    What a killed run left is known by its names: files that were not whole yet.

    Args:
        directory: The folder.
        header: File that a run has there.

    Raises:
        ArtifactError: It is there, holds something, and no run.
    """
    if not directory.exists() or (directory / header).is_file():
        return
    if not (directory.is_dir() and is_empty_but_for_hidden(directory)):
        raise ArtifactError(
            f"{directory} is in the way: it holds no {header} that says what run it is of; move or "
            f"delete it"
        )
