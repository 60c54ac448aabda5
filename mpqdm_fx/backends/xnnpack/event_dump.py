"""What ExecuTorch's event tracer (ETDump) records of a run: the arguments of every instruction."""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["recorded", "recording_bytes"]

#: Of `executorch_flatbuffer.ScalarType`, by name.
_DTYPES = {
    "BYTE": torch.uint8,
    "CHAR": torch.int8,
    "SHORT": torch.int16,
    "INT": torch.int32,
    "LONG": torch.int64,
    "HALF": torch.float16,
    "FLOAT": torch.float32,
    "DOUBLE": torch.float64,
    "BOOL": torch.bool,
}
_WIDEST = 8  # bytes of an element
_ALIGNMENT = 64  # of a recorded value
_SPARE = 1 << 16


def recorded(events: Path, values: Path) -> dict[int, list[Tensor | None]]:
    """Read the record of one run.

    Args:
        events: File of events.
        values: File of the values that events refer to.

    Returns:
        By number of the instruction the values recorded there, in order: all arguments of a
        delegate's call, the result of a kernel. None stands for what is no tensor. Behind those of
        the last instruction are the method's outputs.
    """
    from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc

    dump = deserialize_from_etdump_flatcc(events.read_bytes())
    data = np.memmap(values, dtype=np.uint8, mode="r")
    result: dict[int, list[Tensor | None]] = defaultdict(list)
    for run in dump.run_data:
        for event in run.events:
            debug = event.debug_event
            if debug is not None and not debug.delegate_debug_id_str:
                result[debug.instruction_id].append(_tensor(debug.debug_entry.tensor, data))
    return dict(result)


def _tensor(entry: Any, data: np.ndarray[Any, Any]) -> Tensor | None:
    dtype = None if entry is None else _DTYPES.get(entry.scalar_type.name)
    if dtype is None:
        return None
    size = math.prod(entry.sizes) * dtype.itemsize
    part = np.array(data[entry.offset : entry.offset + size])
    return torch.from_numpy(part).view(dtype).reshape(entry.sizes)


def recording_bytes(plan: Any) -> int:
    """An upper bound of the bytes of the values that one run of a method records.

    Args:
        plan: The method's plan in a program (`executorch.exir.schema.ExecutionPlan`).
    """
    return _SPARE + sum(_bytes(plan.values[index].val) for index in _recorded(plan))


def _recorded(plan: Any) -> Iterator[int]:
    yield from plan.inputs
    yield from plan.outputs
    for chain in plan.chains:
        for instruction in chain.instructions:
            yield from getattr(instruction.instr_args, "args", ())


def _bytes(value: Any) -> int:
    count = math.prod(getattr(value, "sizes", ()))
    name = getattr(getattr(value, "scalar_type", None), "name", "")
    dtype = _DTYPES.get(name)
    return count * (_WIDEST if dtype is None else dtype.itemsize) + _ALIGNMENT
