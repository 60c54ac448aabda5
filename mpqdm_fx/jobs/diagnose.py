"""What XNNPACK would take of a model."""

from pathlib import Path

from mpqdm_fx.backends.xnnpack.doctor import Diagnosis, diagnose
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.folders import MANIFEST, open_folder
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.models.sources import load_with_calls
from mpqdm_fx.stages import normalized
from mpqdm_fx.storage import load

__all__ = ["diagnose_model"]


def diagnose_model(
    name: str,
    subfolder: str | None = None,
    variant: str | None = None,
    inputs: str | None = None,
) -> Diagnosis:
    """What XNNPACK would take of a model, at batch 1.

    Args:
        name: A float model (see `load_source`), or a folder written by `quantize`.
        subfolder: Part of a pipeline folder.
        variant: Variant of a float model's weight files.
        inputs: Calls of a float model, as of `load_with_calls`.

    Raises:
        LoweringError: ExecuTorch is missing, or an activation mode does not run.
    """
    if (Path(name) / MANIFEST).exists():
        quantized = load(Path(name))
        example = example_inputs(quantized.signature, batch_size=1)
        four_bit = (open_folder(name).manifest["program"] or {}).get("four_bit", "whole")
        return diagnose(quantized.rounded, example, quantized.ranges or None, four_bit=four_bit)
    source = load_with_calls(name, subfolder, variant, inputs)
    graph_module = normalized(source.model, source.example_inputs, MPQConfig())
    example = example_inputs(graph_module.meta["signature"], batch_size=1)
    return diagnose(graph_module, example)
