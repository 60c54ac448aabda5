"""Peak memory of one part of a pipeline, measured in a process of its own.

`python -m mpqdm_fx.pipelines.memory FORM FOLDER PART INPUTS` prints the bytes by which loading the
part and running it once raises the peak of a process that has imported everything already.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.graph.nested import tensor_leaves
from mpqdm_fx.io.peak_memory import measured_apart, peak_rise
from mpqdm_fx.pipelines.families.controlnet import ControlResiduals
from mpqdm_fx.pipelines.families.flux_2 import NormalizedDecoder
from mpqdm_fx.pipelines.families.stable_audio import (
    DurationEncoder,
    SoundDecoder,
    StableAudioDenoiser,
)
from mpqdm_fx.pipelines.families.z_image_denoiser import ZImageDenoiser
from mpqdm_fx.pipelines.folder import load_part, part_class, read_index
from mpqdm_fx.pipelines.parts import (
    ImageDecoder,
    ImageEncoder,
    MaskedTextEncoder,
    TextEncoder,
)
from mpqdm_fx.pipelines.program_files import ProgramFiles

__all__ = ["COMPONENTS", "as_part", "main", "nested", "part_peak"]

#: Components of a pipeline that a part is made of.
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "text_encoder_3": ("text_encoder_3",),
    "duration_encoder": ("projection_model",),
    "controlnet": ("controlnet",),
    "denoiser": ("unet", "transformer"),
    "vae_decoder": ("vae", "vqvae"),
    "vae_encoder": ("vae",),
}
_WRAPPERS: Mapping[str, Callable[[Any], Any]] = {
    "controlnet": ControlResiduals,
    "duration_encoder": DurationEncoder,
    "vae_decoder": ImageDecoder,
    "vae_encoder": ImageEncoder,
}
#: Of components of these classes, whatever the part.
_OWN_WRAPPERS: Mapping[str, Callable[[Any], Any]] = {
    "AutoencoderKLFlux2": NormalizedDecoder,
    "AutoencoderOobleck": SoundDecoder,
    "StableAudioDiTModel": StableAudioDenoiser,
    "ZImageTransformer2DModel": ZImageDenoiser,
}


def part_peak(
    form: Literal["program", "float"], folder: Path, part: str, inputs: Mapping[str, Any]
) -> int | None:
    """Measure one part: its program, or its component as torch runs it.

    Args:
        form: `"program"` of an exported folder, or `"float"` of a pipeline's folder.
        folder: The folder.
        part: The part's name.
        inputs: Keyword arguments of one call, batch 1.

    Returns:
        Bytes above the imports; None where the system does not tell (no /proc).

    Raises:
        MPQError: The part could not be run.
    """
    with tempfile.TemporaryDirectory(prefix="mpqdm-fx-") as scratch:
        file = Path(scratch) / "inputs.safetensors"
        tensors = {name: value.contiguous() for name, value in tensor_leaves(dict(inputs))}
        save_file(tensors, file)
        return measured_apart(__name__, [form, str(folder), part, str(file)], f"{part} of {folder}")


def nested(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of a part's module from tensors by dotted names; numbers are places."""
    call: dict[str, Any] = {}
    for name, value in named.items():
        *path, last = name.split(".")
        place = call
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return {name: _with_tuples(value) for name, value in call.items()}


def _with_tuples(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    entries = {key: _with_tuples(entry) for key, entry in value.items()}
    if not all(key.isdecimal() for key in entries):
        return entries
    return tuple(entries[key] for key in sorted(entries, key=int))


def main(arguments: list[str]) -> None:
    """Load, run once, print the rise of the peak in bytes."""
    form, name, part, file = arguments
    inputs, folder = load_file(file), Path(name)
    if form == "program":
        require_executorch()
    else:
        component = _component(folder, part)
        part_class(folder, component)

    @torch.no_grad()
    def call() -> None:
        if form == "program":
            _run_program(ProgramFiles(folder), part, inputs)
        else:
            module = load_part(folder, component)
            as_part(part, module, inputs)(**nested(inputs))

    typer.echo(peak_rise(call))


def as_part(part: str, module: Any, inputs: Mapping[str, Tensor]) -> Any:
    """A component as a part is called.

    Args:
        part: The part's name.
        module: The component.
        inputs: Of one call, by dotted names.
    """
    if part.startswith("text_encoder"):
        # last hidden states or inner ones: the same memory; a head's logits are much more
        encoder = getattr(module, "base_model", module)
        return (MaskedTextEncoder if "attention_mask" in inputs else TextEncoder)(encoder)
    wrapper = _OWN_WRAPPERS.get(type(module).__name__, _WRAPPERS.get(part))
    return module if wrapper is None else wrapper(module)


def _component(folder: Path, part: str) -> str:
    index = read_index(folder)
    return next(name for name in COMPONENTS[part] if index.get(name) not in (None, [None, None]))


def _run_program(programs: ProgramFiles, part: str, inputs: dict[str, Tensor]) -> None:
    methods = [entry for entry in programs.manifest["methods"] if entry["part"] == part]
    sizes = [entry["size"] for entry in methods if entry["size"] is not None]
    if sizes and any(entry["size"] is None for entry in methods):  # once per image
        inputs = {**inputs, **programs.run(part, None, inputs)}
    programs.run(part, tuple(sizes[0]) if sizes else None, inputs)


if __name__ == "__main__":
    main(sys.argv[1:])
