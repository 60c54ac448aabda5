"""Train what a quantized graph may still choose, against the float model it came from."""

from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.distillation import Distilled, distill

__all__ = ["DistillConfig", "Distilled", "distill"]
