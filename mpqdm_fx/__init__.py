"""Compile diffusion UNets into extremely low-bit, mixed-precision programs for phone CPUs.

The road: `trace`, `prepare`, run calibration data, `convert`, `lower`; or `quantize` in one call.
"""

# ruff: noqa: F403, F405 - type checkers follow the star; at run time `__getattr__` does

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpqdm_fx.exports import *

__all__ = [
    "ArtifactError",
    "BitPlan",
    "CalibrationError",
    "Comparison",
    "ConfigError",
    "DialectError",
    "GraphPass",
    "LayerPlan",
    "LoweringError",
    "MPQConfig",
    "MPQError",
    "Override",
    "Pipeline",
    "PreparedModel",
    "QuantizedModel",
    "RunOptions",
    "TraceError",
    "Trajectories",
    "__version__",
    "compare",
    "convert",
    "export_pipeline",
    "load",
    "lower",
    "open_sweep",
    "prepare",
    "quantize",
    "save",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("mpqdm_fx.io.versions").versions()["mpqdm-fx"]
    # Not at import: the command line refuses and stops before torch is loaded, which takes seconds.
    if name in __all__:
        return getattr(import_module("mpqdm_fx.exports"), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
