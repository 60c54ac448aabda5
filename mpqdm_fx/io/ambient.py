"""The state of torch that surrounds a call: every verb works in the one of a fresh process.

Inference mode and ``no_grad`` take away the gradients that sensitivities and training are made of;
autocast and another default dtype change what is computed. None of it is said in a verb's
arguments, so none of it may reach its result.
"""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["plain_torch", "without_autocast"]


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
    """Switch autocast off on the CPU and on this machine's accelerator, where it is on."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for device in ("cpu", *([] if accelerator is None else [accelerator.type])):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
