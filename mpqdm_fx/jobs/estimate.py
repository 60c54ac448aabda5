"""What a run would take."""

from mpqdm_fx.config import MPQConfig
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.models.sources import Source
from mpqdm_fx.stages import normalized
from mpqdm_fx.sweep.estimate import Estimate, estimate
from mpqdm_fx.validation import Bytes, Count, checked

__all__ = ["estimate_source"]


@checked
def estimate_source(
    source: Source,
    config: MPQConfig,
    *,
    calls: Count,
    batch_size: Count,
    max_memory: Bytes | None = None,
) -> Estimate:
    """What quantizing a source would take on this machine.

    Args:
        source: Model and scheduler.
        config: Settings.
        calls: Calibration calls.
        batch_size: Samples in each.
        max_memory: Bytes of activations held in memory.

    Raises:
        TraceError: The model cannot be traced.
    """
    graph_module = normalized(source.model, source.example_inputs, config)
    inputs = example_inputs(graph_module.meta["signature"], batch_size=batch_size)
    return estimate(graph_module, [inputs] * calls, config, max_memory=max_memory)
