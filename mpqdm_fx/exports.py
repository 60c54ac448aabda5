"""What `import mpqdm_fx` offers, loaded when it is first asked for."""

from mpqdm_fx.api import convert, lower, open_sweep, prepare, quantize
from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.config import MPQConfig, Override
from mpqdm_fx.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    DialectError,
    LoweringError,
    MPQError,
    TraceError,
)
from mpqdm_fx.graph.base import GraphPass, Pipeline
from mpqdm_fx.graph.trace import trace
from mpqdm_fx.parity.verify import verify
from mpqdm_fx.pipelines.export import export_pipeline
from mpqdm_fx.plan import BitPlan, LayerPlan
from mpqdm_fx.quantized import PreparedModel, QuantizedModel
from mpqdm_fx.report.comparison import Comparison, compare
from mpqdm_fx.storage import load, save
from mpqdm_fx.versions import versions

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

__version__ = versions()["mpqdm-fx"]
