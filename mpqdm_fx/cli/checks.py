"""What a command checks before its first second of work: paths, packages, devices, space."""

import importlib.util
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mpqdm_fx.backends.kernel_library import require_kernels
from mpqdm_fx.backends.names import PROGRAMS, Backend, Kernels, may_call_own_kernels
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.files import checkpoint_of
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.io.space import existing_folder
from mpqdm_fx.io.system_errors import REMEDIES, check_name_length
from mpqdm_fx.sources.model_names import BUNDLED, check_name

__all__ = [
    "EXTRAS",
    "check_backend",
    "check_device",
    "check_name",
    "check_output_file",
    "check_output_folder",
    "check_packages",
    "check_writable",
    "has_program",
    "has_text_encoder",
    "is_installed",
    "is_result",
    "origin_of",
]

EXTRAS: Mapping[str, str] = {
    "executorch": "executorch",
    "transformers": "pipelines",
    "torchmetrics": "report",
    "sklearn": "report",
    "matplotlib": "report",
    "jinja2": "report",
}
"""Optional packages, by the extra of this package that brings them."""


def check_output_folder(
    output: Path,
    *reads: str | Path | None,
    option: str = "--output",
    resumable: bool = True,
) -> None:
    """Refuse a folder that cannot be written, or whose replacing would take what the command reads.

    Args:
        output: The folder to appear.
        reads: Files and folders that the command reads, or names of bundled models.
        option: How it was typed.
        resumable: Whether an unfinished run is kept beside it.

    Raises:
        ConfigError: It is a file, the current folder or one above it, one that the command reads,
            or its parent cannot be written.
        ArtifactError: Its name is too long.
    """
    check_name_length(output, f"{option} {output}")
    target = output.resolve()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{option} {output}: this is a file; give a folder's name")
    if Path.cwd().is_relative_to(target):
        raise ConfigError(
            f"{option} {output}: this is the current folder, or holds it, and it is replaced as a "
            f"whole; start from another folder, or give another name"
        )
    for read in reads:
        if read is None or str(read) == BUNDLED or not Path(read).exists():
            continue
        place = Path(read).resolve()
        if target.is_relative_to(place) or place.is_relative_to(target):
            raise ConfigError(
                f"{option} {output}: what is read, {read}, is this folder, or one lies in the "
                f"other; give another folder"
            )
    folder = checkpoint_of(output) if resumable else target
    check_writable(target.parent, f"{option} {output}", prefix=f"{folder.name}.stage")
    if resumable and folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"{option} {output}: {folder} is in the way, where an unfinished run is kept; move it"
        )


def check_output_file(
    path: Path | None,
    option: str,
    *,
    reads: Iterable[str | Path] = (),
    replaced: Path | None = None,
    suffixes: Sequence[str] = (),
    overwrite: bool = True,
) -> None:
    """Refuse a file that cannot be written.

    Args:
        path: The file; None is none.
        option: How it was typed.
        reads: Folders that the command reads: what lies in them is not written over.
        replaced: Folder that the command replaces: nothing else can be kept there.
        suffixes: Endings, of which it must have one; nothing is any.
        overwrite: Whether one that is there may be replaced.

    Raises:
        ConfigError: It is a folder or no plain file, has another ending, is there and is not to
            be replaced, is a file of what is read, lies in a folder of `quantize`, or its parent
            cannot be written.
    """
    from mpqdm_fx.io.folders import holds_result

    if path is None:
        return
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no plain file"
        raise ConfigError(f"{option} {path}: this is {kind}; give a file's name")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} {path}: give a name that ends in {' or '.join(suffixes)}")
    for read in reads:
        if path.exists() and path.resolve().is_relative_to(Path(read).resolve()):
            raise ConfigError(f"{option} {path}: a file of {read}, which is read; give another")
    if path.exists() and not overwrite:
        raise ConfigError(
            f"{option} {path}: it is there; give another name, or say that it may be replaced "
            f"(--overwrite)"
        )
    for folder in (place := path.parent.resolve(), *place.parents):
        if holds_result(folder):  # a file more, and the folder would not be replaced
            raise ConfigError(
                f"{option} {path}: {folder} holds a result and no other files; keep the file "
                f"outside"
            )
    if replaced is not None:
        for folder in (replaced, checkpoint_of(replaced)):
            if path.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(
                    f"{option} {path}: {folder} is made and replaced as a whole; keep the file "
                    f"outside"
                )
    check_writable(path.resolve().parent, f"{option} {path}", prefix=path.name)


def check_writable(folder: Path, typed: str, *, prefix: str = "mpqdm-fx") -> None:
    """Refuse a folder in which nothing can be made, by making something.

    Args:
        folder: The folder, there or to be made.
        typed: What was typed, for the message.
        prefix: Name of what will be made there; its length counts.

    Raises:
        ConfigError: It is below a file, or the system refuses.
    """
    parent = existing_folder(folder)
    if not parent.is_dir():
        raise ConfigError(f"{typed}: {parent} is a file; give a path below a folder")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{prefix}-", dir=parent):
            pass
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "give another place, or change its permissions")
        raise ConfigError(
            f"{typed}: {parent} cannot be written: {error.strerror}; {remedy}"
        ) from None


def check_packages(*packages: str, purpose: str) -> None:
    """Refuse a command whose optional packages are not installed.

    Args:
        packages: Import names.
        purpose: What they are for.

    Raises:
        ConfigError: One is missing; says what to install.
    """
    for package in packages:
        if not is_installed(package):
            raise ConfigError(
                f"{purpose} needs {package}, which is not installed: "
                f'pip install "mpqdm-fx[{EXTRAS[package]}]"'
            )


def check_backend(backend: Backend, kernels: Kernels = "auto") -> None:
    """Refuse a command that has to run the program that it writes, where it cannot be run.

    Args:
        backend: What is written.
        kernels: Which layers own kernels run.

    Raises:
        ConfigError: ExecuTorch is not installed.
        LoweringError: The library of own kernels is not installed, or does not load.
    """
    if backend in PROGRAMS:
        check_packages("executorch", purpose=f"--backend {backend}")
    if may_call_own_kernels(backend, kernels):
        require_kernels()


def is_installed(package: str) -> bool:
    """Whether a package can be imported, by its import name; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it was taken out of this process
        return False


def check_device(device: str | None) -> None:
    """Refuse a device that torch does not have here, by using it.

    Args:
        device: As typed, for example `cuda:1`; None is none.

    Raises:
        ConfigError: No such device, or one that holds no values.
    """
    import torch

    if device is None:
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--device {device}: torch cannot compute there: {first}; leave the option out to "
            f"compute on the CPU"
        ) from None


def is_result(name: str | Path) -> bool:
    """Whether a name is a folder of `quantize`."""
    from mpqdm_fx.io.folders import MANIFEST

    return (Path(name) / MANIFEST).exists()


def has_program(folder: str | Path) -> bool:
    """Whether a folder of `quantize` holds a program, plain or compressed."""
    return any((Path(folder) / name).is_file() for name in ("unet.pte", "unet.pte.xz"))


def has_text_encoder(pipeline: str | Path) -> bool:
    """Whether a pipeline folder has parts of transformers; one that is none has not."""
    index = Path(pipeline) / "model_index.json"
    return index.is_file() and "transformers" in json.dumps(read_json(index))


def origin_of(folder: Path) -> str | None:
    """The float model's name that a folder of `quantize` holds; None if it holds none."""
    source = folder / "source.json"
    return str(read_json(source).get("model")) if source.is_file() else None
