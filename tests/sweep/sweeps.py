"""Quantize small graphs with little data: what the tests of the sweep share."""

from typing import Any

from torch import fx

from mpqdm_fx.calibration.records import RecordedInputs
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sweep.finish import GraphQuantization, finish
from mpqdm_fx.sweep.start import start_sweep


def traced(model: Any, calls: list[dict[str, Any]]) -> tuple[fx.GraphModule, list[dict[str, Any]]]:
    """A traced graph, and the calls as it takes them."""
    graph_module = trace(model, calls[0])
    signature = graph_module.meta["signature"]
    return graph_module, [signature.normalize((), call) for call in calls]


def recorded(calls: list[dict[str, Any]]) -> RecordedInputs:
    """Records of calls."""
    records = RecordedInputs()
    for call in calls:
        records.append(call)
    return records


def settings_of(**settings: Any) -> MPQConfig:
    """Settings that make tests quick: few rows, one refinement; what the sweep made is kept."""
    quick = {
        "max_rows": 256,
        "refinements": 1,
        "allocation": "uniform",
        "judge": False,
        "slowdown": 1,
    }
    return MPQConfig(**{**quick, **settings})


def quantized(
    graph_module: fx.GraphModule, calls: list[dict[str, Any]], **settings: Any
) -> GraphQuantization:
    """Quantize a traced graph."""
    return finish(start_sweep(graph_module, recorded(calls), settings_of(**settings)))
