"""Whether a run can end well, told from the model alone, before any data is made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from mpqdm_fx.bits.allocate import layer_limits
from mpqdm_fx.bits.sensitivity_table import SensitivityTable
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.run.cost import walk_memory
from mpqdm_fx.sweep.build_lanes import two_lanes
from mpqdm_fx.sweep.measured_bits import check_budget

__all__ = ["check_feasible", "weights_of"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


def weights_of(model: nn.Module) -> int:
    """Weights of a model's convolutions, linear layers and embeddings; shared ones count once."""
    weights = {m.weight for m in model.modules() if isinstance(m, _LAYERS)}
    return sum(weight.numel() for weight in weights)


def check_feasible(
    model: nn.Module,
    inputs: Mapping[str, Any],
    config: MPQConfig,
    *,
    sensitivity: str | Path | None = None,
    max_memory: int | None = None,
    batch_size: int = 1,
) -> None:
    """Refuse what calibration or solving would refuse minutes later.

    The model is traced only if there is something to look up in its graph: a budget, a limit of
    memory, stored sensitivities, the argument of the noise level, or an override that is no layer's
    name in the model itself.

    Args:
        model: Float model; it is not changed.
        inputs: Keyword arguments of one call.
        config: The run's settings.
        sensitivity: File of sensitivities, as of `quantize`; read if it is there.
        max_memory: Bytes of activations held in memory.
        batch_size: Rows of a calibration call.

    Raises:
        ConfigError: An override matches no layer, `noise_argument` names none, the budget is below
            the smallest possible, or the limit of memory is.
        ArtifactError: The sensitivities are damaged, or of another model.
        TraceError: The model cannot be traced.
    """
    table = None
    if config.allocation == "measured" and sensitivity is not None and Path(sensitivity).exists():
        table = SensitivityTable.load(Path(sensitivity))
    budget = config.effective_bits is not None or config.weight_bytes is not None
    names = [name for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    unknown = any(not any(map(rule.matches, names)) for rule in config.rules)
    argument = config.noise_argument is not None
    if not (unknown or budget or argument or max_memory is not None or table is not None):
        return
    # as `prepare` does: the file of sensitivities is of that graph
    graph_module = normalized(model, inputs, config, fractional_timesteps=True)
    config.check_overrides(weight_layers(graph_module, embeddings=True))
    if budget:
        check_budget(graph_module, config)
    if table is not None:
        table.check(graph_module)
    if max_memory is not None:
        _check_memory(graph_module, config, max_memory, batch_size)


def _check_memory(
    graph_module: fx.GraphModule,
    config: MPQConfig,
    max_memory: int,
    batch_size: int,
) -> None:
    every = [torch.arange(config.timestep_groups)]
    by_level = find_noise_argument(graph_module, config.noise_argument) is not None
    limits = layer_limits(graph_module, config)
    lanes, _ = two_lanes(graph_module, every if by_level else [], config, limits.skipped)
    call = example_inputs(graph_module.meta["signature"], batch_size=batch_size)
    _, smallest = walk_memory(lanes, [call])
    if max_memory < smallest:
        raise ConfigError(
            f"activation_memory={max_memory} cannot hold what one node needs at a call of "
            f"{batch_size} rows; the smallest limit that can is {smallest} bytes"
        )
