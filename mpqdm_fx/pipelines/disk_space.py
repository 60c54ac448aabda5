"""What an export writes at least: told by its parts' sizes, before any of its work."""

from collections.abc import Iterable

from mpqdm_fx.backends.names import FourBit, ProgramBackend, SideBits, fewest_program_bits
from mpqdm_fx.model.feasibility import weights_of
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.records.config import MPQConfig

__all__ = ["least_bytes"]

_FLOAT_BITS = 32


def least_bytes(
    parts: Iterable[Part],
    config: MPQConfig | None,
    *,
    backend: ProgramBackend,
    four_bit: FourBit,
    encoder_bits: SideBits,
) -> tuple[int, int]:
    """Bytes of programs, and of the solved layers that lie beside them until the export is through.

    Args:
        parts: Parts that are not taken from another export.
        config: As of `export_pipeline`, like all others. Weights that may be stored at fewer bits
            count these.
        backend: See above.
        four_bit: See above.
        encoder_bits: See above.
    """
    programs, layers = 0, 0
    for part in parts:
        # of a VAE those of the half that it reads
        weights = min(weights_of(part.module), part.parameters)
        if config is None:
            programs += weights * _FLOAT_BITS // 8
            continue
        bits: int = encoder_bits if part.name.startswith("text_encoder") else 8
        if config.activation_mode == "float":
            bits = _FLOAT_BITS
        elif part.stepped:
            bits = fewest_program_bits(backend, four_bit, narrow=config.has_narrow_weights)
        programs += weights * bits // 8
        layers += weights  # a byte each
    return programs, layers
