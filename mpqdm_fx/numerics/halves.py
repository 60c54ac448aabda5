"""Half precision where it loses nothing."""

import torch
from torch import Tensor

__all__ = ["fits_half", "stored_float_bits"]


def fits_half(tensor: Tensor) -> bool:
    """Whether a float32 tensor survives the way to float16 and back bit for bit."""
    return tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor)


def stored_float_bits(tensor: Tensor) -> int:
    """Bits per element in a packed file: 16 where half precision is exact, else its own."""
    return 16 if fits_half(tensor) else tensor.element_size() * 8
