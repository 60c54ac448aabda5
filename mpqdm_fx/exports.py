"""What `import mpqdm_fx` offers, loaded when it is first asked for."""

from mpqdm_fx.api import convert, open_sweep, prepare, quantize
from mpqdm_fx.backends.lower import lower
from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    DialectError,
    LoweringError,
    MPQError,
    TraceError,
)
from mpqdm_fx.io.versions import versions
from mpqdm_fx.model.quantized import PreparedModel, QuantizedModel
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.parity.verify import verify
from mpqdm_fx.passes.base import GraphPass, Pipeline
from mpqdm_fx.pipelines.export import export_pipeline
from mpqdm_fx.records.config import MPQConfig, Override
from mpqdm_fx.records.plan import BitPlan, LayerPlan
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.report.comparison import Comparison, compare

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

__version__ = versions()["mpqdm-fx"]
