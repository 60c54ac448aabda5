"""Train what a quantized graph may still choose, against the float model it came from."""

from mpqdm_fx.distill.api import Distilled, distill
from mpqdm_fx.distill.config import DistillConfig

__all__ = ["DistillConfig", "Distilled", "distill"]
