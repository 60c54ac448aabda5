"""Several processes of one run, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

__all__ = ["gathered", "is_first", "joined", "processes"]


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
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        distributed.init_process_group("cpu:gloo,cuda:nccl")  # what is shared may be on either
    else:
        distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def processes() -> int:
    """How many processes share the run."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def is_first() -> bool:
    """Whether this process writes results and shows progress."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return True


def gathered(rows: Tensor) -> Tensor:
    """Rows of all processes, in the processes' order; alone, the rows themselves.

    Args:
        rows: [n, ...], of one shape and dtype in all processes.

    Returns:
        [n * processes, ...].
    """
    if processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(processes())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
