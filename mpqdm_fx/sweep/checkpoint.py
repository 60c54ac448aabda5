"""Solved layers on disk: a sweep that was killed goes on where it stopped, with the same bits."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.files import differences, replacing, write_text
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.plan import BitPlan
from mpqdm_fx.sweep.solve import LayerSolution

__all__ = ["HEADER", "Checkpoint"]

HEADER = "sweep.json"
"""File that says what a run is."""

_NUMBERS = ("alpha", "beta", "damping", "mismatch", "base_error", "error", "rows", "seconds")


class Checkpoint:
    """A folder with one file per solved layer.

    Args:
        directory: The folder; made if it is not there.
        identity: What the run is: settings, model, calibration data, versions; plain JSON types.
        resume: Go on with what is there. Otherwise a folder with solved layers is refused.

    Raises:
        ConfigError: The folder holds another run (the difference is named), or a run and `resume`
            is False.
        ArtifactError: The folder is damaged.
    """

    def __init__(
        self, directory: str | Path, identity: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        header = self.directory / HEADER
        if header.exists():
            self._compare(header, identity, resume)
        else:
            write_text(header, json.dumps(identity, indent=1, sort_keys=True))

    def _compare(self, header: Path, wanted: Mapping[str, Any], resume: bool) -> None:
        found = read_json(header, fix="delete the folder to start anew")
        different = [
            f"{key} was {old!r}, is {new!r}" for key, old, new in differences(found, wanted)
        ]
        if different:
            raise ConfigError(
                f"{self.directory} holds a run with other settings: {'; '.join(different)}; use "
                f"the settings it was started with, or another folder"
            )
        if not resume and any(self.directory.glob("layer-*.safetensors")):
            raise ConfigError(
                f"{self.directory} holds a run that was not finished; resume it, or delete it"
            )

    def load(self, name: str) -> LayerSolution | None:
        """The solution of a layer, or None if it was not solved yet.

        Raises:
            ArtifactError: Its file is damaged.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["solution"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            plan = BitPlan.from_dict(meta["plan"]).layers[0]
            numbers = {key: meta[key] for key in _NUMBERS}
            codes, scale = tensors["codes"], tensors["scale"]
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ArtifactError(
                f"{path} is damaged: {error}; delete this file and resume"
            ) from None
        return LayerSolution(
            plan=plan, codes=codes, scale=scale, bias=tensors.get("bias"), **numbers
        )

    def save(self, solution: LayerSolution) -> None:
        """Write a layer's solution: to a temporary file first, so that no half of it is ever seen.

        Args:
            solution: The solved layer.
        """
        tensors = {"codes": solution.codes.contiguous(), "scale": solution.scale.contiguous()}
        if solution.bias is not None:
            tensors["bias"] = solution.bias.detach().cpu().contiguous()
        meta = {key: getattr(solution, key) for key in _NUMBERS}
        meta["plan"] = BitPlan(layers=(solution.plan,)).to_dict()
        with replacing(self._path(solution.plan.name)) as part:
            save_file(tensors, part, metadata={"solution": json.dumps(meta)})

    def _path(self, name: str) -> Path:
        return self.directory / f"layer-{re.sub(r'[^A-Za-z0-9_.]', '_', name)}.safetensors"
