"""What benchmarks ask of this machine: int8 dot products hidden, as on an older CPU; memory."""

import ctypes
import os
from pathlib import Path

__all__ = ["anonymous_bytes", "hide_dot_products"]

#: Neighbours in cpuinfo's record of x86 features, with their names in /proc/cpuinfo.
_FEATURES = (
    "avx", "avx_vnni", "fma", "fma4", "xop", "f16c", "avx2", "avx512f", "avx512pf", "avx512er",
    "avx512cd", "avx512dq", "avx512bw", "avx512vl", "avx512ifma", "avx512vbmi", "avx512_vbmi2",
    "avx512_bitalg", "avx512_vpopcntdq", "avx512_vnni", "avx512_bf16",
)  # fmt: skip


def hide_dot_products() -> None:
    """Leave AVX2 as the best instructions, for this process and those that it starts.

    XNNPACK asks ExecuTorch's copy of cpuinfo, once, when a program is first loaded: call this
    before. The layout of its record is not part of any interface, so the place is found by what
    this CPU has.

    Raises:
        RuntimeError: The place is not clear; or XNNPACK is in use already, as far as can be told.
    """
    import executorch

    path = Path(next(iter(executorch.__path__))) / "lib" / "libexecutorch_threadpool.so"
    cpuinfo = ctypes.CDLL(str(path))
    if not cpuinfo.cpuinfo_initialize():
        raise RuntimeError("cpuinfo does not know this CPU")
    expected = bytes(name in _flags() for name in _FEATURES)
    record = (ctypes.c_ubyte * 80).in_dll(cpuinfo, "cpuinfo_isa")
    start = bytes(record).find(expected)
    if start < 0 or bytes(record).find(expected, start + 1) >= 0:
        raise RuntimeError("cannot tell where cpuinfo keeps the features of this CPU")
    for position, name in enumerate(_FEATURES):
        if name.startswith("avx512") or name == "avx_vnni":
            record[start + position] = 0
    os.environ["MPQDM_KERNELS"] = "avx2"


def anonymous_bytes() -> int:
    """Bytes of this process's memory that are no file's."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/smaps_rollup has no anonymous pages")


def _flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())
