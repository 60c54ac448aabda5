"""Settings that no export runs, refused before a pipeline is loaded."""

from collections.abc import Sequence

from mpqdm_fx.backends.check_settings import check_kernel_options, check_settings
from mpqdm_fx.backends.names import Cpu, Kernels, ProgramBackend, SideBits
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, check_four_bit
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.validation import check_value

__all__ = ["check_export"]


def check_export(
    config: MPQConfig | None,
    prompts: Sequence[str] | None,
    four_bit: FourBit,
    *,
    encoder_bits: SideBits,
    backend: ProgramBackend,
    kernels: Kernels,
    cpu: Cpu,
) -> None:
    """Refuse settings that no export runs.

    Args: as of `export_pipeline`.

    Raises:
        ConfigError: There is no prompt, or programs do not run the settings.
    """
    check_kernel_options(backend, kernels, cpu)
    check_value(prompts, Sequence[str] | None, "prompts")
    if prompts is not None and not prompts:
        raise ConfigError("prompts: give a sequence of at least one prompt")
    check_four_bit(four_bit, "float" if config is None else config.activation_mode)
    if config is None and encoder_bits != 8:
        raise ConfigError(
            f"encoder_bits={encoder_bits}: all parts are to stay in float; quantize, or leave "
            "encoder_bits out"
        )
    if backend == "lowbit" and config is None:
        raise ConfigError(
            "float programs have no layers for own kernels, which run rounded weights; quantize, "
            'or choose backend="xnnpack"'
        )
    if config is not None and (backend == "lowbit" or config.activation_mode != "float"):
        check_settings(backend, config, alternatives=False)
