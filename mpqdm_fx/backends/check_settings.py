"""Which settings a backend runs: one rule for every way in."""

from collections.abc import Mapping

from mpqdm_fx.backends.names import BACKENDS, Backend
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import ActivationMode, MPQConfig

__all__ = ["MODES", "check_settings"]

#: How activations may be quantized, by what runs them.
MODES: Mapping[Backend, tuple[ActivationMode, ...]] = {
    "torch_ao": ("static",),
    "xnnpack": ("measured", "static", "dynamic"),
    "packed": ("measured", "static", "timestep", "dynamic", "float"),
}


def check_settings(backend: Backend, settings: MPQConfig, *, alternatives: bool = True) -> None:
    """Refuse settings that a backend does not run.

    Args:
        backend: The backend.
        settings: What a model is, or would be, quantized with.
        alternatives: Whether another backend can be chosen instead; the message names it then.

    Raises:
        ConfigError: The backend does not run the mode of the activations, or their bits.
    """
    mode, bits = settings.activation_mode, settings.narrowest_activation_bits
    if mode not in MODES[backend]:
        modes = " or ".join(f'"{choice}"' for choice in MODES[backend])
        doors = " or ".join(f'"{b}"' for b in BACKENDS if mode in MODES[b])
        raise ConfigError(
            f"{backend} does not run activation_mode={mode!r}; choose activation_mode={modes}"
            + (f" or backend={doors}" if alternatives else "")
        )
    if backend != "packed" and bits != 8:
        name = {"xnnpack": "XNNPACK", "torch_ao": "torch.ao"}[backend]
        raise ConfigError(
            f"{name} runs activations of 8 bits, not {bits}; choose activation_bits=8"
            + (' or backend="packed"' if alternatives else "")
        )
