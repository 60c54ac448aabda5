"""Which settings a backend runs: one rule for every way in."""

from collections.abc import Mapping

from mpqdm_fx.backends.names import BACKENDS, Backend, Cpu, Kernels
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import ActivationMode, MPQConfig

__all__ = ["MODES", "check_kernel_options", "check_settings"]

#: How activations may be quantized, by what runs them.
MODES: Mapping[Backend, tuple[ActivationMode, ...]] = {
    "torch_ao": ("static",),
    "xnnpack": ("measured", "static", "dynamic"),
    "lowbit": ("measured", "static", "dynamic"),
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
        name = {"xnnpack": "XNNPACK", "torch_ao": "torch.ao"}.get(backend, backend)
        raise ConfigError(
            f"{name} runs activations of 8 bits, not {bits}; choose activation_bits=8"
            + (' or backend="packed"' if alternatives else "")
        )


def check_kernel_options(backend: Backend, kernels: Kernels, cpu: Cpu) -> None:
    """Refuse a choice of kernels, or a class of CPUs, that would change nothing.

    Args:
        backend: The backend.
        kernels: What is wanted of own kernels; `"auto"` is the default.
        cpu: Class of CPUs; `"avx2"` is the default.

    Raises:
        ConfigError: The backend has no own kernels, or `kernels` asks no cost table.
    """
    if backend != "lowbit":
        for name, value, usual in (("kernels", kernels, "auto"), ("cpu", cpu, "avx2")):
            if value != usual:
                raise ConfigError(
                    f"{name}={value!r}: {backend} has no own kernels; choose "
                    f'backend="lowbit" or leave {name} out'
                )
    elif kernels != "auto" and cpu != "avx2":
        raise ConfigError(
            f'cpu={cpu!r}: only kernels="auto" asks how long layers take there, and '
            f"kernels={kernels!r} does not; leave one of the two out"
        )
