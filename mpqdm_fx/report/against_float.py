"""What a report tells of a quantized model that needs its float model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import fx

from mpqdm_fx.bits.sensitivity_table import SensitivityTable
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.report.comparison import Comparison
from mpqdm_fx.report.gather import PartMeasurements, kurtosis_of, sensitivity_of
from mpqdm_fx.report.layer_levels import running_sqnr, sqnr_by_layer

__all__ = ["graph_of", "measured_of"]


def measured_of(
    quantized: QuantizedModel,
    name: str,
    calls: Iterable[Mapping[str, Any]],
    *,
    floats: fx.GraphModule,
    compared: Mapping[str, Comparison],
    sensitivity: str | Path | None = None,
) -> PartMeasurements:
    """What a report tells that needs the float model.

    Args:
        quantized: The model.
        name: What the user called the float model.
        calls: Held-out calls.
        floats: The float graph in the form that was quantized.
        compared: Outputs against the float model's: of `"quantized"`, and of `"backend"` where that
            is something else.
        sensitivity: File of the sensitivities, where there is one.
    """
    batches = list(calls)
    comparison = compared["quantized"]
    missing: dict[str, str] = {}
    names = [layer.name for layer in quantized.plan.layers]
    graph = graph_of(quantized)
    by_level = sqnr_by_layer(
        floats, graph, names, batches, comparison.levels, noise_argument=comparison.noise_argument
    )
    running = {} if comparison.levels else running_sqnr(floats, graph, names, batches)
    if not comparison.levels:
        missing["levels"] = f"{name} is told no noise level"
    table = None
    if sensitivity is not None and Path(sensitivity).is_file():
        table = SensitivityTable.load(sensitivity)
    elif quantized.settings.allocation != "measured":
        mode = quantized.settings.allocation
        missing["sensitivity"] = f'allocation="{mode}" measures none'
    return PartMeasurements(
        quantized=comparison,
        backend=compared.get("backend"),
        by_level=by_level,
        running=running,
        kurtosis=kurtosis_of(floats, quantized.plan),
        sensitivity={} if table is None else sensitivity_of(table, quantized.plan),
        missing=missing,
    )


def graph_of(quantized: QuantizedModel) -> fx.GraphModule:
    """A model's own graph."""
    graph = quantized.graph_module
    assert isinstance(graph, fx.GraphModule)
    return graph
