"""How a run goes: where its files lie, what it may hold in memory, and where it computes."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.validation import Bytes, check_fields

__all__ = ["DEFAULT_RECORD_MEMORY", "RunOptions"]

DEFAULT_RECORD_MEMORY = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run goes, beside the settings: none of it changes what is asked of the result.

    Recording (`prepare`) reads the two fields that begin with `record`, solving (`convert`,
    `open_sweep`) the others, and what does both (`quantize`, `export_pipeline`) all of them.

    Attributes:
        record_memory: Bytes of recorded inputs held in memory; the rest goes to disk.
        record_directory: Where they go then: into a folder that is removed with the prepared model.
            By default in the system's place for temporary files.
        directory: Folder for solved layers and sensitivities: a run that was killed goes on there.
            It is apart from the one above, because it outlives the process. None keeps nothing.
        resume: Go on with what `directory` holds; the result has the same bits.
        activation_memory: Bytes of activations held in memory while layers are solved; the rest
            goes to disk. None holds all.
        half: Hold activations as float16 between layers.
        device: Where to compute, for example `"cuda"`; by default where the model is.
        sensitivity: File of the sensitivities, for `allocation="measured"`: read if it is there,
            else written. Another budget then takes seconds to solve.
        start_from: `directory` of a finished run with the same settings. Layers whose float weight
            and bias are that run's, bit for bit, have its codes; the others are solved, each with
            the bits that it had. Nothing is measured again but fixed ranges of activations.

    Raises:
        ConfigError: A field has a value that it cannot have, or two do not go together.
    """

    record_memory: Bytes = DEFAULT_RECORD_MEMORY
    record_directory: str | Path | None = None
    directory: str | Path | None = None
    resume: bool = False
    activation_memory: Bytes | None = None
    half: bool = False
    device: torch.device | str | None = None
    sensitivity: str | Path | None = None
    start_from: str | Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.start_from is None:
            return
        if self.sensitivity is not None:
            raise ConfigError(
                f"sensitivity={str(self.sensitivity)!r}: with start_from all bits are those of the "
                f"run in {self.start_from}; leave `sensitivity` out"
            )
        if self.directory is not None and Path(self.directory) == Path(self.start_from):
            raise ConfigError(
                f"start_from={str(self.start_from)!r}: this is `directory` too, where solved "
                f"layers are written; give another folder for these"
            )

    def inside(self, directory: Path) -> Self:
        """The same with solved layers in a folder that the job chooses.

        Args:
            directory: The folder.

        Raises:
            ConfigError: There is a `directory` already.
        """
        if self.directory is not None:
            raise ConfigError(
                f"directory={str(self.directory)!r}: this run keeps its solved layers in "
                f"{directory}; leave `directory` out"
            )
        return dataclasses.replace(self, directory=directory)
