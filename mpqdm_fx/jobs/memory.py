"""Peak memory of one denoising step, measured in a process of its own.

`python -m mpqdm_fx.jobs.memory FORM NAME` prints the bytes by which loading NAME and running one
step raises the peak of a process that has imported everything already.
"""

import sys
from contextlib import suppress
from pathlib import Path

import torch
import typer

from mpqdm_fx.backends.xnnpack.runner import require_executorch
from mpqdm_fx.errors import MPQError
from mpqdm_fx.graph.nested import first_row
from mpqdm_fx.io.classes import diffusers_class
from mpqdm_fx.io.peak_memory import measured_apart, peak_rise
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.sources.denoisers import open_denoiser

__all__ = ["import_classes", "main", "peak_memory"]


def peak_memory(
    form: str, name: str, subfolder: str | None = None, variant: str | None = None
) -> int | None:
    """Measure one form of a model.

    Args:
        form: `"pte"`, `"packed"` or `"float"`.
        name: A folder written by `quantize`, or a model's name.
        subfolder: Part of a pipeline folder.
        variant: Variant of the weight files.

    Returns:
        Bytes above the imports; None where the system does not tell (no /proc).
    """
    more = [subfolder or "", variant or ""]
    return measured_apart(__name__, [form, name, *more], name)


def import_classes(name: str, subfolder: str | None = None) -> None:
    """Import what a model's folder names, and what the bundled model needs.

    diffusers imports its classes when they are asked for; tens of MiB that are not the model's.

    Args:
        name: A folder or a model's name.
        subfolder: Part of a pipeline folder.
    """
    root = Path(name)
    files = [*root.glob("*config.json"), *root.glob("scheduler/*config.json")]
    if subfolder:
        files += root.glob(f"{subfolder}/*config.json")
    configs = [read_json(file, finite=False) for file in files]
    for class_name in ("UNet2DModel", *(config.get("_class_name") for config in configs)):
        with suppress(MPQError):  # who loads it says what is wrong
            diffusers_class("model", class_name)
    for class_name in ("DDIMScheduler", *(config.get("_class_name") for config in configs)):
        with suppress(MPQError):
            scheduler = diffusers_class("scheduler", class_name)
            scheduler.from_config(scheduler().config)  # it looks at all others when it is made


def main(arguments: list[str]) -> None:
    """Load, run one step, print the rise of the peak in bytes."""
    form, name, subfolder, variant = arguments
    import_classes(name, subfolder)
    if form == "pte":
        require_executorch()

    @torch.no_grad()
    def step() -> None:
        source, denoiser = open_denoiser(name, subfolder or None, form, variant or None)
        denoiser(**first_row(source.example_inputs))

    typer.echo(peak_rise(step))


if __name__ == "__main__":
    main(sys.argv[1:])
