"""The first line of a run: what it is about to do."""

from mpqdm_fx.records.config import MPQConfig

__all__ = ["bits_of"]


def bits_of(config: MPQConfig) -> str:
    """Bits of weights and activations in words: `4-bit weights, 8-bit activations`.

    Args:
        config: Settings.
    """
    weights = f"{config.weight_bits}-bit weights"
    if config.weight_bytes is not None:
        weights = f"weights in {config.weight_bytes:,} bytes"
    elif config.effective_bits is not None:
        weights = f"{config.effective_bits:g} effective bits a weight"
    if config.activation_mode == "float":
        return f"{weights}, float activations"
    kind = " by noise level" if config.activation_mode == "timestep" else ""
    average = " on average" if config.measures_widths else ""
    return f"{weights}, {config.activation_bits}-bit activations{average}{kind}"
