"""What memory an encoder takes whose weights stay in its files, and whether it is there."""

import logging
from collections.abc import Callable, Iterable

from torch import nn

from mpqdm_fx.bits.probed_parts import PROBED_BYTES
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.memory import available_memory
from mpqdm_fx.numerics.lazy_tensor import StoredTensor
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.stored_encoders import is_held_as_stored

__all__ = ["check_float_program", "check_memory", "encoder_peak", "held_bytes"]

logger = logging.getLogger(__name__)

# Bytes beyond what is imported; benchmarks/encoder_memory.py measured 1,526 MB while an encoder of
# 277 M parameters was quantized on 9 prompts of 120 tokens, for 1,534 here.
_OVERHEAD = 460_000_000  # graphs, and what torch.export imports
_LOWERED = 3  # a number, while its program is made: integers, delegate, program
_JUDGED = 2  # a number, while it is judged: its integers, and those of plain rounding
_ROUNDED = 48  # a number of the layer that is rounded, as of `sweep.layer_work`
_MOMENT = 16  # a product of two of its inputs: moments, and their factor
_FLOAT = 12  # a number of a float program: weights, delegate, program
_KEPT = 6  # a number that a layer reads or writes, kept for gradients, with what lies between


def encoder_peak(module: nn.Module, tokens: int) -> int:
    """Bytes at most while an encoder that stays in its files is quantized to 8 bits and lowered.

    Pages of its files do not count, which the system takes back when it needs them.

    Args:
        module: One that `stored_encoders` loaded.
        tokens: Of a prompt.
    """
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    layers = [_ROUNDED * m.weight.numel() + _MOMENT * m.in_features**2 for m in linear]
    stored = sum(p.numel() for p in module.parameters() if isinstance(p, StoredTensor))
    one = _KEPT * tokens * sum(m.in_features + m.out_features for m in linear)
    probed = max(PROBED_BYTES, one)  # what errors of inputs do to the output is measured backwards
    work = max(_LOWERED * stored, _JUDGED * stored + max(layers, default=0), probed)
    return _OVERHEAD + held_bytes(module) + work


def held_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters that are in memory, and not in its files."""
    return sum(p.nbytes for p in module.parameters() if not isinstance(p, StoredTensor))


def check_memory(parts: Iterable[Part], tokens_of: Callable[[str], int]) -> None:
    """Say what each encoder that stays in its files will take, and refuse what does not fit.

    Args:
        parts: Of a pipeline.
        tokens_of: Tokens of a prompt, by an encoder's name.

    Raises:
        ConfigError: Less memory is left than one of them takes.
    """
    left = available_memory()
    for part in parts:
        if not is_held_as_stored(part.module):
            continue
        peak = encoder_peak(part.module, tokens_of(part.name))
        logger.info(
            "%s (%.1f GB in float32) stays in its files: quantizing and lowering it takes about "
            "%.1f GB at most", part.name, 4 * part.parameters / 1e9, peak / 1e9,
        )  # fmt: skip
        if left is not None and peak > left:
            raise ConfigError(
                f"{part.name}: quantizing and lowering its {part.parameters:,} parameters takes "
                f"about {peak / 1e9:.1f} GB, and {left / 1e9:.1f} GB are left here, although its "
                f"weights are read from its files layer by layer; end what else takes memory, or "
                f"export on a machine that has more"
            )


def check_float_program(part: Part, ratio: float, bound: float, bits: int) -> None:
    """Refuse to leave an encoder in float that does not fit in memory so.

    Args:
        part: One that is not good enough when it is quantized.
        ratio: Its signal-to-noise ratio, in dB.
        bound: Least one, in dB.
        bits: Of its quantized weights.

    Raises:
        ConfigError: Less memory is left than its float program takes.
    """
    left, needed = available_memory(), _FLOAT * part.parameters
    if is_held_as_stored(part.module) and left is not None and needed > left:
        raise ConfigError(
            f"{part.name}: quantized to {bits} bits it has {ratio:.1f} dB on held-out inputs, less "
            f"than {bound:.1f}, and making its program in float would take about "
            f"{needed / 1e9:.1f} GB, of which {left / 1e9:.1f} are left here; take it as it is "
            f"(--minimum-sqnr {ratio - 1:.0f}), or export on a machine that has more memory"
        )
