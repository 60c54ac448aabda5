"""The state of torch that surrounds a call: every verb works in the one of a fresh process.

Inference mode and ``no_grad`` take away the gradients that sensitivities and training are made of;
autocast and another default dtype change what is computed. None of it is said in a verb's
arguments, so none of it may reach its result.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["plain_torch", "without_autocast", "without_inference_tensors"]


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Leave inference mode, ``no_grad``, autocast, and other default dtypes and devices.

    Also a decorator: ``@plain_torch()``. What was there is there again afterwards.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_autocast())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off on every device where it is on."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def without_inference_tensors(value: Any) -> Any:
    """Copy what was made in inference mode: no gradient can be taken through such a tensor.

    Args:
        value: Tensors in nested dicts, lists and tuples; other tensors are kept as they are.
    """
    return pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, value)
