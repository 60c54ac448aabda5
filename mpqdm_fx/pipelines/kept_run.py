"""A finished export whose solved layers and programs were kept, for one that starts from it.

A part that is the same to the last bit is taken whole, its program too. Of a part that a LoRA or
further training has changed, layers of equal weights are taken (`RunOptions.start_from`).
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.files import checkpoint_of, first_difference
from mpqdm_fx.io.schema import plain
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.work_folder import HEADER, WorkFolder, read_forms
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.sweep.stored_run import shares_a_layer

__all__ = ["KeptRun", "layer_counts", "work_place"]

#: What `numbers` of an export's identity are, in order.
_NUMBERS = ("steps", "guidance", "trajectories", "batch_size", "minimum_sqnr_db")
_WHOLE = "taken whole from an earlier export, its program too"
_OTHERS = ("models", "start")  # what two runs may differ in
_REMEDY = "resume the export that keeps its run there"
_FIX = "run anew the export that it is of"


def work_place(target: Path, run: RunOptions) -> Path:
    """Where an export keeps finished parts and solved layers.

    Args:
        target: Folder to appear.
        run: Its `directory` is where they stay; without one they lie beside `target` until it is
            there.

    Raises:
        ConfigError: One of the folders lies in another one that is written or replaced.
        ArtifactError: What is to be started from is no finished run.
    """
    place = checkpoint_of(target) if run.directory is None else Path(run.directory)
    folders = {"output": target, "directory": place, "start_from": run.start_from}
    named = {name: Path(path) for name, path in folders.items() if path is not None}
    for (name, path), (other, folder) in itertools.permutations(named.items(), 2):
        if path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{name}={str(path)!r}: it lies in {other}={str(folder)!r}; give another folder"
            )
    if run.start_from is not None:
        _check_finished(Path(run.start_from))
    return place


def _check_finished(directory: Path) -> None:
    if not (directory / HEADER).is_file():
        raise ArtifactError(
            f"{directory} holds no run of an export: {HEADER} is missing; give the folder that an "
            f"export kept its run in"
        )
    read_forms(directory)


class KeptRun:
    """A finished run that an export starts from.

    Args:
        directory: `RunOptions.directory` of that export.
        identity: What this export is, as its `WorkFolder` has it.
        parts: The parts of this one.

    Attributes:
        work: Its finished programs.

    Raises:
        ConfigError: It has other settings or is of another model; the first difference is named.
        ArtifactError: The folder is none of a run, not finished, or damaged.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], parts: Iterable[Part]) -> None:
        _check_finished(directory)
        stored = _identity_in(directory)
        if difference := first_difference(_named(stored), plain(_named(identity))):
            raise ConfigError(
                f"{directory} is of an export with other settings: {difference}; ask for what it "
                f"was made with, or start from another run"
            )
        self.work = WorkFolder(directory, stored, resume=True, remedy=_REMEDY)
        self._quantized = stored["settings"] is not None
        self._same = {
            name for name, digest in identity["models"].items() if stored["models"][name] == digest
        }
        forms = read_forms(directory)
        if set(forms) != set(stored["models"]):
            raise ArtifactError(
                f"{directory} is damaged: its files say different parts of a pipeline; {_FIX}"
            )
        for part in parts:
            if part.name in self._same:
                self._record(part.name)
            else:
                self._check(part, forms[part.name])

    def is_same(self, part: str) -> bool:
        """Whether a part has the settings and tensors that it had, to the last bit."""
        return part in self._same

    def layers(self, part: str) -> Path | None:
        """Folder of a part's solved layers; None where none was quantized."""
        folder = self.work.directory / part
        return folder if folder.is_dir() else None

    def give(self, part: str, work: WorkFolder) -> dict[str, Any]:
        """Put a part that is the same into another export's folder, with its layers.

        Args:
            part: Its name.
            work: The other folder.

        Returns:
            Its record there: it took no time.

        Raises:
            ArtifactError: A file is missing, or not what was written.
        """
        record = self._record(part)
        report = {**record["report"], "seconds": 0.0}
        numbers = dict(report["numbers"])
        if "remarks" in numbers:
            numbers["remarks"] = [*numbers["remarks"], _WHOLE]
        counts = layer_counts(len(numbers.get("layers", ())), solved=0)
        return work.take(
            self.work,
            part,
            {
                **record,
                "quality": {**record["quality"], **counts},
                "report": {**report, "numbers": numbers},
            },
        )

    def _record(self, part: str) -> dict[str, Any]:
        """What the run says of a part that is the same; its files are checked."""
        record = self.work.finished(part)
        if record is None:
            raise ArtifactError(f"{self.work.directory} has no {part} that is finished; {_REMEDY}")
        return record

    def _check(self, part: Part, form: Mapping[str, Any]) -> None:
        """Refuse a part of another model, before anything is calibrated."""
        directory, fix = self.work.directory, "start from a run of this model"
        shapes = part.shapes
        if difference := first_difference(form["shapes"], shapes):
            raise ConfigError(
                f"{directory} is of another model: of {part.name} the shape of {difference}; {fix}"
            )
        if form["settings"] != part.settings_digest:
            raise ConfigError(
                f"{directory} is of another model: the modules of {part.name} have the same shapes "
                f"and other settings; {fix}"
            )
        folder = self.layers(part.name)
        if folder is None and self._quantized:
            raise ArtifactError(
                f"{directory} has no solved layers of {part.name}: the folder of that name is "
                f"gone; {_FIX}"
            )
        if folder is not None and not shares_a_layer(folder, part.module):
            raise ConfigError(
                f"{directory} is of another model: no layer of {part.name} has the weights that it "
                f"had there, so that there is nothing to take; leave start_from out"
            )


def _identity_in(directory: Path) -> dict[str, Any]:
    """What a folder says of its run; what is compared by name is there."""
    stored = dict(read_json(directory / HEADER, fix=_FIX))
    numbers, models = stored.get("numbers"), stored.get("models")
    whole = isinstance(models, dict) and "settings" in stored
    if not whole or not isinstance(numbers, list) or len(numbers) != len(_NUMBERS):
        raise ArtifactError(
            f"{directory / HEADER} is damaged, or of another version: it does not say all of what "
            f"the run is; {_FIX}"
        )
    return stored


def _named(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what may differ, its numbers by name."""
    named = {key: value for key, value in identity.items() if key not in _OTHERS}
    numbers = dict(zip(_NUMBERS, identity["numbers"], strict=True))
    return {**named, "parts": sorted(identity["models"]), "numbers": numbers}


def layer_counts(layers: int, *, solved: int) -> dict[str, int]:
    """How many layers of a part were taken from the run that an export starts from.

    Args:
        layers: All quantized layers; 0 of a part that stayed in float.
        solved: Those that were rounded in this export.
    """
    return {"layers_taken": layers - solved, "layers_solved": solved}
