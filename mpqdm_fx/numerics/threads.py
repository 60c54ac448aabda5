"""One thread for loops of small kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block on one thread of the CPU.

    A loop over columns calls thousands of kernels of some microseconds each; handing each to
    several threads costs more than it does, and on a busy machine a hundred times more.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
