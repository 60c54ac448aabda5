"""The programs of a folder that `mpqdm-fx export` wrote: what there is, and how one is run.

This file is copied into that folder, beside `run.py`, with what it imports of the package.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.backends.kernel_library import calls_own_operators, place_codes, require_kernels
from mpqdm_fx.errors import ArtifactError, LoweringError, MPQError, first_line
from mpqdm_fx.io.expansion import expand, expansion_path
from mpqdm_fx.io.sealed import Entry, SealedFolder, hashed_file, read_json, verified

__all__ = [
    "FORMAT",
    "LARGEST",
    "MANIFEST",
    "SCHEDULER",
    "VERSION",
    "ProgramFiles",
    "RunnerError",
    "check_settings",
    "refusals",
]

MANIFEST = "pipeline.json"
SCHEDULER = "scheduler/scheduler_config.json"
FORMAT = "mpqdm_fx.pipeline"
#: Of the manifest. Since version 7 a convention says what a scheduler is told beside its steps.
VERSION = 7

_NUMBER = (int, float)
_TENSOR = {"name": str, "shape": [int], "dtype": str}
#: What the manifest holds: a type, alternatives in a tuple, a list of one kind, exact keys.
_SHAPE: Mapping[str, Any] = {
    "format": str,
    "version": int,
    "versions": dict,
    "pipeline": str,
    "kind": str,
    "sizes": [[int]],
    "latents": {"channels": int, "scale": int},
    "convention": {
        "sample": str,
        "timestep": str,
        "time_scale": _NUMBER,
        "time_divisor": _NUMBER,
        "time_end": (*_NUMBER, None),
        "negated": bool,
        "even_sigmas": bool,
        "patch": (int, None),
        "packed": bool,
        "shifted": bool,
        "eta": (*_NUMBER, None),
        "max_shift": _NUMBER,
        "steps_shift": bool,
    },
    "defaults": {"steps": int, "guidance": _NUMBER, "numbers": dict},
    "settings": dict,
    "methods": [
        {
            "part": str,
            "size": ([int], None),
            "file": str,
            "weights": (str, None),
            "method": str,
            "inputs": [_TENSOR],
            "outputs": [_TENSOR],
            "four_bit_layers": int,
            "subgraphs": int,
            "undelegated": int,
            "program_sqnr_db": (*_NUMBER, str),
        }
    ],
    "parts": dict,
    "quantization": (dict, None),
    "timesteps": ([_NUMBER], None),
    "expanded": dict,
    "files": dict,
}
LARGEST = 1 << 14  # pixels of a side, steps, channels, latents of a sound
# c10::ScalarType, as the runtime reports it.
_SCALAR_TYPES = {
    "uint8": 0,
    "int8": 1,
    "int32": 3,
    "int64": 4,
    "float32": 6,
    "float64": 7,
    "bool": 11,
}


class RunnerError(ArtifactError):
    """What was asked for cannot be drawn with this folder; says why."""


#: What is imported when it is needed, and the package that has it.
_PACKAGES = {
    "PIL": "pillow",
    "diffusers": "diffusers",
    "executorch": "executorch",
    "transformers": "transformers",
}


@contextlib.contextmanager
def refusals(subject: str) -> Iterator[None]:
    """Tell in one line what a library refuses; each has errors of its own.

    Args:
        subject: What did not work; begins the message.

    Raises:
        RunnerError: The library raised whatever it was, or what is asked of it has no meaning.
    """
    try:
        yield
    except ArtifactError:
        raise
    except MPQError as error:
        raise RunnerError(f"{subject}: {first_line(error)}") from error
    except ImportError as error:
        package = _PACKAGES.get((error.name or "").partition(".")[0])
        fix = f"; pip install --upgrade {package}" if package else ""
        raise RunnerError(f"{subject}: {first_line(error)}{fix}") from error
    except Exception as error:
        raise RunnerError(f"{subject}: {type(error).__name__}: {first_line(error)}") from error


class ProgramFiles:
    """A folder of programs; each is loaded when it is first run.

    A file is hashed before it is used. A compressed one is expanded then, once, to a hidden file
    beside it.

    Args:
        folder: Folder written by `mpqdm-fx export`.
        verify: Hash all files at once.

    Attributes:
        manifest: The content of `pipeline.json`.
        files: Its files.

    Raises:
        ArtifactError: The folder is not whole, or written by another version.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.files = SealedFolder(self.folder, self.manifest["files"], self.folder / MANIFEST)
        used = {entry[key] for entry in self.manifest["methods"] for key in ("file", "weights")}
        self.files.require(SCHEDULER, *sorted(name for name in used if name is not None))
        if verify:
            self.files.check()
        self._programs: dict[str, Any] = {}
        self._methods: dict[tuple[str, str], Any] = {}

    def checked_folder(self, name: str) -> Path:
        """A folder in this one whose files are all there, right, and the only ones.

        Raises:
            ArtifactError: A file was changed, or does not belong there.
        """
        root = self.folder / name
        listed = {entry for entry in self.files.entries if entry.startswith(f"{name}/")}
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(self.folder).as_posix()
            if relative not in listed and not (path.is_dir() and not path.is_symlink()):
                raise ArtifactError(f"{path} is not listed in {MANIFEST}; move it elsewhere")
        if not listed:
            raise ArtifactError(f"{self.folder / MANIFEST} lists no file of {name}")
        for entry in listed:
            with self.files.opened(entry):
                pass
        return root

    def has(self, part: str, size: tuple[int, ...] | None = None) -> bool:
        """Whether a part has a method for a size; None: one for any size."""
        return self._find(part, size) is not None

    def run(
        self, part: str, size: tuple[int, ...] | None, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run one method.

        Args:
            part: The part of the pipeline.
            size: Of the image or the sound; None for a method that takes any.
            inputs: Tensors by name; those that the method does not take are passed over.

        Returns:
            Outputs by name.

        Raises:
            RunnerError: There is no such method, an input is missing or of another shape, the
                program fails, or ExecuTorch is not installed.
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
        with refusals(f"{part}: its program does not run"):
            return _Outputs(zip(names, self._load(entry).execute(values), strict=True))

    def _find(self, part: str, size: tuple[int, ...] | None) -> Any:
        for entry in self.manifest["methods"]:
            if entry["part"] == part and entry["size"] == (list(size) if size else None):
                return entry
        return None

    def _load(self, entry: Mapping[str, Any]) -> Any:
        key = (entry["file"], entry["method"])
        if key not in self._methods:
            if key[0] not in self._programs:
                self._programs[key[0]] = self._open(entry["file"], entry["weights"])
            self._methods[key] = self._method(self._programs[key[0]], entry)
        return self._methods[key]

    def _open(self, file: str, weights: str | None) -> Any:
        """A program; ExecuTorch gets no byte that was not hashed.

        What calls own operators is refused before it is loaded where their library is missing.
        """
        try:
            with contextlib.ExitStack() as stack:
                program = stack.enter_context(self._plain(file))
                self._require_kernels(program, file)
                from executorch.runtime import Runtime, Verification

                return Runtime.get().load_program(
                    program,
                    verification=Verification.InternalConsistency,
                    data_path=weights and stack.enter_context(self._plain(weights)),
                )
        except RuntimeError as error:
            raise ArtifactError(
                f"{self.folder / file} cannot be loaded by ExecuTorch: {first_line(error)}; it was "
                f"made by another version"
            ) from error

    def _require_kernels(self, program: Path, file: str) -> None:
        operator = calls_own_operators(program)
        if operator is not None:
            try:
                require_kernels(operator)
            except LoweringError as error:
                raise RunnerError(f"{self.folder / file}: {error}") from error

    def _method(self, program: Any, entry: Mapping[str, Any]) -> Any:
        where = f"{self.folder / entry['file']}: method {entry['method']!r}"
        if entry["method"] not in program.method_names:
            raise ArtifactError(f"{where} is not there")
        try:
            method = program.load_method(entry["method"])
        except RuntimeError as error:
            reason = first_line(error)
            raise ArtifactError(f"{where} cannot be loaded by ExecuTorch: {reason}") from error
        meta = method.metadata
        specs = [meta.input_tensor_meta(index) for index in range(meta.num_inputs())]
        taken = [(list(spec.sizes()), spec.dtype()) for spec in specs]
        named = [(spec["shape"], _SCALAR_TYPES.get(spec["dtype"])) for spec in entry["inputs"]]
        if taken != named or meta.num_outputs() != len(entry["outputs"]):
            raise ArtifactError(f"{where} takes or returns other tensors than {MANIFEST} says")
        return method

    @contextlib.contextmanager
    def _plain(self, file: str) -> Iterator[Path]:
        """What runs: a file, or a compressed one's content, which the package names alike."""
        with self.files.opened(file) as path:
            if not file.endswith(".xz"):
                yield path
                return
            content = self._content(file)
            named = self.folder / file
            target = expansion_path(named, self.files.entries[file].sha256)
            expand(path, target, content=content, name=named, complete=place_codes)
        with hashed_file(target, content) as path:
            yield path

    def _content(self, file: str) -> Entry:
        expanded = self.manifest["expanded"].get(file)
        if not _fits(expanded, {"bytes": int, "sha256": str}):
            raise ArtifactError(f"{self.folder / MANIFEST} does not say what {file} expands to")
        return Entry(**expanded)


class _Outputs(dict[str, Tensor]):
    """Outputs by name; one that is not there is an error that says so."""

    def __missing__(self, name: str) -> Tensor:
        raise ArtifactError(f"no program returns {name!r} among {', '.join(self)}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} was not written by mpqdm-fx export: it has no {MANIFEST}")
    data = read_json(path)
    version = data.get("version")
    if data.get("format") != FORMAT or type(version) is not int:
        raise ArtifactError(f"{path} is damaged: it is no manifest of an export")
    if version != VERSION:
        newer = "update mpqdm-fx" if version > VERSION else "its own run.py draws with it"
        raise ArtifactError(f"{path} has format version {version}, not {VERSION}; {newer}")
    manifest = verified(data, path)
    for key in sorted({*manifest, *_SHAPE}):
        if key not in manifest or not _fits(manifest[key], _SHAPE.get(key, ())):
            raise ArtifactError(f"{path} is damaged: {key!r} is not what it should be")
    if not _in_range(manifest):
        raise ArtifactError(f"{path} is damaged: a size, a number or a dtype is out of range")
    return manifest


def check_settings(settings: Mapping[str, Any], shape: Mapping[str, Any], folder: Path) -> None:
    """Refuse a manifest without what a loop must know.

    Args:
        settings: The manifest's.
        shape: Names and types: a type, or a tuple of alternatives.
        folder: The folder, for the message.

    Raises:
        ArtifactError: A setting is missing, too much, or of another type.
    """
    if not _fits(settings, shape):
        raise ArtifactError(f"{folder / MANIFEST} is damaged: 'settings' is not what it should be")


def _in_range(manifest: Mapping[str, Any]) -> bool:
    """Whether the numbers are such that nothing huge is made of them."""
    sizes, latents = manifest["sizes"], manifest["latents"]
    # a sound is as long as its latents are many, each of hundreds of samples
    numbers = [side for size in sizes if len(size) > 1 for side in size]
    scale = max(1, latents["scale"])
    numbers += [length // scale for size in sizes if len(size) == 1 for length in size]
    numbers += [*latents.values(), manifest["defaults"]["steps"]]
    whole = [value for value in manifest["settings"].values() if type(value) is int]
    specs = [
        spec for entry in manifest["methods"] for spec in (*entry["inputs"], *entry["outputs"])
    ]
    return (
        bool(sizes)
        and len({len(size) for size in sizes}) == 1
        and len(sizes[0]) in (1, 2)
        and all(1 <= number <= LARGEST for number in numbers)
        and latents["channels"] * max(math.prod(size) for size in sizes) <= LARGEST**2
        and all(abs(value) <= LARGEST for value in whole)
        and all(_fits(value, _NUMBER) for value in manifest["defaults"]["numbers"].values())
        and manifest["timesteps"] != []
        and all(spec["dtype"] in _SCALAR_TYPES for spec in specs)
    )


def _fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape of the kind of `_SHAPE`; bool is no int."""
    if isinstance(shape, tuple):
        return any(_fits(value, choice) for choice in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(entry, shape[0]) for entry in value)
    if isinstance(shape, Mapping):
        return (
            isinstance(value, dict)
            and set(value) == set(shape)
            and all(_fits(value[key], shape[key]) for key in shape)
        )
    return value is None if shape is None else type(value) is shape
