"""Several processes of one run, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

__all__ = ["is_first", "joined"]


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started; alone, do nothing.

    `torchrun --nproc-per-node N -m mpqdm_fx quantize ...`: calibration calls are shared out, and
    what they give is gathered; the first process writes.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or not distributed.is_available() or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes results and shows progress."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return True
