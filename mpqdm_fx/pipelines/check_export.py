"""Settings that no export runs, refused before a pipeline is loaded."""

from collections.abc import Sequence

from mpqdm_fx.backends.check_settings import check_kernel_options, check_settings
from mpqdm_fx.backends.names import Cpu, Kernels, ProgramBackend, SideBits
from mpqdm_fx.backends.xnnpack.four_bit import FourBit, check_four_bit
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.records.validation import check_value

__all__ = ["MINIMUM_SQNR_DB", "check_export", "check_float_run"]

MINIMUM_SQNR_DB = 30.0
"""Below it a quantized text encoder or VAE is not used: noise of a thousandth of the power."""


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


def check_float_run(run: RunOptions, minimum_sqnr_db: float) -> None:
    """Refuse what has no meaning where all parts stay in float: nothing is solved or judged.

    Args: as of `export_pipeline`.

    Raises:
        ConfigError: Names the first.
    """
    given = {
        "sensitivity": run.sensitivity is not None,
        "device": run.device is not None,
        "activation_memory": run.activation_memory is not None,
        "minimum_sqnr_db": minimum_sqnr_db != MINIMUM_SQNR_DB,
    }
    for name, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"{name}: all parts are to stay in float, and nothing is solved or judged; "
                f"quantize, or leave {name} out"
            )
