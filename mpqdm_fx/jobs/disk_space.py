"""What a quantized folder takes on the disk at least, told before any work."""

from torch import nn

from mpqdm_fx.backends.names import fewest_program_bits
from mpqdm_fx.jobs.result_folder import ProgramForm
from mpqdm_fx.model.feasibility import weights_of
from mpqdm_fx.records.config import MPQConfig

__all__ = ["least_bytes"]


def least_bytes(model: nn.Module, config: MPQConfig, form: ProgramForm) -> int:
    """Solved layers, a byte a weight until the run is through, packed weights, and the program.

    Args:
        model: Float model.
        config: Settings. Where layers have rules of their own, packed weights count a bit each.
        form: What is written. Weights that a program may store at fewer bits count these.
    """
    weights = weights_of(model)
    packed = int(weights * (config.effective_bits or config.weight_bits)) // 8
    if config.rules:
        packed = weights // 8
    elif config.weight_bytes is not None:
        packed = config.weight_bytes
    program = 0
    if form.has_program:
        narrow = config.has_narrow_weights
        program = weights * fewest_program_bits(form.backend, form.four_bit, narrow=narrow) // 8
    return weights + packed + program
