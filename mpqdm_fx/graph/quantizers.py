"""Leaf modules that quantize and dequantize an activation at run time."""

from torch import nn

__all__ = ["ActivationQuantizer"]


class ActivationQuantizer(nn.Module):
    """Base of modules that round an activation: `forward(x, *extra)` keeps x's shape and dtype.

    In a graph with two lanes they exist in the quantized lane alone; the float lane passes `x`
    through.
    """
